"""What TF32 would change: losses after refits whose float32 products round their inputs to 10 bits of mantissa.

A GPU rounds so where `machine/precision.py` lets it.  Here each matrix product of the scales, the refit of the down
projections and the neuron refit is computed on the CPU from rounded inputs; what judges and evaluates is not rounded.

python benchmarks/rounded_products.py --num-samples 64
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dern import DernCompressor
from optimum_dern.engine.layer import steps
from optimum_dern.evaluation.loss.perplexity import evaluate_texts, load_texts


TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny_moe"
PRODUCTS = {  # positions of the factors among the arguments
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.addmm_.default: (1, 2),
    torch.ops.aten.baddbmm.default: (1, 2),
}


class Rounding(TorchDispatchMode):
    """Rounds the factors of matrix products while it is active."""

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        places = PRODUCTS.get(function, ())
        args = tuple(rounded(value) if place in places else value for place, value in enumerate(args))
        return function(*args, **(kwargs or {}))


def rounded(values: Tensor) -> Tensor:
    """Round float32 numbers to 10 bits of mantissa, to even in the middle."""
    if values.dtype != torch.float32:
        return values
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@contextmanager
def on_the_cpu(device: torch.device) -> Iterator[None]:
    """Stand in for `products_in_tf32`."""
    with Rounding():
        yield


def main() -> None:
    """Compress both models with and without rounding, and print the increases of the loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["fast", "recommended"])
    parser.add_argument("--models", nargs="+", default=["scratch", "upcycled"])
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        full = AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(TINY / name)
        texts = {key: batches[:2] for key, batches in load_texts(TINY / "text" / "evaluation", tokenizer, 256).items()}
        before = mean_loss(full, texts)
        for preset in args.presets:
            found = [compressed_loss(full, tokenizer, texts, preset, args.num_samples, tf32) for tf32 in (False, True)]
            exact, changed = (loss - before for loss in found)
            print(f"{name}, {preset}: {exact:+.5f}, rounded {changed:+.5f}", flush=True)


def compressed_loss(full: Any, tokenizer: Any, texts: dict, preset: str, num_samples: int, tf32: bool) -> float:
    """Return the loss of a compressed copy of a model."""
    model, data = copy.deepcopy(full), str(TINY / "text" / "calibration")
    options = {"num_samples": num_samples, "sequence_length": 256, "self_share": 0.0, "sparsity": 0.5}
    replaced = on_the_cpu if tf32 else steps.products_in_tf32
    with (
        patch.object(steps, "products_in_tf32", replaced),
        patch("optimum_dern.machine.precision.products_in_tf32", replaced),
    ):
        DernCompressor(dataset=data, preset=preset, **options).compress_model(model, tokenizer)
    return mean_loss(model, texts)


def mean_loss(model: Any, texts: dict) -> float:
    """Measure a model's loss in nats per token, mean over the domains."""
    return statistics.mean(result.loss for result in evaluate_texts(model, texts).values())


if __name__ == "__main__":
    main()
