"""The report as one self-contained HTML file, which needs neither other files nor the network.

`web/` has the template, the style sheet and the scripts that draw, which this module fills with the report's numbers.
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
    template = (folder / "template.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _data(report: CompressionReport) -> str:
    """Encode the report as JSON that is safe inside a script element."""
    values = _rounded(report.to_dict()) | {
        "command": reproduction_command(report),
        "in_memory": is_in_memory(report.config["dataset"]),
    }
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _rounded(value: Any) -> Any:
    """Round floats to `DIGITS` digits, and replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
