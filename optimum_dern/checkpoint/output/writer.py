"""Save a compressed model that is in memory: an ordinary checkpoint with its card, report and provenance.

Everything is written to a temporary folder first and renamed into place file by file, the index of the weights last,
so that an interrupted save never leaves a half-written file under a final name.
"""

import os
import shutil
import tempfile
from logging import getLogger
from pathlib import Path
from typing import Any

from ...models.adapters import check_no_adapter
from ...models.moe.structure import find_moe_layers
from ...paths import check_utf8
from ...results.report import CompressionReport
from ..format.sidecars import TOKENIZER, copy_companions, remove_stale
from ..format.weight_files import INDEX_NAME
from ..source.provenance import model_source, source_config
from .folder import check_no_foreign, set_card_aside
from .publishing import write_sidecars


__all__ = ["save_checkpoint"]

logger = getLogger(__name__)

LAST = {"config.json": 1, INDEX_NAME: 2}  # renamed into place after everything else


def save_checkpoint(
    model: Any, output: Path, report: CompressionReport, tokenizer: Any, max_shard_size: str | int
) -> None:
    """Save a compressed model as a checkpoint that plain transformers loads.

    Args:
        model: compressed, in memory.
        output: folder.
        report: of the compression.
        tokenizer: object, Hub id, path, or None for the source's own.
        max_shard_size: largest size of one safetensors file.

    Raises:
        ValueError: the folder is the one that the model was loaded from, or has files of another kind of checkpoint;
            the report is of another model, or the model has adapters.
    """
    check_no_adapter(model, "saved")
    check_utf8(output, tokenizer)
    if output.resolve() == report.source_folder:
        raise ValueError(
            f"{output} is the folder that the model was loaded from; the original would be lost, choose another one"
        )
    check_no_foreign([output])
    _check_model(model, report)
    output.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=output))
    try:
        type(model).save_pretrained(model, staging, max_shard_size=max_shard_size)
        source = model.dern_source_config if hasattr(model, "dern_source_config") else source_config(model)
        write_sidecars(model, staging, report, source)
        _save_tokenizer(model, tokenizer, staging)
        set_card_aside(output)
        _publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_model(model: Any, report: CompressionReport) -> None:
    """Refuse a model that is neither the compressed one nor trained from it, by its expert counts."""
    if getattr(model, "dern_report", None) is report:
        return
    layers = find_moe_layers(model)
    found, dense = [layer.num_experts for layer in layers], {layer.name for layer in report.layers if layer.dense}
    routed = [len(layer.retained) for layer in report.layers if not layer.dense]
    expected = routed or [report.after.experts] * len(found)
    if routed_now := sorted(dense.intersection(layer.name for layer in layers)):
        raise ValueError(
            f"{routed_now[0]} has routed experts in this model, and is dense in the one that was compressed; give "
            "what compress_model returned, or what was trained from it"
        )
    if found != expected or not (found or dense):
        (now, counts), (then, reported) = ((len(many), sorted(set(many))) for many in (found, expected))
        raise ValueError(
            f"this model has {now} MoE layers with {counts} experts, the one that was compressed {then} with "
            f"{reported}; give what compress_model returned, or what was trained from it"
        )


def _save_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer and processor; files of a local folder are copied, so that none of their code runs."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    name, revision = model_source(model) if tokenizer is None else (str(tokenizer), None)
    if name is None:  # a model that was made in memory
        return
    reason = "no such file"
    if Path(name).is_dir():
        copy_companions(Path(name), folder, keep=True, inputs_only=tokenizer is not None)
    else:
        reason = _save_from_hub(name, revision, folder)
    if not any((folder / file).exists() for file in TOKENIZER):
        logger.warning(
            "no tokenizer is saved, for %s gives none (%s); give one, as tokenizer=AutoTokenizer.from_pretrained(...)",
            name,
            reason,
        )


def _save_from_hub(name: str, revision: str | None, folder: Path) -> str:
    """Save a Hub model's processor and tokenizer where they load without custom code; returns why they did not."""
    from transformers import AutoProcessor, AutoTokenizer

    reasons = []
    for kind in (AutoProcessor, AutoTokenizer):
        try:
            kind.from_pretrained(name, revision=revision, trust_remote_code=False).save_pretrained(folder)
        except Exception as error:  # of any library that a tokenizer needs; the checkpoint is saved all the same
            reasons.append(" ".join(str(error).split()))
    return reasons[-1] if reasons else "no file"


def _publish(staging: Path, output: Path) -> None:
    """Move the finished files into place, the index last, and remove weight files of an earlier checkpoint."""
    files = sorted((f for f in staging.rglob("*") if f.is_file()), key=lambda f: LAST.get(f.name, 0))
    mode = (staging / "config.json").stat().st_mode  # safetensors makes its files unreadable for others
    for file in files:
        file.chmod(mode)
        target = output / file.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    written = {file.relative_to(staging).as_posix() for file in files}
    remove_stale(output, written)
    for stale in [*output.glob("model*.safetensors"), output / INDEX_NAME]:
        if stale.name not in written:
            stale.unlink(missing_ok=True)
