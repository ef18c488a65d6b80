"""Licence and base model metadata of the source's model card, for the compressed model's card."""

import os
from pathlib import Path
from typing import Any

from .public_names import is_hub_id


__all__ = ["source_metadata"]

KEYS = ("license", "license_name", "license_link")


def source_metadata(source: str | None, revision: str | None) -> dict[str, Any]:
    """Read the licence and base model of a source model from its name and its model card.

    Args:
        source: folder or Hub id.
        revision: of a Hub model.

    Returns:
        `license`, `license_name`, `license_link` and `base_model` as far as they are known, for a card's metadata;
        nothing is downloaded.
    """
    if source is None:
        return {}
    # The Hub draws a model's tree from `base_model`, the models that it was directly made from, and takes ids alone.
    # That is the source; of one that has no id, its own base models are the nearest ancestors that the Hub knows.
    on_hub = is_hub_id(source) and "/" in source and not os.path.isdir(source)
    card = _card_data(source, revision, on_hub)
    named = card.get("base_model")
    bases = [source] if on_hub else named if isinstance(named, list) else [named]
    bases = [name for name in bases if is_hub_id(name) and "/" in name]  # a trainer's card may name a folder
    return _licence(card, source, revision, on_hub) | ({"base_model": bases} if bases else {})


def _licence(card: dict[str, Any], source: str, revision: str | None, on_hub: bool) -> dict[str, str]:
    licence = {key: card[key] for key in KEYS if isinstance(card.get(key), str)}
    if not licence.get("license_link", "https://").startswith(("https://", "http://")):  # a file beside the card
        link = licence.pop("license_link")
        if on_hub and "://" not in link:
            licence["license_link"] = f"https://huggingface.co/{source}/blob/{revision or 'main'}/{link}"
    return licence


def _card_data(source: str, revision: str | None, on_hub: bool) -> dict[str, Any]:
    """Read the metadata of a source's model card, if that is available locally."""
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from yaml import YAMLError

    folder = Path(source).expanduser()
    path = try_to_load_from_cache(source, "README.md", revision=revision) if on_hub else folder / "README.md"
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError):  # an unreadable card has no metadata
        return {}
