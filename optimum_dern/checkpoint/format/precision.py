"""The dtypes of a run: that of the stored tensors, that of the computation, and that of the written tensors.

transformers computes in the dtype that config.json names, whatever the tensors are stored in; where it names none, in
that of the first floating-point tensor in the first weight file.
"""

from collections import Counter
from collections.abc import Mapping
from logging import getLogger
from typing import Any

import torch

from .reader import CheckpointReader
from .tensor_file import DTYPES, TensorInfo, dtype_name


__all__ = ["describe_precision", "loading_dtype"]

NARROW = ("float8_", "float4_")  # no model can be built in these

logger = getLogger(__name__)


def loading_dtype(names: Mapping[str, str]) -> torch.dtype | None:
    """Return the dtype in which transformers loads a model whose config names none.

    Args:
        names: safetensors dtypes of the tensors in the first weight file, by tensor name.

    Returns:
        The dtype of the first floating-point tensor, else of the first tensor; None without tensors.
    """
    dtypes = [DTYPES[names[tensor]] for tensor in sorted(names) if names[tensor] in DTYPES]
    floats = (dtype for dtype in dtypes if dtype.is_floating_point and not any(n in str(dtype) for n in NARROW))
    return next(floats, next(iter(dtypes), None))


def describe_precision(model: Any, reader: CheckpointReader, written: str | None) -> dict[str, str]:
    """Describe the dtypes of a run over a checkpoint, and warn where results are written in another one than computed.

    Args:
        model: without weights, in the dtype of the computation.
        reader: of the checkpoint.
        written: safetensors dtype of the output; None for that of the source.
    """
    stored, computed = _most_common(reader.infos), dtype_name(model.dtype)
    names = {"stored": stored, "computed": computed, "written": written or stored}
    found = {what: str(DTYPES[name]).removeprefix("torch.") for what, name in names.items()}
    if found["computed"] != found["written"]:
        logger.warning(
            "%s is computed in %s, in which transformers loads it, and written in %s, in which it is stored; "
            "compressed in memory it is saved in %s, and here, too, with dtype=%r",
            reader.folder,
            *(found[what] for what in ("computed", "written", "computed", "computed")),
        )
    return found


def _most_common(infos: Mapping[str, TensorInfo]) -> str:
    """Return the floating-point dtype in which most bytes are stored."""
    sizes: Counter[str] = Counter()
    for info in infos.values():
        if info.dtype in DTYPES and DTYPES[info.dtype].is_floating_point:
            sizes[info.dtype] += info.size
    return max(sizes, key=sizes.get)
