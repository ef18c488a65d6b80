"""Compress a checkpoint on disk into another one, a decoder layer in memory at a time, with resume."""

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.description import describe_calibration, recordable_dataset
from ..checkpoint import WORK_NAME
from ..checkpoint.conversion import NameMap
from ..checkpoint.layers import CheckpointLayers
from ..checkpoint.loader import PartLoader
from ..checkpoint.manifest import Manifest, only_process
from ..checkpoint.output_plan import OutputPlan, plan_output
from ..checkpoint.publishing import MANIFEST_NAME, write_json, write_report, write_sidecars
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.shards import ShardWriter, plan_shards
from ..checkpoint.sidecars import copy_companions
from ..config import DernConfig
from ..models.size import measure_model, predict_size
from ..models.structure import MoELayer
from ..models.view import write_counts_
from ..reporting.report import CompressionReport
from ..versions import tool_versions
from .distributed import ALONE, Processes
from .layers import compress_layers_
from .progress import peak_memory_bytes


__all__ = ["CheckpointTask", "compress_checkpoint", "working_folder"]


@dataclass(frozen=True)
class CheckpointTask:
    """A checked request: what is compressed into what."""

    model: Any  # skeleton
    layers: Sequence[MoELayer]
    reader: CheckpointReader
    name: str  # of the source, as the user gave it
    revision: str | None
    batches: Sequence[dict]
    config: DernConfig
    num_experts: int
    output: Path
    max_shard_size: int
    spill: bool  # hidden states into a file
    dtype: str | None  # of the output, by the format's name; None as stored
    processes: Processes  # that share the work


def compress_checkpoint(task: CheckpointTask) -> CompressionReport:
    """Compress, write, and publish into the output folder.

    Args:
        task: checked.

    Returns:
        The report of the whole run, layers of earlier, interrupted runs included.

    Raises:
        ValueError: an unfinished run in the output folder that differs.
        RuntimeError: another run is at the output folder.
        ProcessFailed: another process of this run has ended.
    """
    processes = task.processes
    names = NameMap(task.model, list(task.reader.infos))
    plan = plan_output(task.model, task.layers, task.reader, names, task.num_experts, task.dtype)
    shards = plan_shards(plan.tensors, task.max_shard_size)
    calibration = describe_calibration(task.config.dataset, task.batches)
    with working_folder(task.output, processes) as work:
        manifest = processes.on_main(lambda: Manifest(work, _fingerprint(task, calibration)))
        manifest.writes = processes.is_main
        processes.on_main(manifest.save)
        if manifest.report is None:
            _check_shared(manifest)
            writer = processes.main_first(lambda: ShardWriter(work, shards))
            manifest.complete(_compress(task, names, plan, writer, manifest, calibration).to_dict())
        report = CompressionReport.from_dict(processes.on_main(lambda: manifest.report))
        write_counts_(task.model, task.layers, task.num_experts)
        processes.on_main(lambda: _publish(task, report, ShardWriter(work, shards, complete=True), manifest))
    return report


def _compress(
    task: CheckpointTask,
    names: NameMap,
    plan: OutputPlan,
    writer: ShardWriter,
    manifest: Manifest,
    calibration: dict[str, Any],
) -> CompressionReport:
    started, model, layers = time.perf_counter(), task.model, task.layers
    before, after = measure_model(model, layers), predict_size(model, layers, task.num_experts)
    loader = PartLoader(model, layers, task.reader, names, task.processes.device)
    provider = CheckpointLayers(loader, layers, plan, writer, manifest, task.num_experts)
    spill = writer.folder / f"hidden-{task.processes.rank}.bin" if task.spill else None
    options = task.config, task.num_experts, provider, spill, task.processes
    reports = compress_layers_(model, layers, task.batches, *options)
    provider.copy_rest()
    writer.close()
    return CompressionReport(
        source=task.name,
        revision=task.revision,
        model_type=model.config.model_type,
        method=task.config.method,
        config={**task.config.to_dict(), "dataset": recordable_dataset(task.config.dataset)},
        calibration=calibration,
        before=before,
        after=after,
        layers=reports,
        versions=tool_versions(),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(task.processes.device),
    )


@contextmanager
def working_folder(output: Path, processes: Processes = ALONE) -> Iterator[Path]:
    """The working folder inside an output folder, kept from other runs; removed when the work is done."""
    with ExitStack() as stack:
        yield processes.on_main(lambda: stack.enter_context(_locked(output / WORK_NAME)))


@contextmanager
def _locked(work: Path) -> Iterator[Path]:
    work.mkdir(parents=True, exist_ok=True)
    with only_process(work):
        yield work
        shutil.rmtree(work)


def _check_shared(manifest: Manifest) -> None:
    """Layers of an earlier run are read back by every process."""
    if not manifest.path.exists():
        raise FileNotFoundError(
            f"a process of this run does not find {manifest.path}; machines need an output folder that they share"
        )


def _publish(task: CheckpointTask, report: CompressionReport, writer: ShardWriter, manifest: Manifest) -> None:
    """Everything into its final place; what makes the folder a checkpoint comes last."""
    stale = {*task.output.glob("model*.safetensors"), *task.output.glob("model*.index.json")}
    copy_companions(task.reader.folder, task.output)
    write_json(task.output / MANIFEST_NAME, {"tensors": dict(sorted(manifest.tensors.items()))})
    write_sidecars(task.model, task.output, report, task.reader.config)
    write_report(task.output, report)  # the card, too, where an earlier checkpoint has left one
    for file in stale - {task.output / name for name in writer.plan}:
        file.unlink()
    writer.publish(task.output)


def _fingerprint(task: CheckpointTask, calibration: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, info in sorted(task.reader.stored.items()):
        stat = info.path.stat()
        digest.update(f"{name} {info.dtype} {info.shape} {info.start} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return {
        "source": task.name,
        "revision": task.revision,
        "weights": digest.hexdigest(),
        "model config": hashlib.sha256((task.reader.folder / "config.json").read_bytes()).hexdigest(),
        **{f"option {name}": value for name, value in task.config.to_dict().items() if name != "dataset"},
        "calibration data": calibration["sha256"],
        "experts": task.num_experts,
        "device": task.processes.device.type,
        "max_shard_size": task.max_shard_size,
        "dtype": task.dtype,
        **{f"version of {name}": version for name, version in tool_versions().items()},
    }
