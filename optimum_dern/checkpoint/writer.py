"""Write a compressed model: an ordinary checkpoint, its card, report and provenance.

Everything is written to a folder beside the output first and renamed into place file by file, the weights' index
last, so that an interrupted save never leaves a half-written file under a final name.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..reporting.card import model_card
from ..reporting.report import CompressionReport
from .config_json import compressed_config, source_config


__all__ = ["CONFIG_NAME", "REPORT_NAME", "provenance", "save_checkpoint"]

CONFIG_NAME, REPORT_NAME = "dern_config.json", "dern_report.json"
INDEX_NAME = "model.safetensors.index.json"
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
    """
    output.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=output))
    try:
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        _write_config(model, staging / "config.json")
        _save_tokenizer(model, tokenizer, staging)
        _write_json(staging / CONFIG_NAME, provenance(report))
        report.save(staging / REPORT_NAME)
        (staging / "README.md").write_text(f"{model_card(report)}\n", "utf-8")
        _publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def provenance(report: CompressionReport) -> dict[str, Any]:
    """How a checkpoint was made: the content of `dern_config.json`."""
    return {
        "config": report.config,
        "source": report.source,
        "revision": report.revision,
        "calibration": report.calibration,
        "seed": report.config["seed"],
        "retained_experts": {layer.name: layer.retained for layer in report.layers},
        "versions": report.versions,
    }


def _write_config(model: Any, path: Path) -> None:
    saved = json.loads(path.read_text("utf-8"))
    _write_json(path, compressed_config(saved, source_config(model), model.config))


def _save_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    from optimum.utils.save_utils import maybe_save_preprocessors

    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif tokenizer is not None:
        maybe_save_preprocessors(str(tokenizer), folder)
    elif os.path.isdir(model.config._name_or_path or ""):
        maybe_save_preprocessors(model.config._name_or_path, folder)


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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
