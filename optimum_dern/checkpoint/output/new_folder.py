"""Folders of results: new ones that get their names once they are whole, and others that files are put into.

Until it is whole, a new folder lies beside its final name as `NAME.partial`.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from ...errors import naming


__all__ = ["check_new", "check_no_part", "folder_to_fill", "new_folder"]

PROBE = bytes(1 << 12)


def check_new(output: Path) -> None:
    """Refuse an output that exists, whole or in part: nothing of others is ever removed.

    Raises:
        FileExistsError: the message says what to do.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists; give a new folder")
    check_no_part(output)


def check_no_part(output: Path) -> None:
    """Refuse an output that is being written, or was when its run was killed: what others have made stays.

    Raises:
        FileExistsError: the message says what to do.
    """
    if (part := _part(output)).exists():
        raise FileExistsError(f"{part} exists, of a run that goes on or was killed; remove it if none runs")


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


@contextmanager
def new_folder(output: Path, replace: bool = False) -> Iterator[Path]:
    """Make a folder that has its final name only once the context is left without an error; else nothing stays.

    Args:
        output: the final name; what is there must be an empty folder.
        replace: the folder that is there may have files, which go once the new one is whole.

    Raises:
        FileExistsError: another run is writing it.
    """
    check_no_part(output)
    (part := _part(output)).mkdir(parents=True)
    try:
        yield part
        if replace and output.exists():
            _replace(output, part)
        else:
            part.replace(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _replace(output: Path, part: Path) -> None:
    """Exchange two whole folders, so that at no moment a half-removed one has the name; removes the earlier one."""
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as aside:
        earlier = output.rename(Path(aside) / "earlier")
        try:
            part.replace(output)
        except BaseException:
            earlier.replace(output)
            raise


@contextmanager
def folder_to_fill(folder: Path) -> Iterator[None]:
    """Open the context of the work whose results go into a folder, which may have other files: it is made first.

    Args:
        folder: what is made of it goes again on an error, unless something is in it by then.

    Raises:
        OSError: it cannot be written to, which is found before the work.
        ValueError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with naming(folder), TemporaryFile(dir=folder) as probe:
            probe.write(PROBE)
            probe.flush()
        yield
    except BaseException:
        for path in made:
            if any(path.iterdir()):
                break
            path.rmdir()
        raise
