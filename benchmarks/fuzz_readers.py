"""Every reader of other people's files, with a valid file for each: what `fuzz.py` breaks."""

import argparse
import contextlib
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_dern.checkpoint.format.reader import stored_tensors
from optimum_dern.checkpoint.format.tensor_file import read_header
from optimum_dern.checkpoint.output.manifest import Manifest
from optimum_dern.checkpoint.source.recorded import KEY, RecordedStatistics
from optimum_dern.commands.look import report
from optimum_dern.commands.shared.arguments import _read_fields
from optimum_dern.core.layer.statistics import ExpertStatistics
from optimum_dern.data.batches import load_batches
from optimum_dern.data.files import read_rows, read_text
from optimum_dern.evaluation.agreement.logits_cache import LogitsCache
from optimum_dern.evaluation.tasks.load import load_tasks
from optimum_dern.options import DernOptions
from optimum_dern.patterns.library import PatternLibrary
from optimum_dern.results.report import CompressionReport, LayerReport, ModelSize


__all__ = ["READERS"]

CALIBRATION = {"dataset": "x", "sha256": "x", "sequences": 1, "tokens": 9}


def tokenizer() -> PreTrainedTokenizerFast:
    symbols = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(symbols | {"<eos>": 256}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    template = "{% for message in messages %}{{ message.role + ': ' + message.content }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", chat_template=template)


TOKENIZER = tokenizer()


def tensors() -> bytes:
    return save({"model.a": torch.zeros(4, 3), "model.b": torch.ones(2, dtype=torch.bfloat16), "c": torch.arange(5)})


def index() -> bytes:
    files = {"model.a": "model-1.safetensors", "model.b": "model-2.safetensors"}
    return json.dumps({"metadata": {"total_size": 52}, "weight_map": files}).encode()


def made_report() -> bytes:
    shares = {"load": [0.5, 0.5], "saliency": [1.0, 2.0], "retained": [1], "errors": {"pruned": 0.1}}
    rest = {"winner": "pruned", "moved_share": None, "similarity_quantiles": None, "seconds": 0.1}
    layer = LayerReport(name="model.layers.0.mlp", layer=0, tokens=9, held_out_tokens=1, **shares, **rest)
    size = ModelSize(10, 5, 40, 2, 4)
    made = CompressionReport("a/b", None, "mixtral", "dern", DernOptions().__dict__, CALIBRATION, size, size, [layer])
    return json.dumps(made.to_dict()).encode()


def library() -> bytes:
    tasks = {"code": {"tokens": 5}}
    facts = {"model": {"name": "m"}, "layers": [0, 1], "tasks": tasks, "settings": {"top": 1, "confidence": None}}
    return json.dumps({"format": 1, **facts}).encode()


def read_index(folder: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (folder / name).write_bytes(tensors())
    stored_tensors(folder)


def read_config(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(tensors())
    stored_tensors(folder)


def statistics() -> bytes:
    described = {"options": {}, "calibration": {}, "source": "m", "model config": "x"}
    values = vars(ExpertStatistics.zeros(2, 3))
    values = {f"0.{name}": torch.as_tensor(value).clone() for name, value in values.items()}
    return save(values, {KEY: json.dumps(described)})


def read_statistics(folder: Path) -> None:
    recorded = RecordedStatistics(folder / "s.safetensors")
    recorded.check({"model config": "x"}, [0])
    recorded.read(0)


def chats() -> bytes:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = ({"messages": messages}, {"conversations": turns}, {"instruction": "a", "input": "b", "output": "c"})
    tokens = ({"input_ids": [1, 2, 3]}, {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [0, 1]]})
    return json.dumps([*rows, *tokens, {"prompt": "a", "completion": "b"}]).encode()


def read_chats(folder: Path) -> None:
    load_batches(folder / "chats.json", TOKENIZER, num_samples=9, sequence_length=8)


def bytes_of(write: Callable[[Any], Any]) -> bytes:
    write(buffer := io.BytesIO())
    return buffer.getvalue()


def questions() -> bytes:
    rows = [{"context": "a", "choices": ["b", "c"], "label": 1, "question": "q"}] * 2
    return "\n".join(map(json.dumps, rows)).encode()


def cached() -> bytes:
    facts = {"format": 1, "model": "m", "vocabulary": 9, "top_k": 2, "texts": {"a": 1}}
    return json.dumps(facts).encode()


def read_cached(folder: Path) -> None:
    ids = torch.ones(1, 2, dtype=torch.int64)
    (folder / "text-000-batch-00000.safetensors").write_bytes(save({"input_ids": ids, "attention_mask": ids.clone()}))
    LogitsCache.load(folder).holds({"a": [{"input_ids": ids, "attention_mask": ids}]})


def read_report(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        report.run(argparse.Namespace(checkpoint=folder, output=folder / "page.html", card=False))


def options() -> bytes:
    return json.dumps({"num_experts": 4, "dataset": {"a.txt": 1.0}, "protect_experts": {"0": [1]}}).encode()


def read_options(folder: Path) -> None:
    DernOptions(**_read_fields(folder / "options.json"))


def read_library(folder: Path) -> None:
    (folder / "patterns.safetensors").write_bytes(save({"code": torch.zeros(2, 8)}))
    PatternLibrary.load(folder)


READERS: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], Any]]] = {  # file name, a valid file, reader
    "header": ("model.safetensors", tensors, lambda folder: read_header(folder / "model.safetensors")),
    "index": ("model.safetensors.index.json", index, read_index),
    "config": (
        "config.json",
        lambda: b'{"transformers_weights": "a.safetensors", "num_experts": 8}',
        read_config,
    ),
    "report": ("dern_report.json", made_report, read_report),
    "retained": ("r.json", made_report, lambda folder: DernOptions(protect_experts=str(folder / "r.json"))),
    "options": ("options.json", options, read_options),
    "statistics": ("s.safetensors", statistics, read_statistics),
    "cache": ("cache.json", cached, read_cached),
    "tasks": ("q.jsonl", questions, lambda folder: load_tasks([folder / "q.jsonl"])),
    "chats": ("chats.json", chats, read_chats),
    "tensors": (
        "rows.pt",
        lambda: bytes_of(lambda file: torch.save([torch.arange(9), torch.arange(4)], file)),
        lambda folder: load_batches(folder / "rows.pt", None),
    ),
    "parquet": (
        "rows.parquet",
        lambda: bytes_of(lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), file)),
        lambda folder: load_batches(folder / "rows.parquet", TOKENIZER),
    ),
    "manifest": (
        "manifest.json",
        lambda: b'{"fingerprint": {"a": 1}, "layers": {"0": null}, "tensors": {"x": "y"}}',
        lambda folder: Manifest(folder, {"a": 1}).layers,
    ),
    "library": ("library.json", library, read_library),
    "jsonl": ("rows.jsonl", lambda: b'{"text": "a"}\n{"text": "b"}\n', lambda f: list(read_rows(f / "rows.jsonl"))),
    "json": ("rows.json", lambda: b'[{"text": "a"}, {"text": "b"}]', lambda f: list(read_rows(f / "rows.json"))),
    "text": ("words.txt", lambda: "Some wörds.\r\nMore\n".encode(), lambda folder: read_text(folder / "words.txt")),
    "gzip": (
        "words.txt.gz",
        lambda: gzip.compress(b"words " * 9),
        lambda f: read_text(f / "words.txt.gz"),
    ),
}
