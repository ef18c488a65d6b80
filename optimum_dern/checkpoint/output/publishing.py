"""The files written beside a compressed model's weights, also by `save_pretrained`: config, provenance, report, card.

transformers would rewrite the config, and put a card of its own on the Hub.  So a compressed model, which is of a
plain transformers class, gets its own `save_pretrained` and `push_to_hub`, which write these files after the weights.
"""

import json
import os
from pathlib import Path
from types import MethodType
from typing import Any

from ...models.adapters import check_no_adapter, has_adapter
from ...reporting.presentation import write_presentation
from ...results.report import CompressionReport
from ...text_files import replace_json, replace_rows
from ..source.ties import record_untied_
from .config_json import compressed_config


__all__ = ["MANIFEST_NAME", "OWN_TEXT_NAME", "REPORT_NAME", "keep_publishable_", "write_report", "write_sidecars"]

CONFIG_NAME, REPORT_NAME = "dern_config.json", "dern_report.json"
OWN_TEXT_NAME = "calibration.jsonl"  # calibration text that the model wrote
MANIFEST_NAME = "dern_manifest.json"  # checksums of all tensors
HUB_ARGUMENTS = ("repo_id", "private", "token", "revision", "commit_message", "create_pr")


def keep_publishable_(model: Any, report: CompressionReport, source: dict[str, Any] | None) -> None:
    """Replace a compressed model's `save_pretrained` and `push_to_hub` to write config, report and card as well.

    Args:
        model: compressed, in memory; its config's `tie_word_embeddings` is set to False if its head is not tied.
        report: of the compression, which becomes `model.dern_report`.
        source: JSON of the config that it was loaded from, if there is one.
    """
    model.dern_report, model.dern_source_config = report, source
    record_untied_(model)
    model.save_pretrained = MethodType(save_pretrained, model)  # a bound method follows copy.deepcopy(model)
    model.push_to_hub = MethodType(push_to_hub, model)


def save_pretrained(
    self,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: dict | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Save with transformers' `save_pretrained`, then write config, provenance, report and card.

    Args:
        save_directory: folder; an existing card is kept.
        is_main_process: whether this process, of several that call this, writes the config.
        state_dict: weights to save instead of the model's own.
        push_to_hub: also push to `repo_id` (by default the folder's name), with the arguments of `push_to_hub`.
        **kwargs: arguments of the class's own method.

    Raises:
        ValueError: peft has added layers to the model, whose tensors a plain model does not load.
    """
    if not getattr(self, "_hf_peft_config_loaded", False):  # else transformers saves the adapters alone
        check_no_adapter(self, "saved")
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs} if push_to_hub else {}
    type(self).save_pretrained(self, save_directory, is_main_process, state_dict, **kwargs)
    if is_main_process and not has_adapter(self):
        write_sidecars(self, Path(save_directory), self.dern_report, self.dern_source_config)
    if push_to_hub:
        self.push_to_hub(hub.pop("repo_id", Path(save_directory).resolve().name), **hub)


def push_to_hub(self, repo_id: str, *, max_shard_size: str | int = "5GB", **options: Any) -> str:
    """Push a compressed model in one commit, with its report, and its card unless the repository has one.

    Args:
        repo_id: `name` or `namespace/name`; created if missing.
        max_shard_size: largest size of one safetensors file.
        **options: `private`, `token`, `revision`, `commit_message`, `create_pr`, `folder`: see `push_checkpoint`.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the model has adapters.
    """
    from ..hub.push import push_checkpoint

    check_no_adapter(self, "published")

    def save(folder: Path) -> None:
        self.save_pretrained(folder, max_shard_size=max_shard_size)

    return push_checkpoint(save, repo_id, **options)


def write_sidecars(model: Any, folder: Path, report: CompressionReport, source: dict[str, Any] | None) -> None:
    """Write config.json, provenance, report, own text, report page and, where there is none, a card beside weights.

    Args:
        model: the compressed model.
        folder: where transformers has saved it.
        report: of the compression.
        source: JSON of the config that the model was loaded from; None where there is none.
    """
    config = folder / "config.json"
    saved = json.loads(config.read_text("utf-8")) if config.exists() else model.config.to_dict()
    replace_json(config, compressed_config(saved, source, model.config))
    replace_json(folder / CONFIG_NAME, _provenance(report))
    report.save(folder / REPORT_NAME)
    if report.own_text:
        replace_rows(folder / OWN_TEXT_NAME, report.own_text)
    write_presentation(report, folder, keep_card=True)


def write_report(folder: Path, report: CompressionReport) -> None:
    """Write a report, with its page and card, into the folder of an existing checkpoint."""
    report.save(folder / REPORT_NAME)
    write_presentation(report, folder)


def _provenance(report: CompressionReport) -> dict[str, Any]:
    """Describe how a checkpoint was made: the content of `dern_config.json`."""
    return {
        "config": report.config,
        "source": report.source,
        "revision": report.revision,
        "calibration": report.calibration,
        "seed": report.config["seed"],
        "retained_experts": {layer.name: layer.retained for layer in report.layers},
        "versions": report.versions,
    }
