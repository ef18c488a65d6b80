"""How the CPU time of a compression grows with tokens, experts, width and layers: measured exponents.

Compresses random checkpoints (`random_model.py`) of one, two and four times a base size, one dimension at a time, and
fits the slope of log time over log size: 1 is linear.  Small sizes have a constant part, which lowers the slope.
Prints a table and one JSON line.

python benchmarks/growth.py --presets paper fast recommended
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_model import Sizes, random_tokens, write_model

from optimum_dern import DernCompressor


BASE = Sizes(layers=2, experts=16, top_k=2, hidden=256, width=128)
SEQUENCES, LENGTH = 16, 256
DIMENSIONS = ("tokens", "experts", "width", "layers")
METHODS = {
    "prune": {"method": "prune", "preset": "paper", "selection": "reap"},
    **{preset: {"preset": preset} for preset in ("paper", "fast", "recommended")},
}


def main() -> None:
    """Measure every method in every dimension, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--factors", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=2, help="runs of each size, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[str, dict]] = {}
    for preset in args.presets:
        measure(preset, BASE, 1, 1)  # the first imports
        for dimension in DIMENSIONS:
            seconds = [measure(preset, *scaled(dimension, factor), args.repeat) for factor in args.factors]
            results.setdefault(preset, {})[dimension] = {
                "seconds": seconds,
                "exponent": slope(args.factors, seconds),
            }
    print(f"| | {' | '.join(DIMENSIONS)} |\n| --- |{' ---: |' * len(DIMENSIONS)}")
    for preset, found in results.items():
        print(f"| {preset} | {' | '.join(format(found[name]['exponent'], '.2f') for name in DIMENSIONS)} |")
    print(json.dumps({"factors": args.factors, "base": BASE._asdict(), "results": results}))


def scaled(dimension: str, factor: int) -> tuple[Sizes, int]:
    """Return the base sizes and the factor of the number of sequences, one of them grown."""
    if dimension == "tokens":
        return BASE, factor
    return BASE._replace(**{dimension: factor * getattr(BASE, dimension)}), 1


def measure(preset: str, sizes: Sizes, more: int, repeat: int) -> float:
    """Return the least CPU seconds of compressing a checkpoint from disk to disk."""
    rows = [{"input_ids": row} for row in random_tokens(more * SEQUENCES, LENGTH)]
    options = METHODS[preset] | {"self_share": 0.0, "random_share": 0.0, "num_samples": len(rows)}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        write_model(source, sizes)
        for run in range(repeat):
            compressor = DernCompressor(dataset=rows, sequence_length=LENGTH, **options)
            started = time.process_time()
            compressor.compress_checkpoint(source, Path(folder) / str(run))
            found.append(time.process_time() - started)
    return min(found)


def slope(factors: list[int], seconds: list[float]) -> float:
    """Return the slope of log seconds over log factors, by least squares."""
    logs = [torch.tensor(values, dtype=torch.float64).log().tolist() for values in (factors, seconds)]
    return statistics.linear_regression(*logs).slope


if __name__ == "__main__":
    main()
