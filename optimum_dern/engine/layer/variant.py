"""`Variant`: a candidate after none, one or several fitting steps, and its error on the held-out tokens."""

from dataclasses import dataclass, replace

from ...core.layer.mixture import Routing
from ...core.layer.segments import Segments
from ...methods import Candidate


__all__ = ["HeldOutError", "Variant"]


@dataclass(frozen=True)
class HeldOutError:
    """Relative squared error of a variant on the held-out tokens."""

    total: float
    by_source: dict[str, float]  # of each source that has held-out tokens

    def exceeds(self, limit: "HeldOutError") -> bool:
        """Return whether the error of any source is above that of another variant."""
        return any(error > limit.by_source[name] for name, error in self.by_source.items())


@dataclass(frozen=True)
class Variant:
    """A candidate, unfitted or fitted, with its routing and the names of the fitting steps taken."""

    origin: str  # the method's name for the candidate
    candidate: Candidate
    routing: Routing  # T tokens, routed by the candidate's router
    steps: tuple[str, ...] = ()
    error: HeldOutError | None = None  # where it has been judged

    @property
    def name(self) -> str:
        """Name in reports: the candidate's name and the steps taken, joined by plus signs."""
        return "+".join([self.origin, *self.steps])

    def after(self, step: str, segments: Segments) -> "Variant":
        """Return the variant with refitted experts, and the step that refitted them added to its own.

        Args:
            step: its name.
            segments: the N refitted experts.
        """
        candidate = replace(self.candidate, segments=segments)
        return replace(self, candidate=candidate, steps=tuple(dict.fromkeys((*self.steps, step))), error=None)
