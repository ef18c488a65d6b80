"""Run a script of this folder in another process, optionally with another transformers, and read its result."""

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch


def run_elsewhere(script, result, *arguments, path=None):
    """Run `script RESULT ARGUMENT...`, and load what it writes to the file `result`.

    Args:
        script: name of a script beside this file.
        result: file for `torch.save`.
        *arguments: of the script.
        path: folder with the packages that come first, such as that of another transformers.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = forked.run  # this transformers is imported there already
    if path is not None:
        environment["PYTHONPATH"], run = str(path), subprocess.run
    command = [sys.executable, Path(__file__).with_name(script), result, *arguments]
    run(command, check=True, env=environment, cwd=result.parent)
    return torch.load(result, weights_only=True)


def transformers_4():
    """Return the folder with transformers 4, or skip the test where there is none."""
    path = os.environ.get("DERN_TRANSFORMERS4")
    if not path:
        pytest.skip("DERN_TRANSFORMERS4 names no folder with transformers 4")
    return path
