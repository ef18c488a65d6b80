"""What published files call a model or a dataset: never by the folders of the machine that they lay on.

A Hub id, the name of a dataset and a path inside the working folder tell others something; an absolute path tells them
only whose machine it was.
"""

import os
from collections.abc import Iterable
from pathlib import PurePath


__all__ = ["public_paths", "public_source"]


def public_source(name: str | None) -> str | None:
    """The Hub id of a model, or the name of its folder.

    Args:
        name: id or path, as the user gave it; None for a model that came from nowhere.
    """
    if name is None:
        return None
    folder = os.path.expanduser(name)
    if os.path.isdir(folder) or _leads_elsewhere(name) or name.startswith("./") or name.count("/") > 1:
        return os.path.basename(os.path.abspath(folder))
    return name


def public_paths(names: Iterable[str]) -> dict[str, str]:
    """What to call sources of data, each by a name of its own.

    Args:
        names: paths, and names of datasets.

    Returns:
        Names by what was given: of a path that leads out of the working folder the last part, and where two would have
        the same, as many parts more as tell them apart; everything else as it is.
    """
    names = list(names)
    private = [name for name in names if _leads_elsewhere(name)]
    parts = {name: [part for part in PurePath(name).parts if part not in (os.sep, "..")] for name in private}
    public = {name: name for name in names}
    for count in range(1, 1 + max(map(len, parts.values()), default=0)):
        public |= {name: "/".join(parts[name][-count:]) for name in private}
        if len(set(public.values())) == len(public):
            break
    return public


def _leads_elsewhere(name: str) -> bool:
    return os.path.isabs(name) or PurePath(name).parts[:1] == ("..",) or name.startswith("~")
