"""Check an output folder before a run starts."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from .. import WORK_NAME
from .foreign import check_no_foreign
from .manifest import only_process


__all__ = ["check_output", "prepare_output"]


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written to; nothing is read or written.

    Args:
        source: folder of the checkpoint that is to be compressed; it may be a Hub id instead.
        output: folder, which need not exist.
        overwrite: allow other files in it; those of an unfinished run always may be there.

    Raises:
        ValueError: a file, the source itself, or a folder with other files.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder for the compressed checkpoint")
    if source.exists() and output.resolve() == source.resolve():
        raise ValueError("source and output are the same folder; the source would be lost, choose another output")
    if output.is_dir() and any(output.iterdir()) and not (overwrite or (output / WORK_NAME).is_dir()):
        raise ValueError(f"{output} is not empty; choose another folder or add --overwrite (overwrite=True)")


def prepare_output(source: Path, output: Path, restart: bool, overwrite: bool, names: Sequence[str] = (".",)) -> Path:
    """Check an output folder, and discard an unfinished run in it if asked to.

    Args:
        source: folder of the checkpoint to compress.
        output: folder, which need not exist.
        restart: discard an unfinished run.
        overwrite: allow other files in it, but none that programs would load instead of the result.
        names: of the results' folders in it.

    Returns:
        The output folder.

    Raises:
        ValueError: it is a file, the source itself, or a folder with other files.
        RuntimeError: another process is writing to it.
    """
    check_output(source, output, overwrite or restart)
    work = output / WORK_NAME
    if work.is_dir() and restart:
        with only_process(work):
            shutil.rmtree(work)
    check_output(source, output, overwrite)
    check_no_foreign(output / name for name in names)
    return output
