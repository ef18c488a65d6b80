"""Compression while transformers loads a model: as a `quantization_config`, a facade class, and an opt-in patch.

transformers calls a registered quantizer on the model without weights, and again once they are loaded.  The first call
checks the request before any weight is read; the second compresses, and then removes all marks of quantisation, so
that the loaded model is a plain one.
"""

import copy
import tempfile
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.source.provenance import LOCATING, OWN_CODE, locating_options, location_options
from ..compressor import DernCompressor
from ..config import DernConfig
from ..machine.torch_state import check_precision


__all__ = ["DernModelForCausalLM", "DernQuantizer", "patch_transformers", "unpatch_transformers"]

register_quantization_config("dern")(DernConfig)


@register_quantizer("dern")
class DernQuantizer(HfQuantizer):
    """Quantizer, registered with transformers, that compresses a model when it is loaded."""

    requires_calibration = False  # True would refuse every checkpoint that is not compressed yet

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse unsupported devices before anything is loaded, also offload to disk, which keeps original weights."""
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in () if self.pre_quantized else devices:
            check_precision(device)
        if "disk" in devices:
            raise ValueError(
                "device_map puts weights on disk, where compression cannot replace them; load without disk offload, "
                "or compress the checkpoint on disk first: optimum-dern compress MODEL OUTPUT"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            return
        self.remove_quantization_config(model)  # transformers marks the model because there is a quantizer
        given = getattr(self.quantization_config, "loading", {})
        model.dern_loading = {**location_options(model.config.name_or_path, checkpoint_files), **given}
        self.compressor = DernCompressor(self.quantization_config)
        self.batches = self.compressor.prepare(model, trust_remote_code=_trusts_code(self.quantization_config, model))
        # With a quantizer, transformers before 5.23 installs tensors of any shape.
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)
        if self.pre_quantized:  # a config.json marked "dern": its weights are compressed already
            return
        for name, tensor in model.state_dict().items():
            if tensor.shape != self.shapes[name]:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} in the checkpoint, but its config asks for "
                    f"{tuple(self.shapes[name])}; the checkpoint and its config.json do not belong together"
                )
        self.compressor.compress_model(model, batches=self.batches)
        del model.dern_loading

    def is_serializable(self, **kwargs: Any) -> bool:
        """Return True: compressed models are saved like all others."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: compressed models are trained like all others."""
        return True


class DernModelForCausalLM:
    """`AutoModelForCausalLM` with a `dern_config` argument; it returns a plain transformers model."""

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} is loaded with {type(self).__name__}.from_pretrained(model, ...)")

    @classmethod
    def from_pretrained(
        cls, model: str, *args: Any, dern_config: DernConfig | dict | None = None, **kwargs: Any
    ) -> Any:
        """Load a checkpoint and compress it.

        Args:
            model: folder or Hub id.
            *args: of `AutoModelForCausalLM.from_pretrained`.
            dern_config: a `DernConfig`, or its fields as a dict; None loads the model as it is.
            **kwargs: of `AutoModelForCausalLM.from_pretrained`; with another `quantization_config`, the checkpoint is
                compressed on disk first, in a temporary folder, and the result is loaded quantised.

        Returns:
            The model in its own transformers class, in evaluation mode, with the report as `model.dern_report`.

        Raises:
            ValueError: the model, expert count or dataset cannot be used; raised before weights are loaded.
        """
        if dern_config is not None and kwargs.get("quantization_config") is not None:
            return _compress_then_quantise(model, *args, dern_config=dern_config, **kwargs)
        return AutoModelForCausalLM.from_pretrained(model, *args, **_with_quantization_config(kwargs, dern_config))


def _compress_then_quantise(model: str, *args: Any, dern_config: DernConfig | dict, **kwargs: Any) -> Any:
    """Compress into a temporary folder and load the result quantised, since a load takes one quantizer only."""
    compressor = DernCompressor(_as_config(dern_config))
    source = {name: kwargs.pop(name) for name in ("revision", *LOCATING) if name in kwargs}
    source.pop("proxies", None)  # the Hub's client reads them from the environment
    trust = {OWN_CODE: kwargs[OWN_CODE]} if OWN_CODE in kwargs else {}
    with tempfile.TemporaryDirectory(prefix="dern-") as folder:
        report = compressor.compress_checkpoint(model, folder, **source, **trust)
        loaded = AutoModelForCausalLM.from_pretrained(folder, *args, **kwargs)
    loaded.name_or_path = loaded.config.name_or_path = str(model)
    loaded.dern_report = report
    return loaded


_ORIGINAL = AutoModelForCausalLM.__dict__["from_pretrained"]


def patch_transformers() -> None:
    """Make `AutoModelForCausalLM.from_pretrained(..., dern_config=...)` work in this process, until unpatched.

    Every Auto class has its own copy of `from_pretrained`, so only this one is replaced.
    """

    def from_pretrained(cls, *args: Any, dern_config: DernConfig | dict | None = None, **kwargs: Any) -> Any:
        return _ORIGINAL.__func__(cls, *args, **_with_quantization_config(kwargs, dern_config))

    from_pretrained.__doc__ = _ORIGINAL.__func__.__doc__
    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)


def unpatch_transformers() -> None:
    """Undo `patch_transformers`."""
    AutoModelForCausalLM.from_pretrained = _ORIGINAL


def _with_quantization_config(kwargs: dict[str, Any], dern_config: DernConfig | dict | None) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` with the config as `quantization_config`."""
    if dern_config is None:
        return kwargs
    if kwargs.get("quantization_config") is not None:
        raise ValueError(
            "both dern_config and quantization_config are given; DernModelForCausalLM.from_pretrained takes both: it "
            "compresses first, and loads the result quantised"
        )
    config = copy.copy(_as_config(dern_config))
    config.loading = locating_options(kwargs) | ({OWN_CODE: kwargs[OWN_CODE]} if OWN_CODE in kwargs else {})
    return {**kwargs, "quantization_config": config}


def _trusts_code(config: DernConfig, model: Any) -> bool:
    """Whether the call that loads a model allows code of its checkpoint to run, as far as a quantizer can tell.

    transformers does not pass `trust_remote_code` to quantizers; a model of a custom class shows it, too.
    """
    own_code = any(type(part).__module__.startswith("transformers_modules.") for part in (model, model.config))
    return own_code or bool(getattr(config, "loading", {}).get(OWN_CODE))


def _as_config(dern_config: DernConfig | dict) -> DernConfig:
    return dern_config if isinstance(dern_config, DernConfig) else DernConfig(**dern_config)
