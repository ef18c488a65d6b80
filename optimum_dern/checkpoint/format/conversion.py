"""Conversion between a checkpoint's tensor names and layouts and a model's parameters, by transformers' own rules.

This is the only module that uses transformers' loading functions, which are partly private and may change.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging


__all__ = ["NameMap", "load_tensors_", "release_"]

MTP = re.compile(r"(^|\.)mtp(\.|_)")  # multi-token prediction: no part of the model that transformers builds


class NameMap:
    """Mapping from a checkpoint's tensors to the parameters of a model, and back.

    Args:
        model: its weights need not be loaded.
        names: of the checkpoint's tensors.
    """

    def __init__(self, model: Any, names: list[str]) -> None:
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        parameters = model.state_dict()
        self.target: dict[str, str] = {}  # only tensors that the model has a parameter for
        self.filled: set[str] = set()  # parameters that a tensor is loaded into; one may be split into several
        self.whole: dict[str, str] = {}  # those of `target` that are a parameter as they are, but for the name
        patterns = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
        for name in names:
            target, found = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
            if target not in parameters and name in parameters:
                target, found = rename_source_key(name, [], [], model.base_model_prefix, parameters)
            if target in parameters:
                self.target[name] = target
                if found is None:
                    self.whole[name] = target
                self.filled |= {target, *_siblings(target, patterns.get(found, ()))}
        self._used = [entry for entry in mapping if entry.was_used()]

    def sources(self, prefix: str) -> list[str]:
        """List the checkpoint's tensors of the parameters under a prefix."""
        return [name for name, target in self.target.items() if target.startswith(prefix)]

    def original(self, model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert parameters to the names and layout that the checkpoint stores them in."""
        model._weight_conversions = self._used  # each load overwrites them with those that it has used
        return revert_weight_conversion(model, dict(parameters))

    def by_expert(self, model: Any, parameter: str, shape: Sequence[int]) -> list[list[str]] | None:
        """List the tensors that make up each expert's part of a parameter; None where all experts share one tensor.

        Args:
            model: the model that has the parameter.
            parameter: its full name.
            shape: of the parameter, experts first.
        """
        pieces = self.original(model, {parameter: torch.empty(shape, device="meta")})
        if any(piece.dim() == len(shape) for piece in pieces.values()):
            return None
        names = list(pieces)
        return [names[expert :: shape[0]] for expert in range(shape[0])]  # one run of all experts per projection

    def slots(self, model: Any, parameter: str, shape: Sequence[int]) -> list[tuple[slice, tuple[int, ...]]] | None:
        """Return where in an expert's memory each of its tensors lies, in the order of `by_expert`.

        Args:
            model: the model that has the parameter.
            parameter: its full name.
            shape: of the parameter, experts first.

        Returns:
            Per tensor its place among the expert's numbers, and its shape; None where conversion does more than
            to put the tensors one behind the other.
        """
        numbers = torch.arange(math.prod(shape[1:]), dtype=torch.int32).view(1, *shape[1:])
        slots, count = [], 0
        for piece in self.original(model, {parameter: numbers}).values():
            start = int(piece.flatten()[0])
            slots.append((slice(start, start + piece.numel()), tuple(piece.shape)))
            count += piece.numel()
            if not torch.equal(piece.flatten(), numbers.flatten()[slots[-1][0]]):
                return None
        return slots if count == numbers.numel() else None

    def is_extra_layer(self, name: str, decoder: str, count: int) -> bool:
        """Whether a tensor belongs to a multi-token prediction (MTP) layer, which transformers does not build.

        Args:
            name: of a tensor that the model has no parameter for.
            decoder: name of the list of decoder layers.
            count: how many decoder layers the model has.
        """
        # The checkpoint's name of the list of decoder layers, which may differ from the model's.
        stored = {source.split(".0.")[0] for source in self.sources(f"{decoder}.0.") if ".0." in source}
        numbers = [name.removeprefix(f"{own}.").split(".")[0] for own in stored if name.startswith(f"{own}.")]
        return bool(MTP.search(name)) or any(number.isdigit() and int(number) >= count for number in numbers)


def _siblings(parameter: str, patterns: Sequence[str]) -> Iterator[str]:
    """Yield the parameters that a converter splits its tensors into, except its first one."""
    first, *others = patterns or [""]
    match = re.search(re.escape(first).replace(r"\\1", "(.+?)"), parameter) if others else None
    for pattern in others if match else ():
        own = pattern.replace(r"\1", match[1]) if match.groups() else pattern
        yield parameter[: match.start()] + own + parameter[match.end() :]


def load_tensors_(model: Any, tensors: Mapping[str, Any], device: torch.device) -> None:
    """Load some tensors of a checkpoint into the parameters of a model.

    Args:
        model: on the meta device.
        tensors: by their names in the checkpoint; read one by one.
        device: to load to.

    Raises:
        ValueError: the tensors do not fit the model.
    """
    dtype = model.dtype
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),  # new each time: converters have state
    )
    with _loading_quietly():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config, None)
    if info.conversion_errors or info.mismatched_keys:
        problems = [f"{name}: {error}" for name, error in info.conversion_errors.items()]
        problems += [f"{name} is {found}, not {expected}" for name, found, expected in info.mismatched_keys]
        raise ValueError(f"the checkpoint does not fit the model that its config describes: {'; '.join(problems[:3])}")


def release_(module: nn.Module) -> None:
    """Free a module's weights by moving its parameters to the meta device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


@contextmanager
def _loading_quietly() -> Iterator[None]:
    """Make transformers load tensors one at a time, and without progress bars, while the context is open."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with patch_environment(hf_deactivate_async_load=1):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
