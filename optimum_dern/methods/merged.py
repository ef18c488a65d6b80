"""What the methods that merge groups of experts propose."""

from ..core.layer.segments import Segments
from ..core.merging.grouping import Grouping
from .registry import Candidate, LayerProblem


__all__ = ["merged_candidates"]


def merged_candidates(problem: LayerProblem, grouping: Grouping, merged: Segments) -> dict[str, Candidate]:
    """Plain pruning beside the merged layer, for the guard to choose from.

    Args:
        problem: of E experts.
        grouping: into N groups.
        merged: N experts.

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
