"""Virtual environments under build/, each installed once, by pip, from PyPI."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


__all__ = ["BUILD", "CPU_TORCH", "ROOT", "install_in", "run_quietly"]

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build"
# The CPU build of torch lies on an index of its own; where that cannot be reached, PyPI's comes, of several GB.
CPU_TORCH = ["torch==2.13.0", "--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1"]


def run_quietly(command: list[str | Path], **environment: str) -> str:
    """Run a command and return what it prints; raises RuntimeError with the end of what it said where it fails."""
    variables = {**os.environ, "PYTHONPATH": "", **environment}  # nothing of this environment, unless asked for
    result = subprocess.run([str(part) for part in command], env=variables, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed: {(result.stdout + result.stderr)[-2000:]}")
    return result.stdout


def install_in(folder: Path, *calls: list[str] | Callable[[Path], list[str]], **environment: str) -> Path:
    """Make a virtual environment, unless it is there, and return its interpreter.

    Args:
        folder: of the environment.
        *calls: arguments of `pip install`, a call after the other, or a function of the interpreter that returns them.
        **environment: variables for them.
    """
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        run_quietly([sys.executable, "-m", "venv", "--clear", folder])
        for call in calls:
            arguments = call if isinstance(call, list) else call(python)
            run_quietly([python, "-m", "pip", "install", "--quiet", *arguments], **environment)
        done.touch()
    return python
