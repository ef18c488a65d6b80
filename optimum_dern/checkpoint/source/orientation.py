"""Makes `save_pretrained` store fused experts transposed where the source checkpoint stores them transposed.

transformers transposes such tensors on loading, depending on their shapes, but not on saving: published Qwen3-VL-MoE
checkpoints hold (E, in, out), `save_pretrained` writes (E, out, in), and older readers refuse that.  A model keeps the
converters that it was loaded with, and saves with them; this module sets those that have transposed to do so again.
"""

from typing import Any

from ..format.reader import stored_tensors
from .provenance import source_file


__all__ = ["keep_orientation_"]


def keep_orientation_(model: Any) -> None:
    """Make `save_pretrained` transpose the tensors that loading has transposed; called before the shapes change.

    Args:
        model: as loaded; without a local source, or without transposed tensors, it stays as it is.
    """
    turning = [(c, op) for c in getattr(model, "_weight_conversions", None) or () for op in _checked_transposes(c)]
    config = source_file(model, "config.json") if turning else None
    if config is None:
        return
    stored = stored_tensors(config.parent)
    for converter, operation in turning:
        parameters = {name: p for name, p in model.named_parameters() if converter.target_patterns[0] in name}
        sources = [info for name, info in stored.items() if converter.source_patterns[0] in name]
        shapes = {tuple(p.shape) for p in parameters.values()}
        if sources and not shapes & {tuple(info.shape) for info in sources}:
            operation.check_dims = False  # loading transposed the tensors, so saving does, too


def _checked_transposes(converter: Any) -> list[Any]:
    """Return the transpose operations of a converter that depend on the tensor's shape."""
    return [op for op in getattr(converter, "operations", None) or () if getattr(op, "check_dims", False)]
