"""What the steps on a MoE layer hold and compute, counted from shapes alone.

Every module of `core` that does notable work has a function beside it that returns its `Cost`; predictions of memory
and time only add these up.
"""

from typing import NamedTuple

from .workspace import CHUNK_TOKENS, MAX_ELEMENTS


__all__ = ["Cost", "LayerShape", "experts_operations", "held_by_chunk"]


class LayerShape(NamedTuple):
    """The sizes that decide what a layer takes."""

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

    @property
    def number(self) -> int:
        """Bytes of a number that is computed with."""
        return max(4, self.itemsize)

    @property
    def expert(self) -> int:
        """Weights of one expert."""
        return self.width * ((self.projections - 1) * self.inputs + self.outputs)

    @property
    def down(self) -> int:
        """Weights of one expert's down projection."""
        return self.width * self.outputs

    def fitted(self, tokens: int) -> "LayerShape":
        """The same layer on fewer tokens, once its experts are the retained ones."""
        return self._replace(tokens=min(tokens, self.tokens), experts=self.retained)


class Cost(NamedTuple):
    """Of one step, beside what was there before it."""

    held: int = 0  # bytes, at most: of tokens, and of one expert or a few at a time
    experts: int = 0  # bytes of what has something for every expert, the step's result included
    operations: float = 0.0  # a multiplication and an addition are two


def experts_operations(shape: LayerShape, tokens: int | None = None) -> float:
    """What the chosen experts of the tokens compute."""
    return 2.0 * (shape.tokens if tokens is None else tokens) * shape.top_k * shape.expert


def held_by_chunk(shape: LayerShape) -> int:
    """Bytes while one expert works on a chunk of tokens: its inputs, pre-activations, neurons and outputs."""
    tokens = min(shape.chunk_tokens, shape.tokens)
    converted = shape.expert if shape.itemsize < shape.number else 0  # weights, as they are computed with
    return shape.number * (
        tokens * (shape.inputs + (shape.projections + 1) * shape.width + 2 * shape.outputs) + converted
    )
