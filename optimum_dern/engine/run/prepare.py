"""Turn a request into a checked task: find the source, resolve expert counts, load data, plan memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.format.conversion import NameMap
from ...checkpoint.format.precision import describe_precision
from ...checkpoint.format.tensor_file import dtype_name
from ...checkpoint.output.folder import WORK_NAME, prepare_output
from ...checkpoint.output.plan import plan_output
from ...checkpoint.output.publishing import OWN_TEXT_NAME
from ...checkpoint.output.shards import parse_bytes
from ...checkpoint.source.find import Source, find_checkpoint
from ...checkpoint.source.recorded import RecordedStatistics, identify_model
from ...checks.arguments import check_argument
from ...config import DernConfig
from ...machine.processes import Processes
from ...models.loading import parse_dtype
from ...models.moe.structure import find_moe_layers, layers_by_position
from ...paths import check_utf8
from ...results.description import describe_calibration
from ..cost.memory import plan_memory
from ..layer.narrowing import written_width
from .checkpoint_run import CheckpointTask, result_names
from .checks import check_names, check_statistics, resolve_counts, warn_of_padding, with_dataset
from .model_batches import load_model_batches, with_text_it_can_write, writes_text
from .own_text import OwnText
from .whole_model import check_fits, origin_of, whole_model


__all__ = ["CheckpointRequest", "prepare_task"]


@dataclass(frozen=True)
class CheckpointRequest:
    """The arguments of `DernCompressor.compress_checkpoint`, unchecked, as the user gave them."""

    model: str | Path
    output: str | Path
    configs: Sequence[DernConfig]  # one for each result
    tokenizer: Any = None
    revision: str | None = None
    token: str | bool | None = None
    trust_remote_code: bool = False
    dtype: str | torch.dtype | None = None
    max_shard_size: str | int | None = None
    max_memory: str | int | None = None
    statistics: str | Path | None = None
    restart: bool = False
    overwrite: bool = False
    download: Mapping[str, Any] = field(default_factory=dict)  # options of a Hub download, such as `cache_dir`


def prepare_task(request: CheckpointRequest, processes: Processes) -> CheckpointTask:
    """Check a request, and load everything that compressing the checkpoint needs except its weights.

    Args:
        request: as the user gave it.
        processes: that share the work.

    Raises:
        ValueError: the checkpoint, expert count, dataset, statistics file or output folder cannot be used.
        FileNotFoundError: weights are missing, or stored only as pickle files.
        RuntimeError: another run is using the output folder.
    """
    check_argument("output", request.output, str | Path, "a folder")
    check_utf8(request.model, request.output, request.statistics, request.tokenizer)
    shard_size = parse_bytes(request.max_shard_size) if request.max_shard_size else None
    bound = parse_bytes(request.max_memory) if request.max_memory else None
    dtype = parse_dtype(request.dtype)
    check_names(request.configs[0])
    if request.statistics is not None:
        check_statistics(request.configs[0])
    recorded = RecordedStatistics(request.statistics) if request.statistics else None
    source = processes.main_first(
        lambda: find_checkpoint(
            request.model, request.revision, request.token, request.trust_remote_code, dtype, **request.download
        )
    )
    skeleton = source.skeleton
    layers = find_moe_layers(skeleton)
    counts = resolve_counts(request.configs, skeleton, layers)
    if processes.is_main:
        warn_of_padding(request.configs[0], layers[0])
    if source.reader is not None:  # what cannot be written is refused before anything long
        stored = NameMap(skeleton, list(source.reader.infos))
        plan_output(skeleton, layers, source.reader, stored, counts[0], written_width(layers[0], request.configs[0]))
    output, names = Path(request.output), result_names(counts)
    processes.on_main(lambda: prepare_output(source.folder, output, request.restart, request.overwrite, names))
    configs = request.configs if recorded is not None else [with_dataset(config) for config in request.configs]
    shares, batches, own_text = processes.on_main(
        lambda: _load_data(request, configs[0], source, output, processes, bound)
    )
    configs = [replace(config, **shares) for config in configs]
    calibration = describe_calibration(configs[0].dataset, batches)
    tokens = sum(batch["input_ids"].numel() for batch in processes.share(batches)) if batches and not recorded else 0
    memory = plan_memory(skeleton, layers, tokens, configs[0], counts, bound, processes.device)
    reader = processes.main_first(source.open_weights)
    dtype = dtype and dtype_name(dtype)
    if recorded is not None:
        data = {"calibration data": calibration["sha256"]} if batches else {}
        recorded.check(identify_model(reader, dtype) | data, layers_by_position(skeleton, layers))
        configs = [replace(config, **recorded.description["options"]) for config in configs]
        batches, calibration = [], recorded.description["calibration"]
    return CheckpointTask(
        model=skeleton,
        layers=layers,
        reader=reader,
        name=str(request.model),
        revision=source.commit,
        batches=batches,
        calibration=calibration,
        configs=configs,
        counts=counts,
        output=output,
        max_shard_size=shard_size or reader.largest_file,
        memory=memory,
        dtype=dtype,
        precision=describe_precision(skeleton, reader, dtype),
        processes=processes,
        recorded=recorded,
        own_text=own_text,
    )


def _load_data(
    request: CheckpointRequest,
    config: DernConfig,
    source: Source,
    output: Path,
    processes: Processes,
    bound: int | None,
) -> tuple[dict[str, float], list[dict], list[dict]]:
    """Load the calibration data; returns the shares of what is made, all batches, and rows of the model's text."""
    if config.dataset is None:
        return {}, [], []
    own, device, own_code = None, processes.device, request.trust_remote_code
    if writes_text(config):
        kept = output / WORK_NAME / OWN_TEXT_NAME
        own = OwnText(source.skeleton, lambda: whole_model(source, device), kept, origin_of(source))
        config = with_text_it_can_write(config, source.skeleton, lambda: check_fits(source.skeleton, device, bound))
    tokenizer = source.folder if request.tokenizer is None else request.tokenizer
    batches = load_model_batches(config, source.skeleton, tokenizer, own_code, own, processes.count)
    shares = {name: getattr(config, name) for name in ("self_share", "random_share")}
    return shares, batches, [] if own is None else own.rows
