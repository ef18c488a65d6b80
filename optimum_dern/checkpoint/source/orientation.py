"""Fused experts that a checkpoint stores transposed: saved the way round that they were loaded.

transformers turns such tensors when it loads them, if their shapes ask for it, and never turns them back: published
Qwen3-VL-MoE checkpoints hold (E, in, out), what `save_pretrained` writes holds (E, out, in), and older readers refuse
that.  The converters that a model was loaded with stay with it, and save it; so they are told here what they did.
"""

from typing import Any

from ..format.reader import CheckpointReader
from .provenance import source_file


__all__ = ["keep_orientation_"]


def keep_orientation_(model: Any) -> None:
    """Let `save_pretrained` transpose whatever loading has transposed; call it before the shapes change.

    Args:
        model: as loaded; one without a local source, or whose tensors were not turned, stays as it is.
    """
    turning = [(c, op) for c in getattr(model, "_weight_conversions", None) or () for op in _checked_transposes(c)]
    config = source_file(model, "config.json") if turning else None
    if config is None:
        return
    stored = CheckpointReader(config.parent).stored
    for converter, operation in turning:
        parameters = {name: p for name, p in model.named_parameters() if converter.target_patterns[0] in name}
        sources = [info for name, info in stored.items() if converter.source_patterns[0] in name]
        shapes = {tuple(p.shape) for p in parameters.values()}
        if sources and not shapes & {tuple(info.shape) for info in sources}:
            operation.check_dims = False  # it turned the tensors, so saving turns them back


def _checked_transposes(converter: Any) -> list[Any]:
    """The operations of a converter that look at shapes to decide."""
    return [op for op in getattr(converter, "operations", None) or () if getattr(op, "check_dims", False)]
