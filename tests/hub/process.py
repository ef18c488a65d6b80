"""Runs of scripts, and of the `hf` command, in processes that talk to the fake Hub."""

import sys
from pathlib import Path

import forked

from .server import LoopbackHub


__all__ = ["content", "run"]

TESTS = Path(__file__).parent.parent


def run(hub: LoopbackHub, folder: Path, program: str, *arguments: object, stdin: str = "") -> str:
    """Run one of the scripts in tests/, or `hf`, with `folder` for its temporary files and its home.

    Returns:
        Its standard output.
    """
    (folder / "tmp").mkdir(exist_ok=True)
    environment = hub.environment(folder / "home") | {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    script = ["-m", "huggingface_hub.cli.hf"] if program == "hf" else [str(TESTS / program)]
    command = [sys.executable, *script, *map(str, arguments)]
    done = forked.run(command, env=environment, input=stdin, capture_output=True, text=True, imported="torch")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def content(folder: Path) -> dict[str, bytes]:
    """Read every file of a folder, by its name in a repository."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
