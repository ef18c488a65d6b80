"""`CheckpointTask`, a checked request to compress a checkpoint, and the fingerprint by which a run can be resumed."""

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
LEFT_OUT = ("dataset", "preset")  # the data has a hash of its own; presets only fill other fields
DATA_OPTIONS = ("num_samples", "self_share", "random_share", "sequence_length", "batch_size", "text_column")


@dataclass(frozen=True)
class CheckpointTask:
    """A checked request to compress a checkpoint: source, calibration data, configs and output folder."""

    model: Any  # without weights, on the meta device
    layers: Sequence[MoELayer]
    reader: CheckpointReader
    name: str  # of the source, as the user gave it
    revision: str | None
    batches: Sequence[dict]  # calibration batches; empty where no tokens are needed
    calibration: dict[str, Any]  # description of the calibration data, of this run or of the recorded statistics
    configs: Sequence[DernConfig]  # one for each result
    counts: Sequence[int]  # N of each result
    output: Path  # folder of a single result, or around the folders of several
    max_shard_size: int
    memory: MemoryPlan
    dtype: str | None  # safetensors dtype of the output; None for that of the source
    precision: dict[str, str]  # dtypes stored in the source, used for computing, and written
    processes: Processes  # that share the work
    recorded: RecordedStatistics | None = None  # statistics of an earlier run, instead of batches
    own_text: Sequence[dict] = ()  # calibration text that the model wrote, as rows of `calibration.jsonl`


def result_names(counts: Sequence[int]) -> list[str]:
    """Name the folder of each result inside the output folder; a single result is in the output folder itself."""
    return [f"{count}-experts" for count in counts] if len(counts) > 1 else ["."]


def describe_recording(task: CheckpointTask) -> dict[str, Any]:
    """Describe the model and the calibration data of recorded statistics, for the metadata published with them."""
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
    """Collect everything that a result, or several results together, depend on; a run resumes only if it is equal."""
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
        **{f"option {name}": value for name, value in {**options[0], **amounts}.items() if name not in LEFT_OUT},
        "calibration data": task.calibration["sha256"],
        "statistics": task.recorded is not None,
        "experts": experts,
        "device": task.processes.device.type,
        "max_shard_size": task.max_shard_size,
        "dtype": task.dtype,
        **{f"version of {name}": version for name, version in tool_versions().items()},
    }
