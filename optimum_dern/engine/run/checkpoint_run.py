"""What is asked of a run over a checkpoint, once it is checked, and what makes two runs the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.format.reader import CheckpointReader
from ...checkpoint.source.recorded import RecordedStatistics, identify_model
from ...config import DernConfig
from ...machine.processes import Processes
from ...models.moe.structure import MoELayer
from ...results.description import recordable_dataset
from ...results.public_names import public_source
from ...versions import tool_versions
from ..cost.memory import MemoryPlan


__all__ = ["CheckpointTask", "describe_recording", "fingerprint", "result_names"]

AMOUNTS = ("num_experts", "sparsity")
DATA_OPTIONS = ("num_samples", "sequence_length", "batch_size", "text_column")


@dataclass(frozen=True)
class CheckpointTask:
    """A checked request: what is compressed into what."""

    model: Any  # skeleton
    layers: Sequence[MoELayer]
    reader: CheckpointReader
    name: str  # of the source, as the user gave it
    revision: str | None
    batches: Sequence[dict]  # none where no token is needed
    calibration: dict[str, Any]  # what they are, or were
    configs: Sequence[DernConfig]  # one for each result
    counts: Sequence[int]  # N of each result
    output: Path  # of a single result, or the folder of several
    max_shard_size: int
    memory: MemoryPlan
    dtype: str | None  # of the output, by the format's name; None as stored
    precision: dict[str, str]  # dtypes: stored in the source, computed in, written
    processes: Processes  # that share the work
    recorded: RecordedStatistics | None = None  # of an earlier run, instead of batches


def result_names(counts: Sequence[int]) -> list[str]:
    """Folders of the results inside the output folder, which is that of a single one."""
    return [f"{count}-experts" for count in counts] if len(counts) > 1 else ["."]


def describe_recording(task: CheckpointTask) -> dict[str, Any]:
    """What recorded statistics belong to, and how their data was drawn; it is published."""
    options = task.configs[0].to_dict()
    return {
        "source": public_source(task.name),
        "revision": task.revision,
        **identify_model(task.reader, task.dtype),
        "calibration data": task.calibration["sha256"],
        "calibration": task.calibration,
        "options": {
            "dataset": recordable_dataset(task.configs[0].dataset),
            **{name: options[name] for name in DATA_OPTIONS},
        },
        "versions": tool_versions(),
    }


def fingerprint(task: CheckpointTask, configs: Sequence[DernConfig], experts: int | list[int]) -> dict[str, Any]:
    """What a result depends on, or, for several configs, what all results together do."""
    digest = hashlib.sha256()
    for name, info in sorted(task.reader.stored.items()):
        stat = info.path.stat()
        digest.update(f"{name} {info.dtype} {info.shape} {info.start} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    options = [config.to_dict() for config in configs]
    amounts = {name: [values[name] for values in options] for name in AMOUNTS} if len(options) > 1 else {}
    return {
        "source": task.name,
        "revision": task.revision,
        "weights": digest.hexdigest(),
        "model config": hashlib.sha256((task.reader.folder / "config.json").read_bytes()).hexdigest(),
        **{f"option {name}": value for name, value in {**options[0], **amounts}.items() if name != "dataset"},
        "calibration data": task.calibration["sha256"],
        "statistics": task.recorded is not None,
        "experts": experts,
        "device": task.processes.device.type,
        "max_shard_size": task.max_shard_size,
        "dtype": task.dtype,
        **{f"version of {name}": version for name, version in tool_versions().items()},
    }
