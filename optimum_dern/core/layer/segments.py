"""Conversion of expert weights to neuron segments and back.

An expert of width f is exactly the sum of f neurons: neuron j reads the input through row j of the gate and of the up
projection and writes through column j of the down projection (DERN, arXiv 2509.10377, step 2).  That triple is a
*segment*.  All layouts that transformers stores (fused, transposed, interleaved, biased, without a gate) become one
neuron-major form here, so that nothing else in `core` has to know about them.

A neuron's input bias is the weight of a constant input: it is kept as one more column of the gate and up rows, so it
travels with its segment through similarity, clustering and averaging without any special case.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .workspace import IN_MEMORY, Workspace


__all__ = ["ExpertLayout", "Segments", "parameters_from_segments", "segments_from_parameters", "similarity_vectors"]


@dataclass(frozen=True)
class ExpertLayout:
    """Storage layout of a model's expert weights, as flagged by transformers' experts modules."""

    gated: bool = True  # gate and up fused in `gate_up_proj`; otherwise only `up_proj`
    transposed: bool = False  # (E, in, out) instead of (E, out, in)
    interleaved: bool = False  # gate and up rows alternate instead of all gates first
    biased: bool = False  # `*_proj_bias` tensors stand beside the weights


class Segments(NamedTuple):
    """The neurons of E experts: input width d (plus one with biases), expert width f, output width o."""

    gate: Tensor | None  # (E, f, d)
    up: Tensor  # (E, f, d)
    down: Tensor  # (E, f, o): row j is column j of the down projection
    output_bias: Tensor | None = None  # (E, o) bias of the expert's output, not of a neuron
    biased: bool = False  # the last column of gate and up is a bias
    workspace: Workspace = IN_MEMORY  # memory limits and allocator of the steps that use these tensors

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The projections that there are: gate, up and down, or up and down."""
        return tuple(part for part in self[:3] if part is not None)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of computations: float32 or wider; weights are converted one expert at a time, when they are used."""
        return torch.promote_types(self.up.dtype, torch.float32)

    def select(self, experts: Tensor | slice) -> "Segments":
        """Select experts in the order given: copies, or views for a slice."""
        experts = experts if isinstance(experts, slice) else experts.cpu()  # a device is asked once

        def chosen(part: Tensor) -> Tensor:
            return part[experts] if isinstance(experts, slice) else self.workspace.select(part, experts)

        return Segments(*(chosen(part) if isinstance(part, Tensor) else part for part in self))

    def to(self, *args) -> "Segments":
        """Apply `Tensor.to` to every tensor."""
        return Segments(*(part.to(*args) if isinstance(part, Tensor) else part for part in self))

    def concatenated(self, expert: int) -> Tensor:
        """Return one expert's segments as the rows of a matrix gate|up|down (f, D)."""
        return torch.cat([part[expert] for part in self.parts], dim=-1)  # (f, D)

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Split a matrix (f, D) made by `concatenated` into the rows of each of `parts`."""
        return matrix.split([part.shape[-1] for part in self.parts], dim=-1)


def segments_from_parameters(
    parameters: Mapping[str, Tensor], layout: ExpertLayout, workspace: Workspace = IN_MEMORY
) -> Segments:
    """Convert the expert parameters of one layer to segments.

    Args:
        parameters: `gate_up_proj` (E, 2f, d) or `up_proj` (E, f, d), `down_proj` (E, o, f), and with biases
            `gate_up_proj_bias` (E, 2f) or `up_proj_bias` (E, f) and `down_proj_bias` (E, o); the weights' last two
            dimensions are swapped where `layout.transposed`.
        layout: storage layout of the parameters.
        workspace: of the segments.

    Returns:
        Segments of the same dtype, views of the parameters where the layout allows.
    """
    first = "gate_up_proj" if layout.gated else "up_proj"
    rows, down = parameters[first], parameters["down_proj"]
    rows = rows.transpose(1, 2) if layout.transposed else rows  # (E, 2f or f, d)
    down = down if layout.transposed else down.transpose(1, 2)  # (E, f, o)
    if layout.biased:
        rows = _with_bias_column(rows, parameters[f"{first}_bias"], workspace)  # (E, 2f or f, d + 1)
    output_bias = parameters["down_proj_bias"] if layout.biased else None
    gate, up = _split_gate_up(rows, layout) if layout.gated else (None, rows)
    return Segments(gate, up, down, output_bias, layout.biased, workspace)


def parameters_from_segments(segments: Segments, layout: ExpertLayout) -> dict[str, Tensor]:
    """Convert segments back to contiguous parameters in the model's layout.

    Args:
        segments: any number of experts.
        layout: storage layout of the model.

    Returns:
        The parameters under the names that `segments_from_parameters` reads.
    """
    first = "gate_up_proj" if layout.gated else "up_proj"
    rows = _join_gate_up(segments.gate, segments.up, layout) if layout.gated else segments.up
    parameters = {}
    if layout.biased:
        parameters[f"{first}_bias"] = rows[..., -1].contiguous()  # (E, 2f or f)
        parameters["down_proj_bias"] = segments.output_bias.contiguous()  # (E, o)
        rows = rows[..., :-1]
    parameters[first] = (rows.transpose(1, 2) if layout.transposed else rows).contiguous()
    parameters["down_proj"] = (segments.down if layout.transposed else segments.down.transpose(1, 2)).contiguous()
    return parameters


def similarity_vectors(segments: Segments, weights: Sequence[float]) -> Tensor:
    """Compute unit vectors of neurons whose dot product is the weighted mean of the projections' cosines.

    Each projection vector is L2-normalised, scaled by sqrt(weight / sum of weights), and the three are concatenated.

    Args:
        segments: E experts.
        weights: weight of the gate, up and down projection; the gate's is ignored where there is none.

    Returns:
        (E, f, D), without the projections of weight zero.

    Raises:
        ValueError: a negative weight, or none above zero.
    """
    pairs = [(part, w) for part, w in zip(segments[:3], weights, strict=True) if part is not None and w != 0]
    total = sum(w for _, w in pairs)
    if not all(0 <= w < float("inf") for w in weights) or not total > 0:
        raise ValueError(
            f"similarity weights (gate, up, down) are {tuple(weights)}; give finite weights >= 0, not all zero"
        )
    return torch.cat([torch.nn.functional.normalize(part, dim=-1) * (w / total) ** 0.5 for part, w in pairs], dim=-1)


def _with_bias_column(rows: Tensor, bias: Tensor, workspace: Workspace) -> Tensor:
    experts, count, inputs = rows.shape
    joined = workspace.empty((experts, count, inputs + 1), dtype=rows.dtype, device=rows.device)
    for expert in range(experts):
        joined[expert, :, :-1], joined[expert, :, -1] = rows[expert], bias[expert]
    return joined


def _split_gate_up(rows: Tensor, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    if layout.interleaved:
        return rows[:, ::2], rows[:, 1::2]
    return rows.chunk(2, dim=1)


def _join_gate_up(gate: Tensor, up: Tensor, layout: ExpertLayout) -> Tensor:
    if layout.interleaved:
        return torch.stack([gate, up], dim=2).flatten(1, 2)  # (E, f, 2, d) -> (E, 2f, d)
    return torch.cat([gate, up], dim=1)  # (E, 2f, d)
