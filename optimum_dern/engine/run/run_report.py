"""The compression report of a run, in memory or from disk to disk."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...config import DernConfig
from ...machine.progress import peak_memory_bytes
from ...results.description import recordable_dataset
from ...results.licence import source_metadata
from ...results.public_names import public_source
from ...results.report import CompressionReport, LayerReport, ModelSize
from ...versions import tool_versions
from .checkpoint_run import CheckpointTask


__all__ = ["make_report", "make_task_report"]


def make_report(
    config: DernConfig,
    model_type: str,
    source: tuple[str | None, str | None],
    sizes: tuple[ModelSize, ModelSize],
    layers: Sequence[LayerReport],
    calibration: dict[str, Any],
    started: float,
    devices: Sequence[torch.device],
    precision: dict[str, str],
) -> CompressionReport:
    """Make the report of a finished run.

    Args:
        config: of the run.
        model_type: from the model's config.
        source: name and revision of the original model, None where unknown.
        sizes: of the model before and after.
        layers: one report per MoE layer.
        calibration: from `describe_calibration`.
        started: when the run began, by `time.perf_counter`.
        devices: that computed, whose peak memory is reported.
        precision: dtypes stored in the source, used for computing, and written.
    """
    name, revision = source
    folder = None if name is None else Path(name).expanduser()
    return CompressionReport(
        source=public_source(name),
        revision=revision,
        model_type=model_type,
        method=config.method,
        config={**config.to_dict(), "dataset": recordable_dataset(config.dataset)},
        calibration=calibration,
        before=sizes[0],
        after=sizes[1],
        layers=list(layers),
        versions=tool_versions(),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(devices),
        precision=precision,
        source_card=source_metadata(name, revision),
        source_folder=folder.resolve() if folder is not None and folder.is_dir() else None,
    )


def make_task_report(
    task: CheckpointTask,
    config: DernConfig,
    sizes: tuple[ModelSize, ModelSize],
    layers: Sequence[LayerReport],
    started: float,
) -> CompressionReport:
    """Make the report of one result of a run from disk to disk.

    Args:
        task: of the run.
        config: of the result.
        sizes: of the model before and after.
        layers: one report per compressed MoE layer.
        started: when the run began, by `time.perf_counter`.
    """
    return make_report(
        config,
        task.model.config.model_type,
        (task.name, task.revision),
        sizes,
        layers,
        task.calibration,
        started,
        [task.processes.device],
        task.precision,
    )
