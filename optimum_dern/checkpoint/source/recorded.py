"""`dern_statistics.safetensors`: expert statistics of the original model, recorded by a pass with oneshot calibration.

They let further runs choose experts, for other counts and methods, without another pass.  The file's metadata tells
which model and which calibration data they belong to.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...core.layer.statistics import ExpertStatistics
from ...text_files import parse_object
from ..format.reader import CheckpointReader
from ..format.tensor_file import TensorInfo, create_file, dtype_name, read_header, read_tensor, write_bytes
from ..format.weight_files import SINGLE_NAME, write_index


__all__ = ["STATISTICS_NAME", "RecordedStatistics", "StatisticsWriter", "identify_model", "publish_statistics"]

STATISTICS_NAME, KEY = "dern_statistics.safetensors", "dern_statistics"
FIELDS = [field.name for field in fields(ExpertStatistics)]
PAIRS = ("coactivation", "together")  # fields with an entry for every pair of experts
SAMPLE = 64  # bytes of every tensor (of every expert in a fused tensor) that `identify_model` hashes


class StatisticsWriter:
    """Writes expert statistics to a file layer by layer; those of an interrupted run are kept.

    Args:
        folder: working folder.
        positions: of all MoE layers.
        describe: returns the JSON metadata (model and calibration data); called when the first layer is written.
    """

    def __init__(self, folder: Path, positions: Collection[int], describe: Callable[[], Mapping[str, Any]]) -> None:
        self.path, self.positions, self.describe = folder / STATISTICS_NAME, positions, describe
        self.places: dict[str, TensorInfo] = {}

    def write(self, position: int, statistics: ExpertStatistics) -> None:
        """Write the statistics of one layer to disk."""
        tensors = {name: torch.as_tensor(value).cpu() for name, value in vars(statistics).items()}
        if not self.path.exists():
            self._create(tensors)
        self.places = self.places or read_header(self.path)
        with self.path.open("r+b") as file:
            for name, tensor in tensors.items():
                write_bytes(self.places[f"{position}.{name}"], file.fileno(), tensor)
            os.fsync(file)

    def _create(self, tensors: Mapping[str, torch.Tensor]) -> None:
        forms = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        places = [(f"{position}.{name}", *form) for position in self.positions for name, form in forms.items()]
        create_file(temporary := self.path.with_suffix(".tmp"), places, {KEY: json.dumps(self.describe())})
        os.replace(temporary, self.path)


class RecordedStatistics:
    """Expert statistics recorded by an earlier run.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a statistics file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no statistics file {str(path)!r}; give a {STATISTICS_NAME}")
        try:
            with safe_open(self.path, "pt") as file:
                self.description = parse_object((file.metadata() or {})[KEY].encode(), f"the metadata of {self.path}")
            self.places = read_header(self.path)
            if not all(isinstance(self.description[part], dict) for part in ("options", "calibration")):
                raise ValueError("its metadata names neither options nor calibration data")
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a {STATISTICS_NAME} ({error!r:.200}); record it again") from error

    def read(self, position: int) -> ExpertStatistics:
        """Read the statistics of one layer."""
        with self.path.open("rb") as file:
            values = {name: read_tensor(self.places[f"{position}.{name}"], file.fileno()) for name in FIELDS}
        return ExpertStatistics(**values | {"tokens": int(values["tokens"])})

    def check(self, expected: Mapping[str, Any], positions: Collection[int]) -> None:
        """Refuse statistics of another model or other calibration data.

        Args:
            expected: entries that the file's metadata must have.
            positions: of the MoE layers that statistics are needed for.

        Raises:
            ValueError: an entry differs or a layer is missing; the message names it.
        """
        different = [name for name, value in expected.items() if self.description.get(name) != value]
        if different:
            raise ValueError(
                f"{self.path} was recorded with another {' and another '.join(different)} "
                f"(it is of {self.description.get('source')!r}); record it again, or leave statistics out"
            )
        names = (f"{position}.{name}" for position in positions for name in FIELDS)
        missing = [name for name in names if name not in self.places]
        if missing:
            raise ValueError(f"{self.path} was written by another release: it has no {missing[0]}; record it again")
        for position in positions:
            self._check_shapes(position)

    def _check_shapes(self, position: int) -> None:
        """Refuse a layer's tensors that are not those of one number of experts."""
        forms = {name: self.places[f"{position}.{name}"].shape for name in FIELDS}
        experts = (forms["count"] or (0,))[0]
        for name, shape in forms.items():
            wanted = () if name == "tokens" else (experts, experts) if name in PAIRS else (experts,)
            if (shape[:1] if name == "output_sum" else shape) != wanted:
                raise ValueError(f"{self.path} has {position}.{name} with the shape {shape}; record it again")


def identify_model(reader: CheckpointReader, dtype: str | None) -> dict[str, Any]:
    """Make a model's identity, independent of where its files are: a hash of samples of its weights, config and dtype.

    Args:
        reader: of the checkpoint.
        dtype: of the computation, where it is not the config's.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        paths = {info.path for info in reader.stored.values()}
        files = {path: stack.enter_context(path.open("rb")).fileno() for path in paths}
        for name, info in sorted(reader.stored.items()):
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            parts = info.shape[0] if len(info.shape) > 2 else 1
            for part in range(parts):
                middle = info.size * (2 * part + 1) // (2 * parts)
                digest.update(os.pread(files[info.path], min(SAMPLE, info.size - middle), info.start + middle))
    config = hashlib.sha256((reader.folder / "config.json").read_bytes()).hexdigest()
    return {"model (weights)": digest.hexdigest(), "model config": config, "dtype": dtype}


def publish_statistics(work: Path, output: Path) -> None:
    """Move the finished statistics file into the output folder.

    Args:
        work: working folder, in which there may be no such file.
        output: folder; weights in a single file get an index there, so that readers that otherwise load every
            safetensors file of a folder as weights (vLLM) do not load the statistics.
    """
    if (work / STATISTICS_NAME).exists():
        os.replace(work / STATISTICS_NAME, output / STATISTICS_NAME)
    if (output / STATISTICS_NAME).exists() and (output / SINGLE_NAME).exists():
        infos = read_header(output / SINGLE_NAME)
        write_index(output, dict.fromkeys(infos, SINGLE_NAME), sum(info.size for info in infos.values()))
