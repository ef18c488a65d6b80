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
    anchor: Segments  # weights that the ridge of a down-projection refit regularises towards
    ridge: float  # its strength, relative to the mean eigenvalue of the normal equations
    steps: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name in reports: the candidate's name and the steps taken, joined by plus signs."""
        return "+".join([self.origin, *self.steps])

    def after(self, *steps: str, segments: Segments) -> "Variant":
        """Return the variant with refitted experts, and the steps that refitted them added to its own.

        Args:
            *steps: names of the steps; "scale" is removed from the variant's, since the refit includes a scale.
            segments: the N refitted experts.
        """
        done = tuple(step for step in self.steps if step != "scale")
        candidate = replace(self.candidate, segments=segments)
        return replace(self, candidate=candidate, steps=tuple(dict.fromkeys(("refit", *done, *steps))))
