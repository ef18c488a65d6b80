"""Peak memory of merging two random checkpoints, in memory and one decoder layer at a time, each in a new process.

    python benchmarks/merging_memory.py

Figures are above what the program takes before it begins, by default with 12 layers of 51 MiB.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from random_model import Sizes, write_model
from safetensors.torch import load_file, save_file


MERGE = """
import json, sys, torch
from random_model import random_tokens
from transformers.utils import logging
from optimum_dern.machine.allocator import return_large_blocks
from optimum_dern.machine.progress import peak_memory_bytes
from optimum_dern.model_merging import LearnedSettings, merge_checkpoints
logging.disable_progress_bar()
torch.set_num_threads(1)
return_large_blocks()  # as the command does with --layerwise
folder, output, method, layerwise = sys.argv[1:]
before = peak_memory_bytes([])
options = {"method": method}
if method == "learned":
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in random_tokens(4, 64)]
    options |= {"texts": [batches[:2], batches[2:]], "settings": LearnedSettings(epochs=1)}
sources = [f"{folder}/one", f"{folder}/two"]
merge_checkpoints(f"{folder}/base", sources, output, layerwise=layerwise == "True", **options)
print(json.dumps(peak_memory_bytes([]) - before))
"""


def main() -> None:
    args = parse_arguments()
    sizes = Sizes(args.layers, args.experts, 2, args.hidden, args.width)
    with TemporaryDirectory() as folder:
        for name in ("base", "one", "two"):
            write_model(Path(folder, name), sizes)
        for number, name in enumerate(("one", "two")):
            change(Path(folder, name), number)
        layer = size_of_layer(Path(folder, "base"))
        print(f"a layer: {layer / 2**20:.0f} MiB\n")
        print("| merge | in memory | layer by layer | in layers |\n|---|---:|---:|---:|", flush=True)
        for method in args.methods:
            peaks = [peak(folder, f"{method}-{way}", method, way) for way in (False, True)]
            figures = [f"{value / 2**20:,.0f} MiB" for value in peaks] + [f"{peaks[1] / layer:.1f}"]
            print(f"| `{method}` | {' | '.join(figures)} |", flush=True)


def change(folder: Path, seed: int) -> None:
    """Add noise to a checkpoint's weights."""
    generator = torch.Generator().manual_seed(seed)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        save_file(changed, file, {"format": "pt"})


def size_of_layer(folder: Path) -> int:
    """Return the bytes of the first decoder layer."""
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("model.layers.0."))


def peak(folder: str, output: str, method: str, layerwise: bool) -> int:
    """Merge in a process of its own, and return its peak memory in bytes, above that before the merge."""
    command = [sys.executable, "-c", MERGE, folder, f"{folder}/{output}", method, str(layerwise)]
    here = Path(__file__).resolve().parent  # from which the process imports `random_model`
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=here).stdout)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "ties", "learned"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
