"""Where a model came from: its name, revision, config file and tokenizer, as far as they are still at hand."""

import json
from pathlib import Path
from typing import Any


__all__ = ["model_source", "source_config", "source_file", "source_tokenizer"]


def model_source(model: Any) -> tuple[str | None, str | None]:
    """The name (Hub id or path) and the revision that a model was loaded from; None for what is not known."""
    return model.config.name_or_path or None, getattr(model.config, "_commit_hash", None)


def source_file(model: Any, filename: str) -> Path | None:
    """A file of the checkpoint that a model was loaded from, on this machine; None where there is none."""
    from transformers.utils import cached_file

    name, revision = model_source(model)
    if name is None:
        return None
    found = cached_file(
        name,
        filename,
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def source_config(model: Any) -> dict[str, Any] | None:
    """The JSON that a model's config was loaded from, or None where it came from no file that is still at hand."""
    path = source_file(model, "config.json")
    return None if path is None else json.loads(path.read_text("utf-8"))


def source_tokenizer(model: Any) -> Any:
    """The tokenizer of the checkpoint that a model was loaded from; None for a model that was made in memory."""
    from transformers import AutoTokenizer

    name, revision = model_source(model)
    return None if name is None else AutoTokenizer.from_pretrained(name, revision=revision)
