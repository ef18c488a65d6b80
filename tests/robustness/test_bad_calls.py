"""Bad arguments of the functions that users call, by table: refused in plain words before anything is read or written.

Every argument needs a row, or a reason why there is none.
"""

import inspect
import math

import pytest
import torch
from tiny import make_checkpoint, make_model, random_tokens, tiny_tokenizer

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.attribution.measure import attribute_experts
from optimum_dern.checkpoint.format.reader import CheckpointReader
from optimum_dern.data.batches import load_batches
from optimum_dern.errors import is_deliberate
from optimum_dern.evaluation.agreement.logits_cache import cache_logits
from optimum_dern.evaluation.loss.perplexity import evaluate_texts
from optimum_dern.model_merging.merge import merge_checkpoints
from optimum_dern.patterns.build import build_patterns


def compressor(**fields):
    return DernCompressor(**{"num_experts": 4, "dataset": random_tokens(), "preset": "fast", "self_share": 0} | fields)


class Call:
    """A call that works, the values that each of its arguments may not have, and arguments that take anything."""

    def __init__(self, run, signature, good, bad, free=()):
        self.run, self.signature, self.good, self.bad, self.free = run, signature, good, bad, free


BATCH = {"input_ids": torch.ones(1, 9, dtype=torch.int64), "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
BATCHES = {  # that no model of 300 tokens runs
    "a number": 5,
    "a text": "text",
    "of texts": ["text"],
    "without ids": [{"tokens": BATCH["input_ids"]}],
    "flat": [{"input_ids": BATCH["input_ids"][0]}],
    "fractions": [{"input_ids": torch.rand(1, 9)}],
    "empty": [{"input_ids": torch.ones(1, 0, dtype=torch.int64)}],
    "beyond": [{"input_ids": 300 * BATCH["input_ids"]}],
    "no mask": [{"input_ids": BATCH["input_ids"]}],
    "negative": [{"input_ids": -BATCH["input_ids"]}],
    "mask": [BATCH | {"attention_mask": 2 * BATCH["attention_mask"]}],
}
LISTS = [{"a": batches} for name, batches in BATCHES.items() if isinstance(batches, list) and name != "no mask"]
PATHS = (5, None, b"x", ["x"], "a\0b", "\ud800", "")
DEVICES = ("astrology", "cuda:99", 1.5, ["cpu"])
HUB = ("trust_remote_code", "token", "revision", "cache_dir", "local_files_only", "force_download", "source")
CALLS = {
    "compress_checkpoint": Call(
        lambda **given: compressor().compress_checkpoint(**given),
        DernCompressor.compress_checkpoint,
        {"model": "MODEL", "output": "OUT"},
        {
            "model": (*PATHS, "no/such/folder/x"),
            "output": PATHS[:-1],
            "tokenizer": (5, b"x", object()),
            "num_experts": (0, "4", 1.5, [], [4, 4], [4, "x"], 99),
            "sparsity": (1, -0.1, math.nan, "half", []),
            "statistics": ("no/such/file", "a\0b"),
            "device": DEVICES,
            "dtype": ("int8", "float7", 5),
            "max_shard_size": ("x", "-1GB", -5, math.nan),
            "max_memory": ("x", "-1GB", -5, math.nan),
            "subfolder": (5, None, "no/such", "a\0b"),
        },
        ("self", *HUB, "restart", "overwrite"),
    ),
    "compress_model": Call(
        lambda **given: compressor().compress_model(**given),
        DernCompressor.compress_model,
        {"model": make_model("mixtral")},
        {
            "model": (5, None, "x", {}, torch.zeros(1)),
            "tokenizer": (5, b"x", object()),
            "batches": tuple(BATCHES[name] for name in BATCHES if name != "no mask"),
        },
        ("self", *HUB),
    ),
    "config": Call(DernCompressor, DernCompressor, {}, {"config": (5, "x", {"sparsity": 0.5})}, ("fields",)),
    "from_dict": Call(
        DernConfig.from_dict,
        DernConfig.from_dict,
        {},
        {"config_dict": (5, None, "x", [1])},
        ("return_unused_kwargs", "kwargs"),
    ),
    "load_batches": Call(
        load_batches,
        load_batches,
        {"dataset": ["some text"], "tokenizer": tiny_tokenizer()},
        {
            "dataset": (
                5,
                None,
                b"x",
                "",
                "no/such/folder/x",
                [],
                [""],
                [5],
                [None],
                [b"x"],
                {"x": -1},
                dict,
                torch.tensor(1),
            ),
            "tokenizer": (5, None, "x", object()),
            "batch_tokens": (0, -1, "x"),
            "text_column": (5, None, ["text"]),
            "seed": (-1, 2**32, 1.5, None),
            **dict.fromkeys(("num_samples", "sequence_length", "batch_size"), (0, -1, 1.5, "4", True)),
        },
    ),
    "build_patterns": Call(
        build_patterns,
        build_patterns,
        {"model": "MODEL", "tasks": {"a": [BATCH]}},
        {
            "model": PATHS,
            "tasks": (5, "x", {}, *({"a": batches} for batches in BATCHES.values())),
            "top": (0, 9, 1.5, "x"),
            "confidence": (0, 1, math.nan, "x"),
            "device": DEVICES,
        },
        HUB,
    ),
    "attribute_experts": Call(
        attribute_experts,
        attribute_experts,
        {"model": "MODEL", "texts": {"a": [BATCH]}},
        {
            "model": PATHS,
            "texts": (5, "x", {}, *({"a": batches} for batches in BATCHES.values())),
            "tokenizer": (5, object()),
            "device": DEVICES,
        },
        HUB,
    ),
    "merge_checkpoints": Call(
        merge_checkpoints,
        merge_checkpoints,
        {"base": "MODEL", "checkpoints": ["MODEL", "MODEL"], "output": "OUT", "method": "ties"},
        {
            "base": PATHS,
            "checkpoints": (5, "x", [], ["MODEL"], [5, 5]),
            "output": PATHS[:-1],
            "method": ("average", 5),
            "texts": ([[BATCH], [BATCH]],),
            "settings": (5,),
            "strength": (math.nan, "x"),
            "density": (0, 1.5, math.nan, "x"),
            "layerwise": (1, "yes"),
            "seed": (-1, None, "x"),
            "device": DEVICES,
        },
        HUB,
    ),
    "cache_logits": Call(
        cache_logits,
        cache_logits,
        {"model": make_model("mixtral"), "texts": {"a": [BATCH]}, "folder": "OUT"},
        {
            "texts": ({}, *({"a": batches} for batches in BATCHES.values() if isinstance(batches, list))),
            "top_k": (0, -1),
        },
        ("model", "folder", "overwrite", "name"),
    ),
    "evaluate_texts": Call(
        evaluate_texts,
        evaluate_texts,
        {"model": make_model("mixtral"), "texts": {"a": [BATCH]}},
        {"texts": LISTS},
        ("model",),
    ),
}
ROWS = [
    pytest.param(call, name, value, id=f"{title}-{name}-{type(value).__name__}-{number}")
    for title, call in CALLS.items()
    for name, values in call.bad.items()
    for number, value in enumerate(values)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    make_checkpoint(folder / "MODEL")
    return folder


def no_long_work(*_, **__):
    raise AssertionError("weights are read before the arguments are checked")


@pytest.mark.parametrize(("call", "name", "value"), ROWS)
def test_calls(call, name, value, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(CheckpointReader, "read", no_long_work)
    before = sorted(folder.rglob("*"))
    with pytest.raises(Exception) as error:
        call.run(**call.good | {name: value})
    assert is_deliberate(error.value), repr(error.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("title", CALLS)
def test_every_argument_has_a_row(title):
    call = CALLS[title]
    assert set(inspect.signature(call.signature).parameters) <= {*call.bad, *call.free}
