"""What `make supply-chain` and `make test-clients` make of what other programs say."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import audit
import compare_clients
import every_command
import pytest


FINDING = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2", "3"]}]}
CLEAN, SKIPPED = {"name": "b", "version": "1", "vulns": []}, {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "found", "looked_up"),
    [
        ([CLEAN], [], audit.ALL_KNOWN),
        ([CLEAN, FINDING], ["  a 1: CVE-1, mended in 2, 3"], audit.ALL_KNOWN),
        ([CLEAN, SKIPPED], [], "the database does not answer for 1 of 2 packages"),
    ],
)
def test_known_vulnerabilities(tmp_path, packages, found, looked_up):
    """A package that the database does not know is not taken for a safe one."""
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\necho '{json.dumps({'dependencies': packages})}'\n", "utf-8")
    program.chmod(0o755)
    assert audit.known_vulnerabilities(tmp_path, Path("requirements.txt")) == (found, looked_up)


@pytest.mark.parametrize(
    ("status", "errors", "refusal", "right"),
    [
        (0, "a warning", None, True),
        (1, "Traceback", None, False),
        (2, "optimum-dern: error: lm-eval is not installed; run it", "lm-eval is not installed", True),
        (2, "optimum-dern: error: no such task", "lm-eval is not installed", False),
        (1, "ModuleNotFoundError: lm-eval is not installed", "lm-eval is not installed", False),
        (0, "", "lm-eval is not installed", False),
    ],
)
def test_complaint(status, errors, refusal, right):
    """A command should succeed, or refuse on one line."""
    result = CompletedProcess([], status, "", errors)
    assert (every_command.complaint(result, refusal) is None) == right


def test_compare():
    """Tokens are counted, differences are signed; a refusal equals nothing."""
    wanted = {"tokens": [[1, 2], [3, 4]], "logs": [-1.0, -2.0]}
    assert compare_clients.compare(wanted, wanted) == ("4 | 0.0e+00 | +0.0e+00", True)
    found = {"tokens": [[1, 2], [3, 5]], "logs": [-1.5, -2.0]}
    assert compare_clients.compare(found, wanted) == ("3 | 5.0e-01 | -2.5e-01", False)
    assert compare_clients.compare({"error": "no kernel"}, wanted) == ("refused: no kernel | | ", False)
