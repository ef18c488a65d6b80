"""Write a compressed model: an ordinary checkpoint, its card, report and provenance.

Everything is written to a folder beside the output first and renamed into place file by file, the weights' index
last, so that an interrupted save never leaves a half-written file under a final name.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..models.adapters import check_no_adapter
from ..models.structure import find_moe_layers
from ..reporting.report import CompressionReport
from .publishing import write_sidecars
from .source import model_source, source_config
from .weight_files import INDEX_NAME


__all__ = ["save_checkpoint"]

LAST = {"config.json": 1, INDEX_NAME: 2}  # renamed into place after everything else


def save_checkpoint(
    model: Any, output: Path, report: CompressionReport, tokenizer: Any, max_shard_size: str | int
) -> None:
    """Save a compressed model for plain transformers.

    Args:
        model: compressed, in memory.
        output: folder.
        report: of the compression.
        tokenizer: object, Hub id, path, or None for the files beside a local source.
        max_shard_size: of one safetensors file.

    Raises:
        ValueError: the folder that the model was loaded from, a model that the report is not about, or one with
            adapters.
    """
    check_no_adapter(model, "saved")
    _check_output(output, report)
    _check_model(model, report)
    output.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=output))
    try:
        type(model).save_pretrained(model, staging, max_shard_size=max_shard_size)
        source = model.dern_source_config if hasattr(model, "dern_source_config") else source_config(model)
        write_sidecars(model, staging, report, source)
        _save_tokenizer(model, tokenizer, staging)
        _publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_output(output: Path, report: CompressionReport) -> None:
    """Refuse the source's own folder."""
    if report.source and os.path.isdir(report.source) and output.resolve() == Path(report.source).resolve():
        raise ValueError(
            f"{output} is the folder that the model was loaded from; the original would be lost, choose another one"
        )


def _check_model(model: Any, report: CompressionReport) -> None:
    """Refuse a model other than the compressed one, or one that was made of it by training."""
    if getattr(model, "dern_report", None) is report:
        return
    found = [layer.num_experts for layer in find_moe_layers(model)]
    expected = [len(layer.retained) for layer in report.layers] or [report.after.experts] * len(found)
    if found != expected or not found:
        (now, counts), (then, reported) = ((len(many), sorted(set(many))) for many in (found, expected))
        raise ValueError(
            f"this model has {now} MoE layers with {counts} experts, the one that was compressed {then} with "
            f"{reported}; give what compress_model returned, or what was trained from it"
        )


def _save_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    from optimum.utils.save_utils import maybe_save_preprocessors

    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif tokenizer is not None:
        maybe_save_preprocessors(str(tokenizer), folder)
    elif os.path.isdir(model_source(model)[0] or ""):
        maybe_save_preprocessors(model_source(model)[0], folder)


def _publish(staging: Path, output: Path) -> None:
    """Move the finished files into place, the index last, and remove weights that an earlier save left."""
    files = sorted((f for f in staging.rglob("*") if f.is_file()), key=lambda f: LAST.get(f.name, 0))
    mode = (staging / "config.json").stat().st_mode  # safetensors makes its files unreadable for others
    for file in files:
        file.chmod(mode)
        target = output / file.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    written = {file.name for file in files}
    for stale in [*output.glob("model*.safetensors"), output / INDEX_NAME]:
        if stale.name not in written:
            stale.unlink(missing_ok=True)
