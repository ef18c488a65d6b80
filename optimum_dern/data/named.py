"""Datasets known by a name: optimum's, and `general`, a mix of the kinds of text that models are used for.

    part             dataset on the Hub                     share   licence
    web              allenai/c4, English                     25 %   ODC-BY
    encyclopaedia    wikimedia/wikipedia in five languages   25 %   CC BY-SA 3.0
    code             ise-uiuc/Magicoder-OSS-Instruct-75K     20 %   MIT
    mathematics      open-web-math/open-web-math             15 %   ODC-BY
    chat             HuggingFaceH4/ultrachat_200k            15 %   MIT

They are read as streams.  Chats are a sequence each, written by the chat template; all other text is packed into whole
windows.  Where the Hub cannot be reached, the small sample in the folder `general` is taken instead.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from .chat import plain_chat
from .mix import Part, mix_samples
from .rows import SHUFFLE_BUFFER, row_samples
from .sources import Repository, open_repository
from .tokens import Reading, Sample, to_tokens, windows


__all__ = ["GENERAL", "SAMPLE", "named_samples", "preserved_random_state"]

logger = getLogger(__name__)
SAMPLE = Path(__file__).parent / "general"
WIKIPEDIA, LANGUAGES = "wikimedia/wikipedia", ("en", "de", "fr", "es", "zh")
GENERAL = (
    Part("web", Repository("allenai/c4", "en"), 25),
    *(Part(f"encyclopaedia_{code}", Repository(WIKIPEDIA, f"20231101.{code}"), 5) for code in LANGUAGES),
    Part("code", Repository("ise-uiuc/Magicoder-OSS-Instruct-75K"), 20),
    Part("mathematics", Repository("open-web-math/open-web-math"), 15),
    Part("chat", Repository("HuggingFaceH4/ultrachat_200k", split="train_sft"), 15),
)
COLUMNS = {"ise-uiuc/Magicoder-OSS-Instruct-75K": "solution"}  # of the text, where it is not "text"


def named_samples(name: str, count: int, reading: Reading, load: Callable[[Any, int], list[Sample]]) -> list[Sample]:
    """Load samples of one of `NAMED_DATASETS`.

    Args:
        name: of the dataset.
        count: samples wanted.
        reading: how text becomes samples.
        load: loads so many samples of a folder.
    """
    reading.text_tokenizer(name)
    return _general(count, reading, load) if name == "general" else _optimum(name, count, reading)


def _optimum(name: str, count: int, reading: Reading) -> list[Sample]:
    from optimum.gptq.data import get_dataset

    with preserved_random_state():  # optimum seeds the global generators
        rows = get_dataset(name, reading.tokenizer, nsamples=count, seqlen=reading.length, seed=reading.seed)
    return [Sample(*to_tokens(row, reading), name) for row in rows]


def _general(count: int, reading: Reading, load: Callable[[Any, int], list[Sample]]) -> list[Sample]:
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__bases__[0]  # of the client that the library uses, httpx or a later one
    try:
        return mix_samples(GENERAL, count, lambda repository, share: _domain(repository, share, reading))
    except (OSError, http_error) as error:  # of the Hub; files of the package are not read here
        logger.warning(
            "the datasets of 'general' cannot be read from the Hub (%s); the package's small sample of English books, "
            "news, mathematics and code is used instead",
            error.__cause__ or error,
        )
    return load(SAMPLE, count)


def _domain(repository: Repository, count: int, reading: Reading) -> list[Sample]:
    stream = open_repository(repository)
    if repository.name == "HuggingFaceH4/ultrachat_200k":
        if not getattr(reading.tokenizer, "chat_template", None):
            stream = stream.map(lambda row: {"messages": plain_chat(row["messages"])})
        return row_samples(stream, count, replace(reading, column="messages"), repository.name)
    column = COLUMNS.get(repository.name, "text")
    rows = stream.shuffle(seed=reading.seed, buffer_size=SHUFFLE_BUFFER)
    found = windows((row[column] or "" for row in rows), reading, count)
    return [Sample(window, torch.ones_like(window), repository.name) for window in found]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore Python's, numpy's and torch's global random state on exit."""
    import numpy

    python, array = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)
