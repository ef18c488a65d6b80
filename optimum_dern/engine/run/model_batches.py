"""Calibration batches for a model: tokenized by its own tokenizer, cut to its context length, vocabulary checked."""

from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from ...checkpoint.source.provenance import load_tokenizer, source_tokenizer
from ...config import DernConfig
from ...data.batches import holds_text, load_batches
from ...data.files import listed, skipped_names
from ...data.sources import find_repository
from ...models.context_length import bounded_length
from ...results.description import describe_dataset


__all__ = ["load_model_batches"]

logger = getLogger(__name__)


def load_model_batches(
    config: DernConfig, model: Any, tokenizer: Any = None, trust_remote_code: bool = False
) -> list[dict]:
    """Load the calibration data of a config as token batches for a model.

    Args:
        config: the dataset, how much of it to use, and how to draw it.
        model: its weights need not be loaded.
        tokenizer: object, Hub id or path, for text; by default the one of the model's checkpoint.
        trust_remote_code: allow the tokenizer's own code to run.

    Returns:
        Dicts of `input_ids` and `attention_mask`, each (batch, sequence) int64.

    Raises:
        ValueError: the data cannot be read, is empty, or has token ids outside the model's vocabulary.
    """
    if tokenizer is None and holds_text(config.dataset):
        tokenizer = source_tokenizer(model, trust_remote_code)
    length = bounded_length(model.config, config.sequence_length)
    batches = load_batches(
        config.dataset,
        load_tokenizer(tokenizer, None, trust_remote_code) if isinstance(tokenizer, str | Path) else tokenizer,
        num_samples=config.num_samples,
        sequence_length=length,
        batch_size=config.batch_size,
        seed=config.seed,
        text_column=config.text_column,
    )
    _warn_of_few(config, sum(len(batch["input_ids"]) for batch in batches), length)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for batch in batches:
        outside = batch["input_ids"][(batch["input_ids"] < 0) | (batch["input_ids"] >= vocabulary)]
        if len(outside):
            raise ValueError(
                f"the calibration data has token {outside[0].item()}, but the model's vocabulary has {vocabulary} "
                "entries; give the tokenizer that belongs to the model"
            )
    return batches


def _warn_of_few(config: DernConfig, sequences: int, length: int) -> None:
    if sequences >= config.num_samples:
        return
    sources = config.dataset if isinstance(config.dataset, Mapping) else [config.dataset]
    names = [source for source in sources if isinstance(source, str | Path)]
    folders = [Path(name).expanduser() for name in names if find_repository(name) is None]
    skipped = [f"{folder}/{name}" for folder in folders if folder.is_dir() for name in skipped_names(folder)]
    logger.warning(
        "the calibration data (%s) gives %d sequences of up to %d tokens, fewer than num_samples=%d%s",
        describe_dataset(config.dataset),
        sequences,
        length,
        config.num_samples,
        f"; not read: {listed(skipped)}" if skipped else "",
    )
