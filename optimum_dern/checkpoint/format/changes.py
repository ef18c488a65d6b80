"""Files of a checkpoint that somebody changes or removes while it is read: noticed by their sizes and times."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .weight_files import weight_files


__all__ = ["FileStamps", "unchanged"]


class FileStamps:
    """Sizes and times of change of some files, to compare them with later.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps = {path: _stamp(path) for path in paths}

    def check(self) -> None:
        """Refuse to go on where one of the files is not what it was.

        Raises:
            ValueError: the message names the file.
        """
        for path in self._stamps:
            self.check_file(path)

    def check_file(self, path: Path) -> None:
        """Do so for one of them."""
        if _stamp(path) != self._stamps[path]:
            raise ValueError(
                f"{path} was {'changed' if path.exists() else 'removed'} during the run; put the earlier file back "
                "and give the same command again, or start over with the new one (compress: restart=True, --restart)"
            )


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Refuse what was read while the context was open if a file of some checkpoints has changed meanwhile.

    Args:
        *folders: of the checkpoints.

    Raises:
        ValueError: the message names the file.
    """
    stamps = FileStamps(path for folder in folders for path in (folder / "config.json", *weight_files(folder)))
    try:
        yield
    except Exception:
        stamps.check()  # a file that is cut short explains what a library says of it
        raise
    stamps.check()


def _stamp(path: Path) -> tuple[int, int] | None:
    """What tells one content of a file from another: its size and time of change; None without a file."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_size, found.st_mtime_ns
