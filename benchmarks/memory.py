"""Peak memory, time and bytes read of compressing a checkpoint that is larger than the memory allowed for it.

Writes random checkpoints in Mixtral's layout with several depths, compresses each in a process of its own under an
address-space limit, and prints a table and one JSON line.  With `--max-memory` the process gets that bound, which is
also set as the limit of its anonymous memory: memory-mapped files do not count there, and are reported separately.

python benchmarks/memory.py --layers 4 8 12 --limit 3GiB --threads 2
python benchmarks/memory.py --layers 2 --experts 146 --max-memory 1.5GiB --sequences 8 --sequence-length 128
python benchmarks/memory.py --layers 2 --method dern --recommended --max-memory 8GiB
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from optimum_dern.checkpoint.output.shards import OutputTensor, ShardWriter, parse_bytes, plan_shards, publish_shards


CHILD = """
import json, resource, sys, threading, time
limit, threads, source, output, options = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], json.loads(sys.argv[5])
kind = resource.RLIMIT_DATA if options.get("max_memory") else resource.RLIMIT_AS
resource.setrlimit(kind, (limit, limit))
import torch
torch.set_num_threads(threads)
from optimum_dern import DernCompressor
from optimum_dern.checkpoint.format.reader import CheckpointReader
readers, init = [], CheckpointReader.__init__
CheckpointReader.__init__ = lambda self, folder: (init(self, folder), readers.append(self))[0]
tokens = torch.randint(1000, (options.pop("sequences"), options["sequence_length"]), generator=torch.manual_seed(0))
import transformers, optimum_dern.engine.run.checkpoint, optimum_dern.engine.run.prepare as preparation
plans, plan = [], preparation.plan_memory
preparation.plan_memory = lambda *args: (plans.append(plan(*args)), plans[-1])[1]
peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}

def sample():
    while True:
        for line in open("/proc/self/status"):
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(0.02)

from optimum_dern.machine.allocator import return_large_blocks
return_large_blocks()  # as the command line does with --max-memory
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
started = time.perf_counter()
threading.Thread(target=sample, daemon=True).start()
bound = {"max_memory": options.pop("max_memory")} if "max_memory" in options else {}
compressor = DernCompressor(dataset=[{"input_ids": row} for row in tokens], self_share=0.0, **options)
compressor.compress_checkpoint(source, output, **bound)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "interpreter_bytes": base,
    "sampled_bytes": peaks,
    "predicted_bytes": plans[0].peak,
    "experts_in_file": plans[0].experts_in_file,
    "hidden_in_file": plans[0].spilled,
    "bytes_read": readers[0].bytes_read,
    "source_bytes": readers[0].bytes,
}))
"""


def main() -> None:
    """Compress a checkpoint of every depth, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 12])
    parser.add_argument("--experts", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--limit", default="3GiB", help="address space of the compressing process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", default="prune")
    parser.add_argument("--recommended", action="store_true", help="with the refits of router and neurons")
    parser.add_argument("--max-memory", help="the bound to keep; replaces --limit")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="for the checkpoints; a temporary one by default")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append({"layers": layers, **measure(args, layers, Path(folder))})
            print(row_text(rows[-1]), flush=True)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("folder", "output")}
    result = json.dumps({"settings": settings, "rows": rows})
    print(result)
    if args.output:
        args.output.write_text(result + "\n", "utf-8")


def measure(args: argparse.Namespace, layers: int, folder: Path) -> dict:
    """Write a checkpoint, compress it under the limit, delete the output, and return what was measured."""
    layer_bytes = write_checkpoint(folder / "source", layers, args.experts, args.hidden, args.width)
    options = {
        "sparsity": 0.5,
        "method": args.method,
        **({} if args.recommended else {"router_refit": False, "neuron_refit": False}),
        "sequences": args.sequences,
        "sequence_length": args.sequence_length,
        "batch_size": 1,
    }
    if args.max_memory:
        options["max_memory"] = args.max_memory
    limit = str(parse_bytes(args.max_memory or args.limit))
    words = [limit, str(args.threads), str(folder / "source"), str(folder / "out"), json.dumps(options)]
    started = time.perf_counter()
    # Arrow's own allocator reserves a gigabyte of addresses, which the limit would count.
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": str(args.threads)}
    run = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(run.stderr)
    hidden_bytes = args.sequences * args.sequence_length * args.hidden * 2
    found = json.loads(run.stdout.splitlines()[-1])
    shutil.rmtree(folder / "out")
    return {
        **found,
        "process_seconds": time.perf_counter() - started,
        "layer_bytes": layer_bytes,
        "hidden_bytes": hidden_bytes,
        "peak_over_layer": (found["peak_bytes"] - hidden_bytes) / layer_bytes,
        "read_over_size": found["bytes_read"] / found["source_bytes"],
    }


def row_text(row: dict) -> str:
    """Format one line of the table."""
    gib = 2**30
    sampled = ", ".join(f"{name} {value / gib:.2f}" for name, value in row["sampled_bytes"].items())
    where = f"experts in {'a file' if row['experts_in_file'] else 'memory'}"
    return (
        f"{row['layers']:3d} layers, {row['source_bytes'] / gib:5.2f} GiB: peak {row['peak_bytes'] / gib:.2f} GiB = "
        f"{row['peak_over_layer']:.2f} x the largest layer ({row['layer_bytes'] / gib:.2f} GiB) + hidden states "
        f"({row['interpreter_bytes'] / gib:.2f} GiB before the start); predicted {row['predicted_bytes'] / gib:.2f}; "
        f"sampled {sampled}; {where}; read {row['read_over_size']:.3f} x its size; "
        f"{row['seconds']:.0f} s, {row['seconds'] / row['layers']:.1f} s a layer"
    )


def write_checkpoint(folder: Path, layers: int, experts: int, hidden: int, width: int) -> int:
    """Write random bfloat16 weights in Mixtral's layout, tensor by tensor; returns the bytes of one layer."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        num_local_experts=experts,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (32000, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (32000, hidden)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        for projection, rows in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            shapes[f"{name}.self_attn.{projection}_proj.weight"] = (rows, hidden)
        shapes[f"{name}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            prefix = f"{name}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{prefix}.{w}.weight": (width, hidden) for w in ("w1", "w3")}
            shapes[f"{prefix}.w2.weight"] = (hidden, width)
    tensors = [OutputTensor(name, "BF16", shape) for name, shape in shapes.items()]
    plan = plan_shards(tensors, 2**31)
    writer = ShardWriter(folder, plan)
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors:
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).mul_(tensor.shape[-1] ** -0.5)
        writer.write(tensor.name, (values + 1 if "norm" in tensor.name else values).bfloat16())
    writer.close()
    publish_shards(folder, plan, folder)
    return sum(tensor.size for tensor in tensors if tensor.name.startswith("model.layers.0."))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
