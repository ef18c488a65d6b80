"""The model card of a compressed checkpoint: origin, sizes, measured loss, and the command that reproduces it."""

from importlib.resources import files
from typing import Any

from ..installation import install_hint, project_link
from ..results.estimate import error_text
from ..results.licence import source_metadata
from ..results.report import CompressionReport
from .plots import image_description
from .reproduction import is_in_memory, reproduction_command
from .verdict import mean_losses, title, verdict


__all__ = ["model_card"]

TAGS = ["moe", "dern", "expert-pruning", "compressed"]


def model_card(report: CompressionReport, image: str | None = None) -> Any:
    """Make the model card of a compressed checkpoint.

    Args:
        report: of the run, with its evaluation if one was made.
        image: file name of the report's picture, relative to the card, if there is one.

    Returns:
        A `huggingface_hub.ModelCard`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    source = report.source
    metadata = source_metadata(source, report.revision) if report.source_card is None else report.source_card
    is_hub_id = metadata.get("base_model") == [source]
    name = source.rstrip("/").split("/")[-1] if source else report.model_type
    heading = title(report)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=heading if report.evaluation else None,
        eval_results=_evaluation_results(report) or None,
        **metadata,
    )
    return ModelCard.from_template(
        data,
        template_str=(files(__package__) / "card_template.md").read_text("utf-8"),
        title=heading,
        verdict=verdict(report),
        image=image,
        image_text=image and image_description(report),
        licence=metadata.get("license_name") or metadata.get("license"),
        source=f"[{source}](https://huggingface.co/{source})" if is_hub_id else f"`{name}`",
        tool=project_link(),
        install=install_hint(),
        before=report.before,
        after=report.after,
        sizes=_size_rows(report),
        method=report.method,
        dense=bool(report.dense_layers),
        config=report.config,
        model_type=report.model_type,
        calibration=report.calibration,
        evaluation=_evaluation_rows(report),
        evaluation_length=report.evaluation_length,
        command=reproduction_command(report),
        training=report.training,
        versions=", ".join(f"{tool} {version}" for tool, version in report.versions.items()),
        in_memory=is_in_memory(report.config["dataset"]),
    )


def _evaluation_results(report: CompressionReport) -> list[Any]:
    """Convert the measured losses to the form that the Hub reads from a card's metadata."""
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
        **({"width": "neurons per expert"} if report.after.width != report.before.width else {}),
        "parameters": "parameters",
        "active_parameters": "active parameters per token",
        "bytes": "bytes",
    }
    made = [{"name": "layers made dense", "before": "", "after": f"{len(report.dense_layers)}"}]
    return (made if report.dense_layers else []) + [
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
                "before": f"{before['loss']:.4f} ({error_text(before['standard_error'])})",
                "after": f"{after['loss']:.4f} ({error_text(after['standard_error'])})",
                "increase": f"{after['loss'] - before['loss']:+.4f}",
            }
        )
    if len(rows) > 1:
        before, after = mean_losses(report)
        rows.append(
            {"name": "mean", "before": f"{before:.4f}", "after": f"{after:.4f}", "increase": f"{after - before:+.4f}"}
        )
    return rows
