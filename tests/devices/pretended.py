"""Devices that pretend to be apart from the CPU, on its memory and arithmetic, to test placement.

A `PretendedTensor` reports "pretended:0" or "pretended:1" and holds a CPU tensor, on which all operations are done.
As on a GPU an operation takes tensors of one device; CPU tensors without dimensions may join, and CPU tensors may
index.  It stands on torch's backend for devices written in Python (PrivateUse1, torch 2.9 or newer).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .waits import count


__all__ = ["NAME", "install"]

NAME, CPU = "pretended", torch.device("cpu")
READS = {  # operations whose result, or its size, the host has to know before it can go on
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive",
    "bincount", "repeat_interleave", "linalg_lstsq", "_linalg_eigh", "_linalg_svd", "_linalg_check_errors",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_copy_from", "_to_copy"}
_library: list[torch.library.Library] = []  # the kernels live as long as it does


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
        return _run(func, args, kwargs or {})

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


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
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


class _Module:
    """What torch looks for in the module of a device type."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    manual_seed_all = synchronize = set_device = empty_cache = staticmethod(lambda *args: None)


def install() -> None:
    """Make the devices known to torch, for the rest of the process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _library.append(torch.library.Library("aten", "IMPL"))
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::") and _needs_kernel(schema):
            overloads = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
            overload = getattr(overloads, schema.overload_name or "default")
            _library[0].impl(overload, _kernel(overload), "PrivateUse1")
    _library[0].impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    torch.autograd._engine_run_backward = _in_this_thread(torch.autograd._engine_run_backward)


def _in_this_thread(run: Callable) -> Callable:
    """Let the engine of gradients have no threads, which it has for the first of such devices only."""

    def alone(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return run(*args, **kwargs)

    return alone


def _kernel(overload: Any) -> Callable:
    return lambda *args, **kwargs: _run(overload, args, kwargs)


def _needs_kernel(schema: Any) -> bool:
    """Return whether an operation makes tensors of nothing, copies, or has a kernel of its own only on the CPU."""
    name = f"{schema.name}.{schema.overload_name}".removesuffix(".")
    if not torch._C._dispatch_has_kernel(name):  # of TorchScript alone
        return False
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    composed = has(name, "CPU") and has(name, "CompositeImplicitAutograd")  # `silu_backward`: other bits if composed
    if composed or schema.name.removeprefix("aten::") in COPIES:
        return "out" not in schema.overload_name
    kinds = {argument.name: str(argument.type) for argument in schema.arguments}
    return "device" in kinds and not any("Tensor" in kind for kind in kinds.values())


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Compute attention by the CPU's own kernel; torch would compose it on such a device."""
    return _run(torch.ops.aten.scaled_dot_product_attention.default, args, kwargs)
