"""The report as a page for people: one HTML file that needs nothing else, and no network.

Everything that is drawn is in `web/`: a template, a style sheet, and scripts in the order of `SCRIPTS`.  Here the
report's numbers are put into it.
"""

import html
import json
import math
import re
from importlib.resources import files
from typing import Any

from ..results.report import CompressionReport
from ..versions import __version__
from .reproduction import is_in_memory, reproduction_command
from .verdict import title, verdict


__all__ = ["PAGE_NAME", "report_page"]

PAGE_NAME = "dern_report.html"
SCRIPTS = ("draw", "headline", "losses", "layers", "map", "layer", "flow", "similarity", "made", "main")
DIGITS = 7  # significant ones of the numbers in a page: losses are shown with four decimals


def report_page(report: CompressionReport) -> str:
    """The page of a report.

    Args:
        report: of this version or an earlier one; figures without numbers say so.

    Returns:
        HTML with its style, scripts and data inside.
    """
    folder = files(__package__) / "web"
    parts = {
        "title": html.escape(title(report)),
        "verdict": html.escape(verdict(report)),
        "generator": f"optimum-dern {__version__}",
        "style": (folder / "style.css").read_text("utf-8"),
        "script": "\n".join((folder / f"{name}.js").read_text("utf-8") for name in SCRIPTS),
        "data": _data(report),
    }
    template = (folder / "template.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _data(report: CompressionReport) -> str:
    """The numbers as JSON that may stand inside a script element."""
    values = _rounded(report.to_dict()) | {
        "command": reproduction_command(report),
        "in_memory": is_in_memory(report.config["dataset"]),
    }
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _rounded(value: Any) -> Any:
    """Floats with few digits, and null for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
