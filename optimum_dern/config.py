"""`DernConfig`: the options of a compression as a quantization config of transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .checks.arguments import check_argument
from .options import DernOptions


__all__ = ["DernConfig"]


class DernConfig(DernOptions, QuantizationConfigMixin):
    """Config of a compression, accepted by transformers as `quantization_config`.

    Args:
        **fields: see `DernOptions`; fields left at None that the preset names take its value.

    Raises:
        ValueError: a value outside its range; the message names the legal ones.
        TypeError: an unknown field.
    """

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Create a config from a dictionary made by `to_dict`, as transformers does."""
        check_argument("the config", config_dict, Mapping, "a dict of DernConfig fields")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values; an in-memory dataset is replaced by its description."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["similarity_weights"] = list(self.similarity_weights)
        if not _is_jsonable_dataset(self.dataset):
            from .results.description import describe_dataset

            values["dataset"] = describe_dataset(self.dataset)
        return values


def _is_jsonable_dataset(dataset: Any) -> bool:
    if dataset is None or isinstance(dataset, str):
        return True
    if isinstance(dataset, Mapping):
        return all(isinstance(name, str) and isinstance(weight, int | float) for name, weight in dataset.items())
    return isinstance(dataset, list) and all(isinstance(row, str) for row in dataset)
