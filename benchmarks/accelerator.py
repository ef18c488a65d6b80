"""Seconds, memory and host waits of compressing one MoE layer with the shape of a large model on a GPU.

    python benchmarks/accelerator.py                                     # three shapes, three presets, 262,144 tokens
    python benchmarks/accelerator.py --shapes Mixtral-8x7B --presets fast --scale 16 --device cpu     # to try it

A model of one decoder layer with random bfloat16 weights is made on the device and compressed in memory to half of its
experts.  The table has the seconds of the layer, the operations that the package counts for it and their rate as a
share of a large bfloat16 product's, the peak memory beside the model, the moments at which the host waited for the
device, and the seconds of every stage from a second run, in which every stage waits for its end.
"""

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from random_model import VOCABULARY, random_tokens
from stages import STAGES, Timers
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.engine.cost.duration import count_operations
from optimum_dern.models.moe.structure import find_moe_layers


SHAPES: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 0,
    },
}
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size")
PROBE = 8192  # rows and columns of the product whose rate counts as the device's peak


def main() -> None:
    """Measure every shape with every preset, and print a table and one JSON line a result."""
    args = parse_arguments()
    device = torch.device(args.device)
    peak = bfloat16_rate(device, PROBE // args.scale)
    print(f"bfloat16 products of {PROBE // args.scale} x {PROBE // args.scale}: {peak / 1e12:.1f} TFLOP/s", flush=True)
    rows = [{"input_ids": row} for row in random_tokens(args.sequences, args.length)]
    print("| shape | preset | s | Tera-operations | share of the peak | GiB beside the model | waits |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for shape in args.shapes:
        for preset in args.presets:
            if shape == args.shapes[0] and preset == args.presets[0]:
                measure(shape, preset, rows[:4], device, max(args.scale, 8))  # the first imports and kernels
            found = measure(shape, preset, rows, device, args.scale)
            share = found["operations"] / found["seconds"] / peak
            print(
                f"| {shape} | {preset} | {found['seconds']:.2f} | {found['operations'] / 1e12:.1f} | {share:.0%} "
                f"| {found['memory'] / 2**30:.1f} (model {found['model'] / 2**30:.1f}) | {found['waits']} |"
            )
            print(json.dumps({"shape": shape, "preset": preset, "peak": peak, **found}), flush=True)


def measure(shape: str, preset: str, rows: list[dict], device: torch.device, scale: int) -> dict[str, Any]:
    """Compress a layer once for its seconds, memory and waits, and once for the seconds of its stages."""
    config = DernConfig(preset=preset, dataset=rows, sparsity=0.5, self_share=0.0, random_share=0.0, batch_size=4)
    model = make_model(shape, device, scale)
    layer = find_moe_layers(model)[0]
    tokens = sum(len(row["input_ids"]) for row in rows)
    operations = count_operations(layer, tokens, config, layer.num_experts // 2)
    before = used(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = counting_waits(device, DernCompressor(config).compress_model, model).dern_report
    found = {"seconds": sum(layer.seconds for layer in report.layers), "operations": operations}
    found |= {"memory": peak_memory(device) - before, "model": before}
    waits = [f"{warning.filename.rpartition('/')[2]}:{warning.lineno}" for warning in caught if is_wait(warning)]
    found |= {"waits": len(waits), "places": most_common(waits)}
    del model, layer
    model = make_model(shape, device, scale)
    timers = Timers(lambda: finished(device))
    with ExitStack() as stack:
        for name, (owner, function, _) in STAGES.items():
            stack.enter_context(patch.object(owner, function, timers.wrap(name, getattr(owner, function))))
        DernCompressor(config).compress_model(model)
    del model
    return found | {"stages": {name: round(seconds, 3) for name, seconds in timers.seconds.items()}}


def make_model(shape: str, device: torch.device, scale: int) -> Any:
    """Make a model of one decoder layer with random weights, its widths divided by `scale`."""
    sizes = {name: size // scale if name in WIDTHS else size for name, size in SHAPES[shape].items()}
    config = AutoConfig.for_model(**sizes, num_hidden_layers=1, vocab_size=VOCABULARY, use_cache=False)
    gc.collect()  # a model before it, whose modules and hooks refer to one another
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with device:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def counting_waits(device: torch.device, run: Callable[[Any], Any], model: Any) -> Any:
    """Run a function of a model while torch warns of every wait of the host for the device."""
    if device.type != "cuda":
        return run(model)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        return run(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def is_wait(warning: warnings.WarningMessage) -> bool:
    """Whether a warning is one of those of torch's sync debug mode."""
    return "synchronizing CUDA operation" in str(warning.message)


def most_common(places: list[str]) -> dict[str, int]:
    """Count the ten most common places."""
    counts = {place: places.count(place) for place in dict.fromkeys(places)}
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:10])


def bfloat16_rate(device: torch.device, size: int) -> float:
    """Measure the rate of a large bfloat16 product of random matrices, in operations per second."""
    matrix = torch.randn(size, size, device=device).bfloat16()
    for _ in range(3):
        matrix @ matrix
    started = finished(device)
    for _ in range(10):
        matrix @ matrix
    return 10 * 2 * size**3 / (finished(device) - started)


def finished(device: torch.device) -> float:
    """Wait for the device, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def used(device: torch.device) -> int:
    """Return the bytes in use on a GPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use on a GPU at once."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--presets", nargs="+", default=["paper", "fast", "recommended"])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
