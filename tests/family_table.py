"""Pytest option `--family-table FILE`, which writes the test results of each model family as a markdown table."""

import re
from pathlib import Path

from families import FAMILIES


COLUMNS = {
    "recording": ("test_recording", "test_recording_changes_nothing"),
    "rebuild": ("test_rebuild",),
    "round trip": ("test_round_trip", "test_files", "test_config"),
    "disk to disk": ("test_disk_to_disk",),
    "transformers 4.57": ("test_transformers_4",),
}
NOT_RUN = "not run"


def pytest_addoption(parser):
    """Add the option `--family-table` to pytest."""
    parser.addoption("--family-table", metavar="FILE", help="write what works for each family as a markdown table")


def pytest_terminal_summary(terminalreporter, config):
    """Write the table after all tests have run."""
    if config.getoption("family_table"):
        reports = [
            r for kind in ("passed", "failed", "error", "skipped") for r in terminalreporter.stats.get(kind, ())
        ]
        Path(config.getoption("family_table")).write_text(family_table(reports), "utf-8")


def family_table(reports):
    """Make the table from pytest's reports: every cell has "pass", or why a test failed or was skipped.

    Args:
        reports: of single tests, in any order; those of other test files are left out.

    Returns:
        Markdown.
    """
    outcomes = {}
    for report in reports:
        if match := re.search(r"test_famil(?:ies|y_checkpoints)\.py::(\w+)\[(\w+)\]", report.nodeid):
            outcomes[match.groups()] = outcome(report)
    lines = [f"| family | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for family in FAMILIES:
        cells = [cell([outcomes.get((test, family), NOT_RUN) for test in tests]) for tests in COLUMNS.values()]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def outcome(report):
    """Return "pass" for a test, or why it failed or was skipped."""
    if report.outcome == "passed":
        return "pass"
    if report.outcome == "skipped":
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else str(report.longrepr)
    return f"FAILED: {message.splitlines()[0]}".replace("|", "\\|")


def cell(outcomes):
    """Join the outcomes of several tests into one cell: "pass" if all pass."""
    return "; ".join(dict.fromkeys(o for o in outcomes if o != "pass")) or "pass"
