"""Calibration batches for a model: the data that a config names, text that the model writes, and random tokens."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.source.provenance import load_tokenizer, source_tokenizer
from ...config import DernConfig
from ...data.batches import Sample, holds_text, largest_batch, load_samples, pad_batches
from ...data.files import listed, skipped_names
from ...data.made.random_tokens import random_sequences
from ...data.sources import RANDOM, SELF, find_repository
from ...data.tokens import added_bos
from ...models.attention import attention_scores, heeds_padding
from ...models.context_length import bounded_length
from ...results.description import describe_dataset
from ...results.public_names import public_paths
from .own_text import CannotWrite, OwnText, check_writes, special_ids, vocabulary_of


__all__ = ["load_model_batches", "sequences_in_all", "with_text_it_can_write", "writes_text"]

logger = getLogger(__name__)
RANDOM_INSTEAD = 0.25  # share of random token ids where the model cannot write text
UNKNOWN_ELSEWHERE = "all calibration data is of one source (%s): how the result does on other text is not known"


def writes_text(config: DernConfig) -> bool:
    """Return whether the model has to write calibration text: a share of it, or as a dataset of its own."""
    return config.self_share > 0 or asks_for_own_text(config)


def asks_for_own_text(config: DernConfig) -> bool:
    """Return whether text that the model writes is the dataset, or a source of it."""
    named = config.dataset if isinstance(config.dataset, Mapping) else [config.dataset]
    return any(isinstance(name, str) and name == SELF for name in named)


def load_model_batches(
    config: DernConfig,
    model: Any,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    own: OwnText | None = None,
    processes: int = 1,
) -> list[dict]:
    """Load the calibration data of a config as token batches for a model.

    Args:
        config: the dataset, the shares of the model's own text and of random tokens, and how much of it to use.
        model: its weights need not be loaded.
        tokenizer: object, Hub id or path, for text; by default the one of the model's checkpoint.
        trust_remote_code: allow the tokenizer's own code to run.
        own: writes the model's own text; without it there is none, which is for checks before the weights are there.
        processes: number of processes that share the batches.

    Returns:
        Dicts of `input_ids`, `attention_mask`, `source` and `position`, as `pad_batches` gives them.

    Raises:
        ValueError: the data cannot be read, is empty, or has token ids outside the model's vocabulary.
    """
    tokenizer = _tokenizer(config, model, tokenizer, trust_remote_code)
    length = bounded_length(model.config, config.sequence_length)
    made = _Made(config, model, tokenizer, length, own)
    samples = _read(config, tokenizer, length, made)
    _check_vocabulary(samples, model)
    samples += made.beside(len(samples))
    names = {sample.source for sample in samples}
    complete = own is not None or not writes_text(config)
    if config.refit and complete and len(names) == 1 and names != {SELF}:
        logger.warning("%s; self_share and random_share add text that protects it", UNKNOWN_ELSEWHERE % names.pop())
    longest = max([len(sample.ids) for sample in samples], default=0)
    most = largest_batch(attention_scores(model.config, longest))
    return pad_batches(samples, tokenizer, config.batch_size, most, processes, not heeds_padding(model.config))


def with_text_it_can_write(config: DernConfig, model: Any, check: Callable[[], None] = lambda: None) -> DernConfig:
    """Return the config with random tokens in place of the share of own text that a model cannot write.

    Args:
        config: of the compression.
        model: its weights need not be loaded.
        check: raises `CannotWrite` where anything else is in the way, such as the model's size.

    Raises:
        CannotWrite: the model's own text is the dataset, or a source of it.
    """
    if config.dataset is None or not writes_text(config):
        return config
    try:
        check_writes(model)
        check()
    except CannotWrite as reason:
        if asks_for_own_text(config):
            raise
        random = RANDOM_INSTEAD if config.random_share is None else config.random_share
        what = "only random token ids protect" if random else "nothing protects"
        logger.warning("no text by the model itself: %s; %s text unlike the dataset", reason, what)
        return replace(config, self_share=0.0, random_share=random)
    return config


def shares_beside(config: DernConfig) -> tuple[float, float]:
    """Return the shares of the model's own text and of random tokens beside a dataset."""
    return 0.0 if asks_for_own_text(config) else config.self_share, config.random_share or 0.0


