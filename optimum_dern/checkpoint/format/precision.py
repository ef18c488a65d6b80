"""The dtypes of a checkpoint: what its tensors are stored in, what its model is computed in, what is written.

transformers computes in the dtype of config.json, whatever the tensors are in; without one there, in that of the
first weights' first floating tensor.
"""

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
    """The dtype that transformers loads a model in whose config has none.

    Args:
        names: of the dtypes of the tensors in the first file of weights, by tensor.

    Returns:
        That of the first floating tensor, or of the first of all where there is none; None without a tensor.
    """
    dtypes = [DTYPES[names[tensor]] for tensor in sorted(names) if names[tensor] in DTYPES]
    floats = (dtype for dtype in dtypes if dtype.is_floating_point and not any(n in str(dtype) for n in NARROW))
    return next(floats, next(iter(dtypes), None))


def describe_precision(model: Any, reader: CheckpointReader, written: str | None) -> dict[str, str]:
    """Dtypes of a run over a checkpoint, by what they are of; a warning where results are rounded to be written.

    Args:
        model: skeleton, in the dtype that it is computed in.
        reader: of the checkpoint.
        written: the format's name of the dtype that was asked for; None writes what is stored.
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
    """The floating dtype that most bytes have."""
    sizes: dict[str, int] = {}
    for info in infos.values():
        if info.dtype in DTYPES and DTYPES[info.dtype].is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size
    return max(sizes, key=sizes.get)
