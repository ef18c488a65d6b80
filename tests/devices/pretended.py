"""Devices that pretend to be apart from the CPU, on its memory and arithmetic, to test placement.

A `PretendedTensor` reports "pretended:0" or "pretended:1" and holds a CPU tensor, on which all operations are done.
As on a GPU an operation takes tensors of one device; CPU tensors without dimensions may join, and CPU tensors may
index.  It stands on torch's backend for devices written in Python (PrivateUse1, torch 2.9 or newer).
"""

from typing import Any

import torch
from torch import Tensor

from .waits import count


__all__ = ["COPIES", "NAME", "PretendedTensor", "run"]

NAME, CPU = "pretended", torch.device("cpu")
READS = {  # operations whose result, or its size, the host has to know before it can go on
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive",
    "bincount", "repeat_interleave", "linalg_lstsq", "_linalg_eigh", "_linalg_svd", "_linalg_check_errors",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_copy_from", "_to_copy"}


class PretendedTensor(Tensor):
    """Reports a pretended device; `held` has the data, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "PretendedTensor":
        form = held.size(), held.stride(), held.storage_offset()
        made = Tensor._make_wrapper_subclass(cls, *form, dtype=held.dtype, device=device)
        made.held = held.detach() if held.requires_grad else held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        where = self.device if device is None else device
        return torch.tensor(data, dtype=dtype or self.dtype, device=where, requires_grad=requires_grad)

    def as_subclass(self, cls: type) -> "PretendedTensor":
        return PretendedTensor.__new__(type(cls.__name__, (cls, PretendedTensor), {}), self.held, self.device)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.become_(value)

    def become_(self, other: "PretendedTensor") -> None:
        """Take over another tensor's shape, dtype and data."""
        with torch._C._DisableTorchDispatch():
            Tensor.data.__set__(self, other)
        self.held = other.held

    def __deepcopy__(self, memo: dict) -> "PretendedTensor":
        made = PretendedTensor(self.held.clone(), self.device).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True
        return memo.setdefault(id(self), made)


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Do an operation on what its tensors hold; the results are where it is told, or else where its tensors are."""
    name, tensors = func._schema.name.removeprefix("aten::"), []
    indices = _flat(args[1]) if name in INDEXING else []
    inner_args = [_held(value, tensors) for value in args]
    inner = {key: _held(value, tensors) for key, value in kwargs.items()}
    wrappers = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, PretendedTensor)}
    target = _copied_to(name, args, kwargs) if name in COPIES else _told(kwargs, wrappers)
    if name not in COPIES:
        _check_devices(func, [t for t in tensors if not any(t is index for index in indices)])
        masks = any(isinstance(i, PretendedTensor) and i.dtype == torch.bool for i in indices)
        if masks or (wrappers and name in READS):
            count("read")
        elif wrappers and any(index.device == CPU for index in indices):
            count("up")
    if inner.get("device") is not None and target.type == NAME:
        inner["device"] = CPU
    if name == "histc":  # a GPU counts integers, too
        inner_args[0] = inner_args[0].double()
    result = func(*inner_args, **inner)
    for tensor in wrappers.values():  # changed in place, as by `squeeze_`
        if (tensor.held.shape, tensor.held.stride()) != (tensor.shape, tensor.stride()):
            tensor.become_(PretendedTensor(tensor.held, tensor.device))
    return _wrapped(result, wrappers, target) if target.type == NAME else result


def _copied_to(name: str, args: tuple, kwargs: dict) -> torch.device:
    """Return where a copy goes to; one from or to the CPU counts as a wait."""
    source = args[0] if name != "copy_" else args[1]
    if name == "_to_copy":
        target = _numbered(kwargs.get("device") or source.device)
    else:
        target = args[0 if name == "copy_" else 1].device
    if target.type != source.device.type and "meta" not in (target.type, source.device.type):
        count("up" if target.type == NAME else "down")
    return target


def _told(kwargs: dict, wrappers: dict[int, PretendedTensor]) -> torch.device:
    """Return where the result of an operation is: where it is told to be, or else where its tensors are."""
    if kwargs.get("device") is not None:
        return _numbered(kwargs["device"])
    return next((tensor.device for tensor in wrappers.values()), CPU)


def _numbered(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(NAME, 0) if device.type == NAME and device.index is None else device


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Refuse what a GPU's kernels refuse."""
    found = {str(tensor.device) for tensor in tensors if tensor.dim() or tensor.device != CPU}
    if len(found) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(found)} ({func})")


def _flat(value: Any) -> list[Tensor]:
    return [part for part in value if isinstance(part, Tensor)]


def _held(value: Any, tensors: list[Tensor]) -> Any:
    """Return the same with what its tensors hold; the tensors are added to a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.held if isinstance(value, PretendedTensor) else value
    return [_held(part, tensors) for part in value] if isinstance(value, list | tuple) else value


def _wrapped(value: Any, known: dict[int, PretendedTensor], device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else PretendedTensor(value, device)
    return type(value)(_wrapped(part, known, device) for part in value) if isinstance(value, list | tuple) else value
