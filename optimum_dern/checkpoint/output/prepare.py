"""Check an output folder before any work."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from .. import WORK_NAME
from .foreign import check_no_foreign
from .manifest import only_process


__all__ = ["prepare_output"]


def prepare_output(source: Path, output: Path, restart: bool, overwrite: bool, names: Sequence[str] = (".",)) -> Path:
    """Check an output folder, and discard an unfinished run in it if asked to.

    Args:
        source: folder of the checkpoint that is to be compressed.
        output: folder, which need not exist.
        restart: discard an unfinished run.
        overwrite: allow other files in it, but none that would decide what the result loads as.
        names: of the results' folders in it.

    Returns:
        The folder.

    Raises:
        ValueError: a file, the source itself, or a folder with other files.
        RuntimeError: another process is at it.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder for the compressed checkpoint")
    if output.resolve() == source.resolve():
        raise ValueError("source and output are the same folder; the source would be lost, choose another output")
    work = output / WORK_NAME
    if work.is_dir() and restart:
        with only_process(work):
            shutil.rmtree(work)
    if output.is_dir() and any(output.iterdir()) and not (overwrite or work.is_dir()):
        raise ValueError(f"{output} is not empty; choose another folder, or allow to overwrite it")
    check_no_foreign(output / name for name in names)
    return output
