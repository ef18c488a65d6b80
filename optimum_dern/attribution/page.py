"""The page of an attribution: heat maps of layers and experts by domain, and a list of experts to search in."""

import html
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..text_files import replace_text
from ..versions import __version__
from .result import MEASURES, Attribution


__all__ = ["attribution_page", "write_page"]

DIGITS = 4


def attribution_page(attribution: Attribution) -> str:
    """Make the page, with its style, script and data inside; it needs no network."""
    own, report = files(__package__) / "web", files("optimum_dern.reporting") / "web"
    name = attribution.model
    parts = {
        "title": html.escape(f"Who does what in {name}"),
        "summary": html.escape(_summary(attribution)),
        "generator": f"optimum-dern {__version__}",
        "style": (report / "style.css").read_text("utf-8") + (own / "attribution.css").read_text("utf-8"),
        "script": (own / "attribution.js").read_text("utf-8"),
        "data": _data(attribution),
    }
    template = (own / "template.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def write_page(path: Path, page: str) -> None:
    """Write a page, atomically."""
    replace_text(path, page)


def _summary(attribution: Attribution) -> str:
    tokens = ", ".join(f"{count:,} of {domain}" for domain, count in attribution.tokens.items())
    experts = attribution.measures["share"].shape[2]
    return f"{len(attribution.layers)} layers of {experts} experts, on {tokens} (tokens)."


def _data(attribution: Attribution) -> str:
    """Encode what the page shows as JSON that is safe inside a script element."""
    skew = attribution.skew() if len(attribution.tokens) > 1 else attribution.measures["share"]
    values: dict[str, Any] = {
        "domains": attribution.domains,
        "layers": attribution.layers,
        "descriptions": MEASURES,
        "measures": {name: _rounded(value.tolist()) for name, value in attribution.measures.items()},
        "skew": _rounded(skew.tolist()),
        "examples": attribution.examples,
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.{DIGITS}g}")
