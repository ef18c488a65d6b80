"""The page of an attribution: heat maps of layers and experts by domain, and a list of experts to search in."""

import html
from importlib.resources import files
from typing import Any

from ..reporting.page import fill_template, rounded, script_json
from ..versions import __version__
from .result import MEASURES, Attribution


__all__ = ["attribution_page"]

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
    return fill_template((own / "template.html").read_text("utf-8"), parts)


def _summary(attribution: Attribution) -> str:
    tokens = ", ".join(f"{count:,} of {domain}" for domain, count in attribution.tokens.items())
    experts = attribution.measures["share"].shape[2]
    return f"{len(attribution.layers)} layers of {experts} experts, on {tokens} (tokens)."


def _data(attribution: Attribution) -> str:
    """Encode what the page shows."""
    skew = attribution.skew() if len(attribution.tokens) > 1 else attribution.measures["share"]
    values: dict[str, Any] = {
        "domains": attribution.domains,
        "layers": attribution.layers,
        "descriptions": MEASURES,
        "measures": {name: rounded(value.tolist(), DIGITS) for name, value in attribution.measures.items()},
        "skew": rounded(skew.tolist(), DIGITS),
        "examples": attribution.examples,
    }
    return script_json(values)
