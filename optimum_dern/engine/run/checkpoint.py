"""Compress a checkpoint on disk into one or several others, one decoder layer in memory at a time, with resume."""

import copy
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from ...checkpoint.format.conversion import NameMap
from ...checkpoint.format.sidecars import companions, copy_companions, left_out, remove_stale
from ...checkpoint.output.folder import WORK_NAME, set_card_aside
from ...checkpoint.output.manifest import Manifest, only_process, read_manifest
from ...checkpoint.output.plan import OutputPlan, plan_output
from ...checkpoint.output.publishing import MANIFEST_NAME, OWN_TEXT_NAME, write_report, write_sidecars
from ...checkpoint.output.shards import OutputTensor, ShardWriter, check_room, plan_shards, publish_shards
from ...checkpoint.output.tensors import CheckpointOutput, copy_rest, copy_when_read_
from ...checkpoint.source.loader import PartLoader
from ...checkpoint.source.recorded import StatisticsWriter, publish_statistics
from ...config import DernConfig
from ...data.files import listed
from ...errors import is_deliberate
from ...machine.processes import Processes
from ...machine.scratch import open_workspace
from ...machine.threads import computing_with, threads_of_run
from ...models.moe.structure import layers_by_position
from ...models.moe.view import write_counts_
from ...models.size import measure_model, predict_size
from ...models.width import write_width_
from ...results.report import CompressionReport
from ...text_files import replace_json
from ..layer.narrowing import written_width
from ..walk.decoder import compress_layers_, compress_unseen_layers_
from ..walk.recipe import Recipe
from .checkpoint_run import CheckpointTask, describe_recording, fingerprint, result_names
from .run_report import make_task_report


__all__ = [
    "check_shared",
    "compress_checkpoint",
    "open_manifest",
    "opened",
    "publish",
    "warn_left_out",
    "working_folder",
]

logger = getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """One of the output checkpoints of a task, with its manifest and its shards."""

    config: DernConfig
    num_experts: int
    width: int
    folder: Path
    plan: OutputPlan
    shards: dict[str, list[OutputTensor]]
    manifest: Manifest


def compress_checkpoint(task: CheckpointTask) -> list[CompressionReport]:
    """Compress a checkpoint layer by layer into the output folder, resuming an interrupted run of the same task.

    Args:
        task: the checked task.

    Returns:
        The report of each result, including layers compressed by earlier, interrupted runs.

    Raises:
        ValueError: the output folder has an unfinished run of a different task.
        RuntimeError: another run is using the output folder.
        ProcessFailed: another process of this run has ended.
    """
    processes = task.processes
    names = NameMap(task.model, list(task.reader.infos))
    with working_folder(task.output, processes) as work:
        results = _open_results(task, names, work)
        unfinished = [result for result in results if result.manifest.report is None]
        if unfinished:
            plans = {result.manifest.path.parent: result.shards for result in unfinished}
            processes.on_main(lambda: check_room(task.output, plans))
            with opened(task, work) as opened_task:
                _compress(opened_task, names, work, unfinished)
        reports = [
            CompressionReport.from_dict(processes.on_main(lambda r=result: r.manifest.report)) for result in results
        ]
        for report in reports:
            report.source_folder, report.own_text = task.reader.folder.resolve(), list(task.own_text)
        processes.on_main(lambda: _publish_all(task, results, reports, work))
    return reports


@contextmanager
def opened(task: CheckpointTask, work: Path) -> Iterator[CheckpointTask]:
    """Compute with the threads of the run, and in the memory that is planned for it, while the context is open."""
    threads = task.processes.on_main(lambda: threads_of_run(work / "threads"))
    in_files = work if task.memory.experts_in_file else None
    workspace = open_workspace(in_files, task.memory.mapped, task.memory.max_elements)
    with computing_with(threads), workspace as workspace:
        yield replace(task, layers=[replace(layer, workspace=workspace) for layer in task.layers])


def _open_results(task: CheckpointTask, names: NameMap, work: Path) -> list[Result]:
    """Open the results of a task, each with the manifest that an earlier, interrupted run may have left."""
    processes, several = task.processes, len(task.counts) > 1
    if several:  # a manifest of the run as a whole; each result has one of its own, too
        processes.on_main(lambda: Manifest(work, fingerprint(task, task.configs, list(task.counts))).save())
    results = []
    for config, count, name in zip(task.configs, task.counts, result_names(task.counts), strict=True):
        manifest = processes.on_main(
            lambda c=config, n=count, f=work / name: open_manifest(f, fingerprint(task, [c], n))
        )
        manifest.writes = processes.is_main
        width = written_width(task.layers[0], config)
        plan = plan_output(task.model, task.layers, task.reader, names, count, width, task.dtype)
        shards = plan_shards(plan.tensors, task.max_shard_size)
        results.append(Result(config, count, width, task.output / name, plan, shards, manifest))
    return results


def open_manifest(folder: Path, fingerprint: dict[str, Any]) -> Manifest:
    """Open the manifest of a working folder, with what an earlier, interrupted run of the same kind has noted."""
    folder.mkdir(exist_ok=True)
    manifest = Manifest(folder, fingerprint)
    manifest.save()
    return manifest


