"""Detection of folders and repositories that hold a PEFT adapter instead of a whole model."""

import json
from pathlib import Path


__all__ = ["ADAPTER_NAME", "check_whole_model"]

ADAPTER_NAME = "adapter_config.json"


def check_whole_model(model: str | Path, folder: Path) -> None:
    """Refuse a folder that holds an adapter where a whole model is expected.

    Args:
        model: as the user gave it.
        folder: with its files, among which no weights of a whole model were found.

    Raises:
        FileNotFoundError: the folder has an adapter's config.
    """
    path = folder / ADAPTER_NAME
    if not path.is_file():
        return
    base = json.loads(path.read_text("utf-8")).get("base_model_name_or_path") or "its base"
    raise FileNotFoundError(
        f"{model} is an adapter of {base} without the weights of a whole model; merge it into its base first, and "
        f"give the new folder: AutoPeftModelForCausalLM.from_pretrained({str(model)!r}).merge_and_unload()"
        ".save_pretrained(NEW_FOLDER), of peft (the tokenizer goes there, too)"
    )
