"""Writes the files for human readers beside a checkpoint: the report's HTML page, its picture, and the model card."""

from pathlib import Path

from ..results.report import CompressionReport
from ..text_files import replace_text
from .card import model_card
from .page import PAGE_NAME, report_page
from .plots import IMAGE_NAME, write_image


__all__ = ["CARD_NAME", "write_presentation"]

CARD_NAME = "README.md"


def write_presentation(
    report: CompressionReport, folder: Path, keep_card: bool = False, draw: bool | None = None
) -> list[Path]:
    """Write the page, picture and card of a report into the folder of its checkpoint.

    Args:
        report: to show.
        folder: existing folder of the checkpoint.
        keep_card: keep an existing card, since cards are edited by hand.
        draw: whether to draw the picture, which takes a second; by default where a loss was measured.

    Returns:
        The written files.
    """
    draw = bool(report.evaluation) if draw is None else draw
    replace_text(folder / PAGE_NAME, report_page(report))
    card = folder / CARD_NAME
    keep_card = keep_card and card.exists()
    image = write_image(report, folder) if draw else None
    if not draw and not keep_card:
        (folder / IMAGE_NAME).unlink(missing_ok=True)  # of an earlier checkpoint
    if not keep_card:
        replace_text(card, f"{model_card(report, image)}\n")
    return [folder / PAGE_NAME, *([folder / image] if image else []), *([] if keep_card else [card])]
