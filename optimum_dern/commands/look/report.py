"""`report CHECKPOINT`: write a compression report, read from its JSON file, as an HTML page."""

import argparse
from pathlib import Path

from ...errors import explained


__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

HELP = "Write the report of a compressed checkpoint as one HTML page."
DESCRIPTION = (
    "Read dern_report.json, of this release or an earlier one, and write dern_report.html beside it: what was\n"
    "gained, what was lost and where, in one file that needs no network.  compress does so too, at its end.\n"
    "A picture for the model card, assets/dern_report.png, is drawn where matplotlib is installed."
)
EPILOG = """examples:
  optimum-dern report ./mixtral-4
  optimum-dern report ./mixtral-4 --card
  optimum-dern report ./mixtral-4/dern_report.json --output page.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report` to its parser."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="its folder, or its dern_report.json")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write only the page, and to this file")
    parser.add_argument("--card", action="store_true", help="write README.md anew, too; what was edited there is lost")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")


def run(args: argparse.Namespace) -> None:
    """Write the page, and print its path."""
    if args.card and args.output:
        raise ValueError("--card writes into the checkpoint, and --output elsewhere; give one of them")
    if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise ValueError(f"--output {args.output} must be a file in a folder that exists")
    report, folder = _load(args.checkpoint)

    from ...reporting.page import report_page
    from ...reporting.presentation import write_presentation
    from ...text_files import replace_text

    with explained(f"the report of {args.checkpoint} cannot be shown", "compress the checkpoint again"):
        page = report_page(report)
    if args.output:
        replace_text(args.output, page)
        print(args.output)
        return
    with explained(f"the report of {args.checkpoint} cannot be shown", "compress the checkpoint again"):
        files = write_presentation(report, folder, keep_card=not args.card, draw=True)
    for file in files:
        print(file)


def _load(path: Path):
    """Load the report of a checkpoint; returns it and its folder."""
    from ...checkpoint.output.publishing import REPORT_NAME
    from ...results.report import CompressionReport

    file = path / REPORT_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; give the folder of a checkpoint that optimum-dern compressed")
    return CompressionReport.load(file), file.parent
