"""The examples run as they stand, on the trained models of the repository."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart_then_generate(tmp_path):
    """Compress and save with one script, write words with the other, in plain transformers."""
    first = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert first.returncode == 0, first.stderr
    assert "of the bytes" in first.stdout
    second = subprocess.run(
        [sys.executable, ROOT / "examples" / "generate.py", "build/quickstart", "The city of"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("4 experts: 'The city of")
