"""The Hub's validation of a model card's metadata, for the fields that this project's cards have."""

import re

import yaml


__all__ = ["card_problems"]

ID = r"[\w.-]+/[\w.-]+"


def card_problems(content: str) -> list[str]:
    """List the problems that the Hub would find in a card's metadata."""
    header = re.match(r"---[ \t]*\r?\n(.*?\n)---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if header is None:
        return ["no metadata between two lines of ---"]
    try:
        data = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    base = data.get("base_model", [])
    checks = {
        "base_model": all(re.fullmatch(ID, str(name)) for name in (base if isinstance(base, list) else [base])),
        "tags": isinstance(data.get("tags", []), list) and all(isinstance(tag, str) for tag in data.get("tags", [])),
        "library_name": isinstance(data.get("library_name", ""), str),
        "pipeline_tag": re.fullmatch(r"[a-z0-9-]+", str(data.get("pipeline_tag", "text-generation"))),
        "license": isinstance(data.get("license", ""), str),
        "license: 'other' needs license_name": data.get("license") != "other" or "license_name" in data,
        "model-index": all(map(_is_result, data.get("model-index", []))),
    }
    return [f"{name} is not valid" for name, valid in checks.items() if not valid]


def _is_result(model: dict) -> bool:
    """Whether an entry of `model-index` names the model, and task, data set and metrics of every result."""
    if not isinstance(model.get("name"), str) or not model.get("results"):
        return False
    return all(
        isinstance(result.get("task", {}).get("type"), str)
        and {"type", "name"} <= result.get("dataset", {}).keys()
        and result.get("metrics")
        and all(isinstance(metric.get("type"), str) and "value" in metric for metric in result["metrics"])
        for result in model["results"]
    )
