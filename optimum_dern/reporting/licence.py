"""The licence of the source model, as its own card names it."""

from pathlib import Path


__all__ = ["source_licence"]

KEYS = ("license", "license_name", "license_link")


def source_licence(source: str | None, revision: str | None, is_hub_id: bool) -> dict[str, str]:
    """What the card of a source model says about its licence, where that card is on this machine.

    Args:
        source: folder or Hub id.
        revision: of a Hub model.
        is_hub_id: which of the two it is.

    Returns:
        `license`, `license_name` and `license_link` as far as they are given; nothing is downloaded.
    """
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from yaml import YAMLError

    if source is None:
        return {}
    path = try_to_load_from_cache(source, "README.md", revision=revision) if is_hub_id else Path(source, "README.md")
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (ValueError, YAMLError):  # a card that nobody can read says nothing
        return {}
    licence = {key: data.get(key) for key in KEYS if isinstance(data.get(key), str)}
    if "://" not in licence.get("license_link", "://"):  # a file of the source repository
        link = licence.pop("license_link")
        if is_hub_id:
            licence["license_link"] = f"https://huggingface.co/{source}/blob/{revision or 'main'}/{link}"
    return licence
