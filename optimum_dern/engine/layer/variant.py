"""`Variant`: a candidate after some steps of fitting."""

from dataclasses import dataclass, replace

from ...core.layer.mixture import Routing
from ...core.layer.segments import Segments
from ...methods import Candidate


__all__ = ["Variant"]


@dataclass(frozen=True)
class Variant:
    """A candidate as it is or fitted, and which steps have made it so."""

    origin: str  # the method's name for the candidate
    candidate: Candidate
    routing: Routing  # T tokens, by the candidate's router
    anchor: Segments  # before the down projections were refitted: the ridge pulls towards these
    ridge: float  # how strongly, relative to the mean eigenvalue of the refit's equations
    steps: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its origin and steps, as reports have it."""
        return "+".join([self.origin, *self.steps])

    def after(self, *steps: str, segments: Segments) -> "Variant":
        """The variant that a step has made.

        Args:
            *steps: names of what was fitted; a scale is forgotten, as fitting the down projections contains it.
            segments: N experts, fitted.
        """
        done = tuple(step for step in self.steps if step != "scale")
        candidate = replace(self.candidate, segments=segments)
        return replace(self, candidate=candidate, steps=tuple(dict.fromkeys(("refit", *done, *steps))))
