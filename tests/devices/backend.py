"""Registration of the pretended devices with torch, for the rest of a process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .pretended import COPIES, NAME, run


__all__ = ["install"]

_library: list[torch.library.Library] = []  # the kernels live as long as it does


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


def _in_this_thread(backward: Callable) -> Callable:
    """Let the engine of gradients have no threads, which it has for the first of such devices only."""

    def alone(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return backward(*args, **kwargs)

    return alone


def _kernel(overload: Any) -> Callable:
    return lambda *args, **kwargs: run(overload, args, kwargs)


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
    return run(torch.ops.aten.scaled_dot_product_attention.default, args, kwargs)
