"""`Variant`: a candidate after none, one or several fitting steps."""

from dataclasses import dataclass, replace

from ...core.layer.mixture import Routing
from ...core.layer.segments import Segments
from ...methods import Candidate


__all__ = ["Variant"]


@dataclass(frozen=True)
class Variant:
    """A candidate, unfitted or fitted, with its routing and the names of the fitting steps taken."""

    origin: str  # the method's name for the candidate
    candidate: Candidate
    routing: Routing  # T tokens, routed by the candidate's router
    steps: tuple[str, ...] = ()

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
        return replace(self, candidate=candidate, steps=tuple(dict.fromkeys((*self.steps, step))))
