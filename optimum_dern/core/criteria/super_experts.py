"""Super experts: the few experts with extreme outlier outputs that the model depends on (arXiv 2507.23279).

Without them models collapse, however seldom they are used.  The paper finds them by the largest absolute component a
of every expert's output over the calibration tokens, among the first three quarters of the layers:

    a > 99.5 % quantile of all a    and    a > max of all a / 10

A layer is compressed before later ones have been seen, so "all" are here those of its own and of earlier layers, and
in place of the quantile, which says nothing about a few dozen numbers, an expert must stand out from its own layer:

    a > 5 x median of the layer's a    and    a > max of all a so far / 10

An early layer's outlier that is small compared with later layers is protected here but not in the paper; that costs
little.
"""

from collections.abc import Iterable

from torch import Tensor

from .selection import select_experts


__all__ = ["find_super_experts"]

DEPTH = 0.75  # of the decoder layers; in the last ones all outputs are large
OF_LARGEST = 0.1
OF_MEDIAN = 5.0


def find_super_experts(
    output_max: Tensor, earlier: Iterable[float], depth: float, count: int, num_groups: int = 1
) -> list[int]:
    """Detect the super experts of one layer.

    Args:
        output_max: (E,) largest absolute component of every expert's output, 0 for one that no token reached.
        earlier: largest such value of each earlier layer.
        depth: how far into the decoder the layer is: 0 for the first of its layers, below 1 for the last.
        count: how many experts are retained; no more are protected, in each router group too.
        num_groups: of a group-limited router.

    Returns:
        Their indices, ascending; usually none.
    """
    reached = output_max[output_max > 0]
    if depth >= DEPTH or not len(reached):
        return []
    largest = max([output_max.max().item(), *earlier])
    outliers = (output_max > OF_MEDIAN * reached.median()) & (output_max > OF_LARGEST * largest)
    return [expert for expert in select_experts(output_max, count, num_groups).tolist() if outliers[expert]]
