"""The origin of a loaded model: its name, revision, config file and tokenizer, where they are still available."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import explained
from ...text_files import read_object


__all__ = [
    "LOCATING",
    "OWN_CODE",
    "load_tokenizer",
    "locating_options",
    "location_options",
    "model_source",
    "source_config",
    "source_file",
    "source_tokenizer",
]

LOCATING = ("cache_dir", "subfolder", "token", "local_files_only", "force_download", "proxies")
OWN_CODE = "trust_remote_code"


def locating_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that tell where files are, except the revision."""
    return {name: options[name] for name in LOCATING if name in options}


def location_options(name: str, files: Sequence[str] | None) -> dict[str, Any]:
    """Find the cache and subfolder that weights were loaded from, as arguments of `from_pretrained`.

    Args:
        name: folder or Hub id that was given.
        files: paths of the weight files; None where the weights came from no file.
    """
    if not files:
        return {}
    folder = Path(files[0]).absolute().parent
    if Path(name).is_dir():
        root, cache = Path(name).absolute(), {}
    else:  # cache / models--owner--name / snapshots / commit / subfolder
        root = next((path for path in (folder, *folder.parents) if path.parent.name == "snapshots"), None)
        cache = {} if root is None else {"cache_dir": str(root.parents[2])}
    if root is None or not folder.is_relative_to(root):
        return {}
    subfolder = folder.relative_to(root).as_posix()
    return cache | ({} if subfolder == "." else {"subfolder": subfolder})


def model_source(model: Any) -> tuple[str | None, str | None]:
    """Return the name (Hub id or path) and revision that a model was loaded from, each None where unknown."""
    return model.config.name_or_path or None, getattr(model.config, "_commit_hash", None)


def source_file(model: Any, filename: str) -> Path | None:
    """Find a local file of the checkpoint that a model was loaded from; None where there is none."""
    from transformers.utils import cached_file

    name, revision = model_source(model)
    if name is None:
        return None
    options = getattr(model, "dern_loading", {})  # set while transformers loads it
    found = cached_file(
        name,
        filename,
        revision=revision,
        local_files_only=True,
        **{option: options[option] for option in ("cache_dir", "subfolder") if option in options},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def source_config(model: Any) -> dict[str, Any] | None:
    """Read the config.json that a model's config was loaded from; None where no such file is found."""
    path = source_file(model, "config.json")
    return None if path is None else read_object(path)


def source_tokenizer(model: Any, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of the checkpoint that a model was loaded from; None for a model created in memory."""
    name, revision = model_source(model)
    location = dict(getattr(model, "dern_loading", {}))
    trusts_code = location.pop(OWN_CODE, False) or trust_remote_code
    return None if name is None else load_tokenizer(name, revision, trusts_code, **location)


def load_tokenizer(
    name: str | Path, revision: str | None = None, trust_remote_code: bool = False, **location: Any
) -> Any:
    """Load a tokenizer from a folder or the Hub.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: allow the tokenizer's own code to run, without a prompt.
        **location: `LOCATING` arguments of `from_pretrained`.

    Raises:
        ValueError: the tokenizer has code of its own, which is not allowed to run, or its files are broken.
    """
    from transformers import AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code, **location}
    refusal = (
        f"the tokenizer of {name} has code of its own; read it, and allow it with trust_remote_code=True "
        "(--trust-remote-code), or give a tokenizer that is loaded already, or token ids instead of text"
    )
    try:
        with explained(f"the tokenizer of {name} cannot be loaded", "save it once more, or give another one"):
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(refusal) from error
    # Some releases of transformers, such as 5.18, then take a class without the tokenizer's own rules.
    own_code = tokenizer.init_kwargs.get("auto_map") or {}
    if not trust_remote_code and "AutoTokenizer" in own_code and type(tokenizer).__name__ == "TokenizersBackend":
        raise ValueError(refusal)
    return tokenizer
