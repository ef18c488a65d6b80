"""Candidates of the merging methods: the merged layer and plain pruning."""

from ..core.layer.segments import Segments
from ..core.merging.grouping import Grouping
from .registry import Candidate, LayerProblem


__all__ = ["merged_candidates"]


def merged_candidates(problem: LayerProblem, grouping: Grouping, merged: Segments) -> dict[str, Candidate]:
    """Return the pruned and the merged layer as candidates for the guard.

    Args:
        problem: a layer of E experts.
        grouping: of the experts into N groups.
        merged: N merged experts.

    Returns:
        The candidates.  A merged expert takes the router row, the biases and the place of its representative.
    """
    layer = problem.layer
    retained = grouping.retained.to(problem.retained.device)
    pruned = Candidate(layer.segments.select(problem.retained))
    if len(retained) == len(layer.segments.up):  # groups of one: nothing is merged
        return {"pruned": pruned}
    rows = None if layer.router_rows is None else layer.router_rows[retained]
    return {"pruned": pruned, "merged": Candidate(merged, rows, retained=retained)}