def _compress(task: CheckpointTask, names: NameMap, work: Path, results: Sequence[Result]) -> None:
    """Compress all layers, write all tensors of these results into the working folder, and record their reports."""
    started, model, layers, processes = time.perf_counter(), task.model, task.layers, task.processes
    before = measure_model(model, layers)
    after = [predict_size(model, layers, result.num_experts, result.width) for result in results]
    loader = PartLoader(model, layers, task.reader, names, processes.device)
    outputs = [_open_output(task, loader, result) for result in results]
    recipes = [Recipe(r.config, r.num_experts, output) for r, output in zip(results, outputs, strict=True)]
    copy_when_read_(task.reader, outputs)
    if task.batches:
        writer = StatisticsWriter(work, layers_by_position(model, layers), lambda: describe_recording(task))
        keep = writer.write if processes.is_main else None
        spill = work if task.memory.spilled else None
        reports = compress_layers_(model, layers, task.batches, recipes, loader, spill, processes, keep)
    else:
        recorded = task.recorded and task.recorded.read
        reports = compress_unseen_layers_(model, layers, recipes, recorded, loader, processes)
    copy_rest(task.reader, outputs)
    for result, size, layer_reports in zip(results, after, reports, strict=True):
        report = make_task_report(task, result.config, (before, size), layer_reports, started)
        result.manifest.complete(report.to_dict())


def _open_output(task: CheckpointTask, loader: PartLoader, result: Result) -> CheckpointOutput:
    check_shared(result.manifest)
    writer = task.processes.main_first(lambda: ShardWriter(result.manifest.path.parent, result.shards))
    size = result.num_experts, result.width
    return CheckpointOutput(loader, task.layers, result.plan, writer, result.manifest, *size)


@contextmanager
def working_folder(output: Path, processes: Processes) -> Iterator[Path]:
    """Open the working folder inside an output folder, locked against other runs; removed on success."""
    with ExitStack() as stack:
        yield processes.on_main(lambda: stack.enter_context(_locked(output / WORK_NAME)))


@contextmanager
def _locked(work: Path) -> Iterator[Path]:
    made = [folder for folder in (work, work.parent) if not folder.exists()]
    work.mkdir(parents=True, exist_ok=True)
    with only_process(work):
        if not _is_begun(work):
            _empty(work)
        try:
            yield work
        except Exception as error:
            if is_deliberate(error) and not _is_begun(work):
                _discard(work, made)
            raise
        shutil.rmtree(work)


def _discard(work: Path, made: Sequence[Path]) -> None:
    """Remove what a run has left that was refused before its first layer; text that the model wrote is kept."""
    _empty(work)
    if not (work / OWN_TEXT_NAME).exists():
        shutil.rmtree(work)
        for folder in made[1:]:
            if not any(folder.iterdir()):
                folder.rmdir()


def _is_begun(work: Path) -> bool:
    """Whether an earlier run has finished at least one MoE layer; with less, its working folder is discarded."""
    states = [read_manifest(file) for file in work.rglob("manifest.json")]
    return any(report is not None for state in states for report in state["layers"].values())


def _empty(work: Path) -> None:
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in ("lock", OWN_TEXT_NAME):
            entry.unlink()


def check_shared(manifest: Manifest) -> None:
    """Refuse a working folder that this process cannot see: every process reads finished layers from it."""
    if not manifest.path.exists():
        raise FileNotFoundError(
            f"a process of this run does not find {manifest.path}; machines need an output folder that they share"
        )


def _publish_all(
    task: CheckpointTask, results: Sequence[Result], reports: Sequence[CompressionReport], work: Path
) -> None:
    for result, report in zip(results, reports, strict=True):
        result.folder.mkdir(exist_ok=True)
        _publish(task, result, report)
    publish_statistics(work, task.output)
    warn_left_out(task)


def warn_left_out(task: CheckpointTask) -> None:
    """Name the files beside the source's weights that are not copied."""
    if others := left_out(task.reader.folder):
        logger.warning("not copied, because not known to belong to a model: %s", listed(others, 20))


def _publish(task: CheckpointTask, result: Result, report: CompressionReport) -> None:
    model, layers = copy.deepcopy((task.model, list(task.layers)))  # other results start from the original counts
    write_width_(model, layers, result.width)
    write_counts_(model, layers, result.num_experts)
    publish(task, model, result.folder, result.shards, result.manifest, report)


def publish(
    task: CheckpointTask,
    model: Any,
    output: Path,
    shards: Mapping[str, Sequence[OutputTensor]],
    manifest: Manifest,
    report: CompressionReport,
) -> None:
    """Write a result's files into its output folder, the weights last, so that an incomplete folder never loads.

    Args:
        task: whose source they are from.
        model: without weights, with the config of the result.
        output: folder.
        shards: tensors by file name.
        manifest: of the working folder that they are in.
        report: of the run.
    """
    stale = {*output.glob("model*.safetensors"), *output.glob("model*.index.json")}
    set_card_aside(output)
    copy_companions(task.reader.folder, output)
    remove_stale(output, companions(task.reader.folder))
    replace_json(output / MANIFEST_NAME, {"tensors": dict(sorted(manifest.tensors.items()))})
    write_sidecars(model, output, report, task.reader.config)
    write_report(output, report)  # replaces the card of an earlier checkpoint, too
    for file in stale - {output / name for name in shards}:
        file.unlink()
    publish_shards(manifest.path.parent, shards, output)
