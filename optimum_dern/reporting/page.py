"""The report as one self-contained HTML file, which needs neither other files nor the network.

`web/` has the template, the style sheet and the scripts that draw, which this module fills with the report's numbers.
"""

import html
import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ..results.report import CompressionReport
from ..versions import __version__
from .reproduction import is_in_memory, reproduction_command
from .verdict import title, verdict


__all__ = ["PAGE_NAME", "fill_template", "report_page", "rounded", "script_json"]

PAGE_NAME = "dern_report.html"
# The scripts of `web/`, in the order in which they must run.
SCRIPTS = ("draw", "headline", "losses", "layers", "map", "layer", "flow", "similarity", "made", "main")
DIGITS = 7  # significant digits of the numbers in a page, which shows losses with four decimals


def report_page(report: CompressionReport) -> str:
    """Make the HTML page of a report.

    Args:
        report: of this version or an earlier one; charts without data say so.

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
    return fill_template((folder / "template.html").read_text("utf-8"), parts)


def fill_template(template: str, parts: Mapping[str, str]) -> str:
    """Replace every `{{name}}` of a template by the part of that name; what is inside a part stays as it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def script_json(values: Any) -> str:
    """Encode values as JSON that is safe inside a script element."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def rounded(value: Any, digits: int) -> Any:
    """Round all floats of a value to significant digits, and replace NaN and infinities, which JSON has not, by None.

    Args:
        value: a float, dicts and lists of them at any depth, or anything else, which stays.
        digits: how many.
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): rounded(item, digits) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def _data(report: CompressionReport) -> str:
    """Encode the report and the command that makes it once more."""
    values = rounded(report.to_dict(), DIGITS) | {
        "command": reproduction_command(report),
        "in_memory": is_in_memory(report.config["dataset"]),
    }
    return script_json(values)
