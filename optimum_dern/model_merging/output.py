"""The merged checkpoint, written part by part under another name, and under its own when all is there."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.format.sidecars import copy_companions
from ..checkpoint.format.tensor_file import DTYPES, dtype_name
from ..checkpoint.output.config_json import compressed_config
from ..checkpoint.output.shards import OutputTensor, ShardWriter, plan_shards, publish_shards
from ..evaluation.loss.streamed import StreamedCheckpoint
from ..text_files import replace_json


__all__ = ["MergedCheckpoint"]


class MergedCheckpoint:
    """A checkpoint with the tensors, shards and other files of its base, filled part by part.

    Args:
        base: whose layout it has.
        folder: to write to.
        dtype: of the tensors that are stored in the same dtype as the base's largest; by default as stored.
    """

    def __init__(self, base: StreamedCheckpoint, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.base, self.folder = base, folder
        self.names, reader = base.loader.names, base.loader.reader
        infos = {name: info for name, info in reader.infos.items() if name in self.names.target}
        usual, wanted = max(infos.values(), key=lambda info: info.size).dtype, dtype and dtype_name(dtype)
        tensors = [
            OutputTensor(name, wanted if wanted and info.dtype == usual else info.dtype, info.shape)
            for name, info in infos.items()
        ]
        self.shards = plan_shards(tensors, reader.largest_file)
        self.writer = ShardWriter(folder, self.shards)
        self.missing = set(infos)
        same: dict[int, list[str]] = {}
        for name, parameter in base.skeleton.named_parameters(remove_duplicate=False):
            same.setdefault(id(parameter), []).append(name)
        self.tied = {name: others for name, *others in same.values() if others}

    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Write some parameters, in the names and layout of the base."""
        model, together = self.base.skeleton, {}
        for name, value in parameters.items():
            groups = self.names.by_expert(model, name, value.shape) if value.dim() == 3 else None
            for expert, group in enumerate(groups or []):  # one by one, as conversion copies them
                pieces = self.names.original(model, {name: value[expert : expert + 1]}).values()
                self._write(dict(zip(group, pieces, strict=True)))
            if groups is None:
                together |= dict.fromkeys([name, *self.tied.get(name, ())], value)
        self._write(self.names.original(model, together))

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors.keys() & self.missing:
            tensor, place = tensors[name], self.writer.places[name]
            if tuple(tensor.shape) != place.shape:  # fused, and stored transposed
                tensor = tensor.transpose(-1, -2)
            self.writer.write(name, tensor.to("cpu", DTYPES[place.dtype]))
            self.missing.remove(name)

    def finish(self) -> None:
        """Copy what is no parameter, such as routing biases, from the base, and write its other files."""
        model, reader = self.base.skeleton, self.base.loader.reader
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in sorted(self.missing):
            if self.names.target[name] in parameters:
                raise RuntimeError(f"{name} was not merged; merge this model in memory, without --layerwise")
            self._write({name: reader.read(name)})
        reader.close()
        self.writer.flush()
        self.writer.close()
        publish_shards(self.folder, self.shards, self.folder)
        copy_companions(reader.folder, self.folder)
        config = compressed_config(model.config.to_dict(), reader.config, model.config)
        replace_json(self.folder / "config.json", config)
