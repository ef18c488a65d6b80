"""A folder that gets its final name once it is whole; until then it lies beside it as `NAME.partial`."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


__all__ = ["check_no_part", "new_folder"]


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
