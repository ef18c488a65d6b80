"""Names of models and datasets in published files, without the local folders that contain them.

A Hub id, the name of a dataset and a path inside the working folder are useful to others; an absolute path only
reveals whose machine it was.
"""

import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any


__all__ = ["is_hub_id", "public_paths", "public_source"]


def is_hub_id(name: Any) -> bool:
    """Return whether a name is a valid id of a Hub repository, with a namespace or without one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None


def public_source(name: str | None) -> str | None:
    """Return the Hub id of a model, or the last part of its local path.

    Args:
        name: id or path as given by the user; None for a model without a source.
    """
    if name is None:
        return None
    folder = os.path.expanduser(name)
    if os.path.isdir(folder) or _leads_elsewhere(name) or name.startswith("./") or name.count("/") > 1:
        return os.path.basename(os.path.abspath(folder))
    return name


def public_paths(names: Iterable[str]) -> dict[str, str]:
    """Map data sources to distinct names that can be published.

    Args:
        names: paths, and names of datasets.

    Returns:
        The public name of each given name: for a path outside the working folder its last part, or as many parts as
        are needed to distinguish it from others; for everything else the name itself.
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
