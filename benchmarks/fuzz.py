"""Broken and hostile files for every reader of other people's files: each is read, or refused in plain words.

    python benchmarks/fuzz.py --inputs 200000             # some five minutes on one core; counts by reader
    python benchmarks/fuzz.py --reader header --seed 7

Inputs are valid files with bytes flipped, cut, doubled and inserted, and JSON values replaced by others: huge and
negative numbers, other types, names that leave the folder, deep nesting.  An input counts as a failure if its reader
raises anything but a deliberate refusal, takes longer than ten seconds, needs more memory than the limit, writes
anything, or imports anything.
"""

import argparse
import contextlib
import gzip
import io
import json
import logging
import random
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
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
from optimum_dern.errors import is_deliberate
from optimum_dern.evaluation.agreement.logits_cache import LogitsCache
from optimum_dern.evaluation.tasks.load import load_tasks
from optimum_dern.options import DernOptions
from optimum_dern.patterns.library import PatternLibrary
from optimum_dern.results.report import CompressionReport, LayerReport, ModelSize


CALIBRATION = {"dataset": "x", "sha256": "x", "sequences": 1, "tokens": 9}
SECONDS, MEMORY = 10.0, 8 << 30
LAZY = ("encodings", "jinja2.debug")  # modules that the standard library and jinja import for an error
PATHS = ["../../etc/passwd", "/etc/passwd", "C:\\x", "a/../..", "\0", "\ud800"]
NUMBERS = [0, -1, 1 << 63, 1 << 70, 1e308, -0.5]
VALUES = [*NUMBERS, True, None, "", "x", *PATHS, [], [[]], {}, {"a": {}}, ["x"] * 50, [1, 2, 3]]
INSERTED = (b"[" * 2000, b'{"a":' * 2000, b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"1" * 400, b"1" * 5000)


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


def main() -> None:
    args = parse_arguments()
    logging.disable(logging.WARNING)  # of rows that are left out
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    names, counts, failures = args.reader or list(READERS), Counter(), 0
    for name in names:  # what readers import for valid files counts for nothing
        file, valid, read = READERS[name]
        if (outcome := attempt(file, valid(), read)) == "refused" or "Error" in outcome:
            sys.exit(f"{name}: a valid file is not read: {outcome}")
    started = time.perf_counter()
    for number in range(args.inputs):
        name = names[number % len(names)]
        file, valid, read = READERS[name]
        draw = random.Random(f"{args.seed} {name} {number}")
        content = mutated(valid(), draw)
        outcome = attempt(file, content, read)
        counts[name, outcome if outcome in ("read", "refused") else "failed"] += 1
        if outcome not in ("read", "refused"):
            failures += 1
            print(f"{name} {number}: {outcome}\n  {content[:300]!r}", flush=True)
            if failures >= args.most:
                break
    print(f"\n{sum(counts.values()):,} inputs in {time.perf_counter() - started:.0f} s, {failures} failures")
    for name in names:
        print(f"{name:11}", *(f"{kind} {counts[name, kind]:>8,}" for kind in ("read", "refused", "failed")))
    sys.exit(failures > 0)


def attempt(file: str, content: bytes, read: Callable[[Path], Any]) -> str:
    """Read a file in a folder of its own; returns "read", "refused", or what is wrong."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "inside"
        folder.mkdir()
        (folder / file).write_bytes(content)
        modules, started, outcome = set(sys.modules), time.perf_counter(), "read"
        try:
            read(folder)
        except Exception as error:
            outcome = "refused"
            if not is_deliberate(error) or isinstance(error, ImportError):
                outcome = "".join(traceback.format_exception(error)[-3:])
        if time.perf_counter() - started > SECONDS:
            return "took too long"
        if new := {m for m in set(sys.modules) - modules if not m.startswith(LAZY)}:
            return f"imported {sorted(new)[:3]}"
        return outcome if [entry.name for entry in Path(name).iterdir()] == ["inside"] else "wrote outside"


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Change a file once or several times, in its bytes or, where it is JSON, in its values."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        content = changed_value(content, draw) if draw.random() < 0.5 else changed_bytes(content, draw)
    return content


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    at, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 8, 64))
    kind = draw.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + length :]
    if kind == 2:
        return content[:at] + draw.randbytes(length) + content[at:]
    if kind == 3:
        return content[:at] + draw.randbytes(length) + content[at + length :]
    if kind == 4:
        return content[:at] + content[max(0, at - length) : at] * draw.choice((2, 9)) + content[at:]
    return content[:at] + draw.choice(INSERTED) + content[at:]


def changed_value(content: bytes, draw: random.Random) -> bytes:
    """Replace a value of the JSON in a file, or in the header of a safetensors file; nothing where there is none."""
    start, end = 0, len(content)
    if content[8:9] == b"{":
        start, end = 8, min(len(content), 8 + int.from_bytes(content[:8], "little"))
    try:
        tree = json.loads(content[start:end])
    except (ValueError, RecursionError):
        return content
    places = list(containers(tree))
    if not places:
        return content
    container, key = draw.choice(places)
    if isinstance(container, dict) and draw.random() < 0.2:
        container[str(draw.choice(VALUES))[:20]] = container.pop(key)
    elif draw.random() < 0.2:
        container.pop(key)
    else:
        container[key] = draw.choice(VALUES)
    text = json.dumps(tree).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[end:] if start else text


def containers(tree: Any) -> Any:
    """Yield every place of a value inside a JSON tree: the container, and the key or index."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from containers(tree[key])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="in all (default: %(default)s)")
    parser.add_argument("--reader", nargs="+", choices=READERS, help="(default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=10, help="failures before it ends (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
