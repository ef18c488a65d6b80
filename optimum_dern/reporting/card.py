"""The model card: what the checkpoint is, what it lost, and how to make it again."""

import dataclasses
import json
import os
import re
import shlex
from typing import Any

from .licence import source_licence
from .report import CompressionReport


__all__ = ["model_card", "reproduction_command"]

IN_MEMORY = re.compile(r" in memory \(\w+\)$")  # the end of what describes data that has no name or path
TAGS = ["moe", "dern", "expert-pruning", "compressed"]

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ before.experts }} routed experts per layer became {{ after.experts }}: {{ "%.2f"|format(ratio) }} of the bytes of
{{ source }}, compressed without training by
[optimum-dern](https://pypi.org/project/optimum-dern) (method `{{ method }}`, preset `{{ config.preset }}`).
It is an ordinary `{{ model_type }}` checkpoint: plain transformers loads it, nothing else is needed.

| | original | this model |
|---|---:|---:|
{% for row in sizes -%}
| {{ row.name }} | {{ row.before }} | {{ row.after }} |
{% endfor -%}
{% if evaluation %}
## Evaluation

Loss in nats per token on held-out text (standard error in brackets).

| text | original | this model | increase |
|---|---:|---:|---:|
{% for row in evaluation -%}
| {{ row.name }} | {{ row.before }} | {{ row.after }} | {{ row.increase }} |
{% endfor %}{% else %}
No evaluation was run when this checkpoint was made: measure it on your own task before you rely on it.
{% endif %}
## Calibration

{{ calibration.sequences }} sequences, {{ "{:,}".format(calibration.tokens) }} tokens from `{{ calibration.dataset }}`
(SHA-256 of the token ids `{{ calibration.sha256[:16] }}`). Quality on text unlike it may have fallen further than the
table shows. `dern_report.json` tells which experts stayed in every layer and what each candidate's error was.

## Reproduce
{% if versions %}
With {{ versions }}{% if in_memory %}; `DATA` stands for the calibration data, which was given in memory{% endif %}:
{% endif %}
```bash
{{ command }}
```

## Citation

DERN: *Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs*,
arXiv 2509.10377. The licence of the original model applies.
"""


def model_card(report: CompressionReport) -> Any:
    """The card of a compressed checkpoint.

    Args:
        report: of the run, with its evaluation if one was made.

    Returns:
        A `huggingface_hub.ModelCard`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    source = report.source
    is_hub_id = bool(source) and source.count("/") == 1 and source[0] not in "./~" and not os.path.isdir(source)
    name = source.rstrip("/").split("/")[-1] if source else report.model_type
    title = f"{name}, {report.after.experts} of {report.before.experts} experts"
    data = ModelCardData(
        base_model=[source] if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=title if report.evaluation else None,
        eval_results=_evaluation_results(report) or None,
        **source_licence(source, report.revision, is_hub_id),
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title,
        source=f"[{source}](https://huggingface.co/{source})" if is_hub_id else f"`{name}`",
        before=report.before,
        after=report.after,
        sizes=_size_rows(report),
        ratio=report.ratio,
        method=report.method,
        config=report.config,
        model_type=report.model_type,
        calibration=report.calibration,
        evaluation=_evaluation_rows(report),
        command=reproduction_command(report),
        versions=", ".join(f"{tool} {version}" for tool, version in report.versions.items()),
        in_memory=_is_in_memory(report.config["dataset"]),
    )


def reproduction_command(report: CompressionReport) -> str:
    """The command line that makes the same checkpoint: every field that differs from the defaults.

    Calibration data that was given in memory has no name that a command could give; `DATA` stands for it.
    """
    from ..config import DernConfig

    defaults = DernConfig(preset=report.config["preset"], sparsity=report.config["sparsity"]).to_dict()
    words = ["optimum-dern", "compress", report.source or "MODEL", "OUTPUT"]
    words += ["--revision", report.revision] if report.revision else []
    for field in dataclasses.fields(DernConfig):
        value = report.config[field.name]
        is_default = value == (field.default if field.name in ("sparsity", "preset") else defaults[field.name])
        if field.name in ("dataset", "quant_method") or is_default or value is None:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        else:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    dataset = "DATA" if _is_in_memory(report.config["dataset"]) else report.config["dataset"]
    sources = [f"{name}={weight}" for name, weight in dataset.items()] if isinstance(dataset, dict) else [dataset]
    return shlex.join([*words, "--dataset", *map(str, sources)])


def _is_in_memory(dataset: Any) -> bool:
    return isinstance(dataset, str) and IN_MEMORY.search(dataset) is not None


def _evaluation_results(report: CompressionReport) -> list[Any]:
    """The measured losses in the form that the Hub reads from a card's metadata."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type="loss",
            metric_name="loss, nats per token",
            metric_value=round(pair["after"]["loss"], 4),
        )
        for name, pair in report.evaluation.items()
    ]


def _size_rows(report: CompressionReport) -> list[dict[str, str]]:
    names = {
        "experts": "routed experts per layer",
        "parameters": "parameters",
        "active_parameters": "active parameters per token",
        "bytes": "bytes",
    }
    return [
        {"name": label, "before": f"{getattr(report.before, name):,}", "after": f"{getattr(report.after, name):,}"}
        for name, label in names.items()
    ]


def _evaluation_rows(report: CompressionReport) -> list[dict[str, str]]:
    rows = []
    for name, pair in report.evaluation.items():
        before, after = pair["before"], pair["after"]
        rows.append(
            {
                "name": name,
                "before": f"{before['loss']:.4f} ({before['standard_error']:.4f})",
                "after": f"{after['loss']:.4f} ({after['standard_error']:.4f})",
                "increase": f"{after['loss'] - before['loss']:+.4f}",
            }
        )
    return rows
