"""Memory and floating-point operations of the steps on a MoE layer, computed from tensor shapes alone.

Every expensive function of `core` has a `*_cost` function beside it that returns its `Cost`; predictions of memory and
time add these up.
"""

from typing import NamedTuple

from .workspace import CHUNK_TOKENS, MAX_ELEMENTS


__all__ = ["Cost", "LayerShape", "experts_operations", "held_by_chunk"]


class LayerShape(NamedTuple):
    """The tensor sizes of a MoE layer that determine memory and compute."""

    tokens: int  # T, calibration tokens of this process
    experts: int  # E, before
    retained: int  # N, after
    top_k: int
    width: int  # f, neurons of an expert
    inputs: int  # d
    outputs: int  # o
    projections: int = 3  # gate, up and down; 2 without a gate
    itemsize: int = 4  # bytes of a stored weight
    max_elements: int = MAX_ELEMENTS  # of the workspace
    chunk_tokens: int = CHUNK_TOKENS
    kept_width: int | None = None  # neurons of a retained expert; None for all
    biased: bool = False  # experts have output biases

    @property
    def number(self) -> int:
        """Bytes per number in computations, at least those of float32."""
        return max(4, self.itemsize)

    @property
    def expert(self) -> int:
        """Number of weights of one expert."""
        return self.width * ((self.projections - 1) * self.inputs + self.outputs)

    @property
    def down(self) -> int:
        """Number of weights of one expert's down projection."""
        return self.width * self.outputs

    def fitted(self, tokens: int) -> "LayerShape":
        """Return the shape of the layer with only its retained experts and at most this many tokens."""
        return self.narrower._replace(tokens=min(tokens, self.tokens), experts=self.retained)

    @property
    def narrower(self) -> "LayerShape":
        """The shape of the layer with experts as wide as the retained ones."""
        return self if self.kept_width is None else self._replace(width=self.kept_width, kept_width=None)


class Cost(NamedTuple):
    """Additional memory and operations of one step."""

    held: int = 0  # peak bytes for tokens and for one or a few experts at a time
    experts: int = 0  # bytes of tensors with an entry for every expert, including the step's result
    operations: float = 0.0  # a multiplication and an addition are two


def experts_operations(shape: LayerShape) -> float:
    """Return the operations of the forward pass of all tokens through their chosen experts."""
    return 2.0 * shape.tokens * shape.top_k * shape.expert


def held_by_chunk(shape: LayerShape) -> int:
    """Return the bytes of one expert's forward pass on a chunk of tokens: inputs, activations and outputs."""
    tokens = min(shape.chunk_tokens, shape.tokens)
    converted = shape.expert if shape.itemsize < shape.number else 0  # its weights, converted to the compute dtype
    largest = max((shape.projections + 1) * shape.width, shape.width + 2 * shape.outputs)  # up to neurons, or after
    return shape.number * (tokens * (shape.inputs + largest) + converted)
