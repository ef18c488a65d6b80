"""Time, floor and ratio of every stage of compressing a random checkpoint (`random_model.py`) from disk to disk.

The time of a stage is its own CPU time, without that of stages inside it.  Floors are the operations that the package
declares for the stage over the rate of a large matrix product, and for reading and writing the bytes over the rate of
a file copy, both measured in the same run.  Prints a table and one JSON line.

python benchmarks/stages.py --preset recommended
"""

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from random_model import Sizes, random_tokens, write_model

from optimum_dern import DernCompressor, DernConfig
from optimum_dern.checkpoint.output.tensors import CheckpointOutput
from optimum_dern.checkpoint.source.loader import PartLoader
from optimum_dern.engine.cost.duration import measure_rate
from optimum_dern.engine.cost.phases import layer_phases, layer_shape
from optimum_dern.engine.layer import compression, steps
from optimum_dern.engine.layer.objective import Objective
from optimum_dern.engine.measure import expert_run
from optimum_dern.engine.measure.measured import MeasuredLayer
from optimum_dern.engine.walk.stream import HiddenStream
from optimum_dern.models.moe.structure import find_moe_layers
from optimum_dern.models.skeleton import build_skeleton


STAGES = {  # name: where its function is, and the phases of `layer_phases` whose operations it takes
    "read": (PartLoader, "_load_experts", ()),
    "attention, router, compressed experts": (HiddenStream, "_call", ()),
    "measure": (expert_run, "measure_experts", ("measure",)),
    "select": (compression, "select", ("select",)),
    "propose": (compression, "_propose", ("propose",)),
    "similarity map": (compression, "similarity_map", ("map",)),
    "route again": (MeasuredLayer, "reroute", ()),
    "judge": (Objective, "error", ("judge",)),
    "scales": (steps, "fit_scales", ("Scale",)),
    "refit": (steps, "refit_down", ("DownRefit",)),
    "neuron refit": (steps, "descend_neurons", ("NeuronRefit",)),
    "write": (CheckpointOutput, "finish", ()),
}
SEQUENCES, LENGTH = 16, 256


class Timers:
    """Seconds and calls by stage, where a stage inside another one counts for itself alone."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or time.process_time
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.inside: list[str] = []
        self.since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time until the context exits for a stage, instead of for the one around it."""
        self._switch()
        self.inside.append(name)
        try:
            yield
        finally:
            self._switch()
            self.inside.pop()

    def _switch(self) -> None:
        now = self.clock()
        if self.inside:
            self.seconds[self.inside[-1]] += now - self.since
        self.since = now

    def wrap(self, name: str, function: Callable) -> Callable:
        """Make a function count for a stage; of a generator, the time until each of its values."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            with self.stage(name):
                result = function(*args, **kwargs)
            return self._values(name, result) if isinstance(result, Iterator) else result

        return timed

    def _values(self, name: str, values: Iterator) -> Iterator:
        while True:
            with self.stage(name):
                value = next(values, self)  # itself: no value is left
            if value is self:
                return
            yield value


def main() -> None:
    """Compress the model with every stage timed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="recommended", choices=("paper", "fast", "recommended"))
    for name, default in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = Sizes(**{name: getattr(args, name) for name in Sizes._fields})
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), sizes, args.preset)
    print("| stage | calls | CPU s | floor, s | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        floor = f"{row['floor']:.2f} | {row['seconds'] / row['floor']:.1f}" if row["floor"] else "– | –"
        print(f"| {row['stage']} | {row['calls']} | {row['seconds']:.2f} | {floor} |")
    print(json.dumps({"preset": args.preset, "sizes": sizes._asdict(), "stages": rows}))


def measure(folder: Path, sizes: Sizes, preset: str) -> list[dict[str, Any]]:
    """Compress once without and once with timers, and return the figures of every stage."""
    write_model(folder / "model", sizes)
    write_model(folder / "toy", Sizes(1, 8, 2, 64, 32))
    config = DernConfig(
        preset=preset,
        dataset=[{"input_ids": row} for row in random_tokens(SEQUENCES, LENGTH)],
        sequence_length=LENGTH,
        self_share=0.0,
        random_share=0.0,
    )
    DernCompressor(config).compress_checkpoint(folder / "toy", folder / "toy_out")  # the first imports
    timers = Timers()
    with ExitStack() as stack:
        for name, (owner, function, _) in STAGES.items():
            stack.enter_context(patch.object(owner, function, timers.wrap(name, getattr(owner, function))))
        started = time.process_time()
        DernCompressor(config).compress_checkpoint(folder / "model", folder / "out")
        timers.seconds["all else"] = time.process_time() - started - sum(timers.seconds.values())
    floors = find_floors(folder, config)
    rows = [*STAGES, "all else"]
    return [
        {"stage": name, "calls": timers.calls[name], "seconds": timers.seconds[name], "floor": floors.get(name)}
        for name in rows
        if timers.seconds[name]
    ]


def find_floors(folder: Path, config: DernConfig) -> dict[str, float]:
    """Return the least seconds of the stages whose operations or bytes are known."""
    layers = find_moe_layers(build_skeleton(folder / "model"))
    shape = layer_shape(layers[0], SEQUENCES * LENGTH, layers[0].num_experts // 2)
    rate, operations = measure_rate(torch.device("cpu")), defaultdict(float)
    for phase in layer_phases(shape, config):
        operations[phase.name] += phase.operations * len(layers)
    floors = {name: sum(operations[phase] for phase in phases) / rate for name, (*_, phases) in STAGES.items()}
    for name, part in (("read", "model"), ("write", "out")):
        started = time.process_time()
        for file in (folder / part).glob("*.safetensors"):
            shutil.copyfile(file, folder / "copy")
        floors[name] = (time.process_time() - started) / 2  # it reads and writes every byte
    return floors


if __name__ == "__main__":
    main()