def sequences_in_all(config: DernConfig) -> int:
    """Return the number of calibration sequences, if the dataset has as many as are asked for."""
    return round(config.num_samples / (1 - sum(shares_beside(config))))


def _tokenizer(config: DernConfig, model: Any, tokenizer: Any, trust_remote_code: bool) -> Any:
    """Load the tokenizer that is given or the model's own; None where there is none and the data needs none."""
    needed = holds_text(config.dataset)
    try:
        if tokenizer is None:
            tokenizer = source_tokenizer(model, trust_remote_code)
        elif isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer, None, trust_remote_code)
        elif not (callable(tokenizer) and hasattr(tokenizer, "all_special_ids")):
            raise TypeError(f"tokenizer={tokenizer!r:.80} is none; give one of transformers, a folder or a Hub id")
    except (OSError, ValueError) as reason:
        if needed:
            raise
        logger.info("no tokenizer for the text that the model writes: %s", reason)
        return None
    # For a folder without a tokenizer's files transformers makes one without any text, for some families.
    empty = not needed and tokenizer is not None and len(tokenizer) <= len(tokenizer.all_special_ids)
    return None if empty else tokenizer


class _Made:
    """Makes the sequences that are not read: the model's own text, and random tokens."""

    def __init__(self, config: DernConfig, model: Any, tokenizer: Any, length: int, own: OwnText | None) -> None:
        self.config, self.model, self.tokenizer, self.length, self.own = config, model, tokenizer, length, own

    def write(self, count: int) -> list[Sample]:
        """Return sequences that the model writes."""
        if self.own is None or not count:
            return []
        written = self.own.write(self.tokenizer, count, self.length, self.config.seed)
        return [Sample(ids, torch.ones_like(ids), SELF) for ids in written]

    def draw(self, count: int) -> list[Sample]:
        """Return sequences of random tokens."""
        left_out = special_ids(self.model, self.tokenizer)
        vocabulary, bos = vocabulary_of(self.model, self.tokenizer), added_bos(self.tokenizer)
        drawn = random_sequences(count, self.length, vocabulary, left_out, self.config.seed, bos)
        return [Sample(ids, torch.ones_like(ids), RANDOM) for ids in drawn]

    def beside(self, given: int) -> list[Sample]:
        """Return the sequences beside a number of given ones, so that they have the config's shares of all."""
        shares = shares_beside(self.config)
        counts = [max(1, round(given / (1 - sum(shares)) * share)) if share else 0 for share in shares]
        return self.write(counts[0]) + self.draw(counts[1])


def _read(config: DernConfig, tokenizer: Any, length: int, made: _Made) -> list[Sample]:
    """Load the sequences of the dataset, by the names of their sources under which it may be published."""
    wanted, makers = config.num_samples, {SELF: made.write, RANDOM: made.draw}
    samples = load_samples(config.dataset, tokenizer, wanted, length, config.seed, config.text_column, made=makers)
    if made.own is None and asks_for_own_text(config):
        return samples
    if not samples:
        raise ValueError(
            f"the calibration data ({describe_dataset(config.dataset)}) holds no token; give text that is not empty"
        )
    if len(samples) < wanted:
        _warn_of_few(config, len(samples), length)
    names = public_paths(dict.fromkeys(sample.source for sample in samples))
    return [sample._replace(source=names[sample.source]) for sample in samples]


def _check_vocabulary(samples: list[Sample], model: Any) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for sample in samples:
        outside = sample.ids[(sample.ids < 0) | (sample.ids >= vocabulary)]
        if len(outside):
            raise ValueError(
                f"the calibration data has token {outside[0].item()}, but the model's vocabulary has {vocabulary} "
                "entries; give the tokenizer that belongs to the model"
            )


def _warn_of_few(config: DernConfig, sequences: int, length: int) -> None:
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
