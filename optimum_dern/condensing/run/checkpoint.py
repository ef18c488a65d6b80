"""Condense layers of a checkpoint on disk, one decoder layer in memory at a time, with resume.

every layer that may become dense:  load -> measure -> condense -> its network into a working file
a search, where it finds them:      one pass through the decoder for each layer that becomes dense
the chosen networks, and everything else as it is  ->  the output
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ...checkpoint.format.conversion import NameMap
from ...checkpoint.output.manifest import Manifest
from ...checkpoint.output.plan import OutputPlan, plan_dense_output
from ...checkpoint.output.shards import OutputTensor, ShardWriter, check_room, plan_shards
from ...checkpoint.output.tensors import CheckpointOutput, copy_rest
from ...checkpoint.source.loader import PartLoader
from ...core.layer.segments import Segments
from ...engine.run.checkpoint import check_shared, open_manifest, opened, publish, warn_left_out, working_folder
from ...engine.run.checkpoint_run import CheckpointTask, fingerprint
from ...engine.run.run_report import make_task_report
from ...models.moe.structure import find_moe_layers
from ...models.size import measure_model
from ...results.report import CompressionReport, LayerReport
from ..condense import condense_each
from ..layer import Fit
from ..layer_search import search_layers
from ..plan import CondensingPlan, condensed_copy, plan_condensing
from .files import DenseFiles


__all__ = ["condense_checkpoint"]


def condense_checkpoint(task: CheckpointTask) -> list[CompressionReport]:
    """Condense layers of a checkpoint into the output folder, resuming an interrupted run of the same task.

    Args:
        task: the checked task, of a config with `condensed_layers`.

    Returns:
        The report of its one result.

    Raises:
        ValueError: the output folder has an unfinished run of a different task, or a block does not add its shared
            experts' output as it is.
        RuntimeError: another run is using the output folder.
        ProcessFailed: another process of this run has ended.
    """
    names, processes = NameMap(task.model, list(task.reader.infos)), task.processes
    with working_folder(task.output, processes) as work:
        mark = fingerprint(task, task.configs, task.counts[0])
        manifest = processes.on_main(lambda: open_manifest(work, mark))
        manifest.writes = processes.is_main
        if manifest.report is None:
            with opened(task, work) as opened_task:
                _condense(opened_task, names, work, manifest)
        report = CompressionReport.from_dict(processes.on_main(lambda: manifest.report))
        report.source_folder, report.own_text = task.reader.folder.resolve(), list(task.own_text)
        processes.on_main(lambda: _publish(task, names, manifest, report))
    return [report]


def _publish(task: CheckpointTask, names: NameMap, manifest: Manifest, report: CompressionReport) -> None:
    result = _result(task, _plan(task), names, report.dense_layers)
    publish(task, result.model, task.output, result.shards, manifest, report)
    warn_left_out(task)


class Result(NamedTuple):
    """The form of the condensed checkpoint, which is known once its dense layers are."""

    model: nn.Module  # without weights
    plan: OutputPlan
    shards: dict[str, list[OutputTensor]]


def _plan(task: CheckpointTask) -> CondensingPlan:
    config = task.configs[0]
    return plan_condensing(task.model, task.layers, config.condensed_layers, config.num_experts)


def _result(task: CheckpointTask, plan: CondensingPlan, names: NameMap, positions: Sequence[int]) -> Result:
    model = condensed_copy(task.model, plan, positions)
    layers = [plan.at[position] for position in positions]
    output = plan_dense_output(task.model, layers, task.reader, names, model, task.dtype)
    return Result(model, output, plan_shards(output.tensors, task.max_shard_size))


@torch.no_grad()
def _condense(task: CheckpointTask, names: NameMap, work: Path, manifest: Manifest) -> None:
    """Condense all layers of the plan, choose those of the result, write that, and record the report."""
    started, model, processes = time.perf_counter(), task.model, task.processes
    before, plan = measure_model(model, task.layers), _plan(task)
    loader = PartLoader(model, task.layers, task.reader, names, processes.device)
    check_shared(manifest)
    _make_networks(task, plan, loader, manifest)
    dense = processes.main_first(lambda: DenseFiles(work, plan, loader.device))  # once all networks are written
    if manifest.chosen_layers is None:
        options = loader, work if task.memory.spilled else None, processes
        searched = plan.searched and search_layers(model, plan, task.batches, dense.loaded, *options)
        manifest.choose_layers(searched or dict.fromkeys(plan.networks))
    chosen = manifest.chosen_layers
    result = _result(task, plan, names, [*chosen])
    processes.on_main(lambda: _write(task, loader, dense, result, chosen, manifest))
    after = measure_model(result.model, find_moe_layers(result.model))
    layers = [replace(LayerReport(**manifest.layers[p]), divergence=divergence) for p, divergence in chosen.items()]
    report = make_task_report(task, task.configs[0], (before, after), layers, started)
    manifest.complete(report.to_dict())


def _make_networks(task: CheckpointTask, plan: CondensingPlan, loader: PartLoader, manifest: Manifest) -> None:
    """Condense all layers of the plan that an earlier run has not, and write their networks into working files."""
    work, processes = manifest.path.parent, task.processes
    dense = DenseFiles(work, plan, loader.device) if processes.is_main else None

    def keep(position: int, neurons: Segments, report: LayerReport) -> None:
        if dense is not None:
            dense.write(position, neurons)
        manifest.finish_layer(position, asdict(report))

    fit, spill = Fit.of(task.configs[0]), work if task.memory.spilled else None
    condense_each(task.model, plan, task.batches, fit, keep, loader, manifest.layers.keys(), spill, processes)


def _write(
    task: CheckpointTask,
    loader: PartLoader,
    dense: DenseFiles,
    result: Result,
    chosen: Collection[int],
    manifest: Manifest,
) -> None:
    """Write the networks of the dense layers, and copy everything else, into the working folder."""
    check_room(task.output, {manifest.path.parent: result.shards})
    writer = ShardWriter(manifest.path.parent, result.shards)
    layer = task.layers[0]
    output = CheckpointOutput(loader, task.layers, result.plan, writer, manifest, layer.num_experts, layer.width)
    for position in chosen:
        block = dense.plan.at[position].name
        tensors = {f"{block}.{path}": tensor for path, tensor in dense.read(position).items()}
        output.write(loader.names.original(result.model, tensors))
    copy_rest(task.reader, [output])
