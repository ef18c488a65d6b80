"""Kill compressions at random moments, resume each with the same command, and compare the output bit by bit.

Every kill is followed by another start; a run that finishes before its kill is compared, and the next one starts over.
After every kill, no file may have a final name that is not whole, and the source must be what it was.

python benchmarks/interruptions.py --kills 100           # random models of 1.3 MB, in turn with the options of CASES
python benchmarks/interruptions.py examples/tiny_moe/upcycled --dataset examples/tiny_moe/text/calibration --kills 20
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from forked_runs import digests, half_written, start, warm
from random_model import Sizes, random_tokens, write_model


TINY = Sizes(layers=4, experts=8, top_k=2, hidden=32, width=16)
CASES = {  # of the random model
    "default": "--batch-size 4 --num-experts 4 --self-share 0",
    "own text": "--batch-size 4 --num-experts 4 --self-share 0.5 --sequence-length 16 --no-neuron-refit",
    "oneshot, statistics": "--batch-size 4 --num-experts 4 --preset paper",
    "several results": "--batch-size 4 --num-experts 6 4 --preset paper",
    "merging": "--batch-size 4 --num-experts 4 --method hc_smoe --no-refit --self-share 0",
}
GIVEN = "--batch-size 8 --num-samples 24 --sequence-length 256 --no-neuron-refit"  # options for a model that is given


def main() -> None:
    """Kill runs of all cases, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder; by default random models, and the options of CASES")
    parser.add_argument("--dataset", help="of the model that is given")
    parser.add_argument("--kills", type=int, default=20, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    if (args.model is None) != (args.dataset is None):
        parser.error("give a model with its --dataset, or neither")
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result) + "\n", "utf-8")
    if result["equal"] != result["runs"] or result["half_written"] or not result["source_untouched"]:
        sys.exit("something was lost")


def run(args: argparse.Namespace, folder: Path) -> dict:
    """Kill the runs of every case, as often as its share of the kills is."""
    source, data = Path(args.model or folder / "model"), args.dataset or folder / "tokens.pt"
    if args.model is None:
        write_model(source, TINY)
        torch.save(list(random_tokens(12, 24)), data)
    before, generator = digests(source), random.Random(args.seed)
    cases = CASES if args.model is None else {"given": GIVEN}
    total: Counter[str] = Counter()
    for number, (name, options) in enumerate(cases.items()):
        (work := folder / str(number)).mkdir()
        words = [*f"--device cpu {options}".split(), "--dataset", data]
        kills = args.kills * (number + 1) // len(cases) - args.kills * number // len(cases)
        found = kill_often(lambda output, words=words: ["compress", source, output, *words], kills, generator, work)
        print(f"{name}: {json.dumps(found)}", flush=True)
        total.update(found)
    names = ("kills", "kills_with_work_done", "kills_while_publishing", "runs", "equal", "half_written")
    untouched = digests(source) == before
    return {name: total[name] for name in names} | {"source_untouched": untouched, "cases": list(cases)}


def kill_often(command: Callable[[Path], list], kills: int, generator: random.Random, folder: Path) -> Counter[str]:
    """Start and kill runs until enough unfinished ones were killed, and compare every finished output.

    Args:
        command: words for an output folder.
        kills: number of them.
        generator: of the moments.
        folder: for outputs and logs.
    """
    warm(command(folder / "first"), folder)
    started = time.monotonic()
    assert start(command(folder / "whole"), folder / "log").wait() == 0, (folder / "log").read_text("utf-8")
    whole, expected = time.monotonic() - started, digests(folder / "whole")
    output, count = folder / "killed", Counter({"kills": 0})
    while count["kills"] < kills:
        process = start(command(output), folder / "log")
        code = process.wait(generator.uniform(0, whole))
        if code is None and (process.kill() == 0 or is_finished(output)):
            code = 0  # it has ended, or was about to
        if code is None:
            count.update(state_of(output))
            count["half_written"] += print_differing(half_written(output, expected))
            if count["kills"] < kills:
                continue
            code = start(command(output), folder / "log").wait()
        assert code == 0, (folder / "log").read_text("utf-8")
        count["runs"] += 1
        found = digests(output)
        differing = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
        count["equal"] += not print_differing(differing)
        shutil.rmtree(output)
    return count


def is_finished(output: Path) -> bool:
    """Whether a run has moved everything into place and removed its working folder."""
    return output.exists() and any(output.iterdir()) and not (output / ".dern").exists()


def state_of(output: Path) -> Counter[str]:
    """Count a kill, by what it has left: layers that are finished, files that have been moved into place."""
    manifests = [json.loads(file.read_text("utf-8")) for file in output.glob(".dern/**/manifest.json")]
    moved = [file for file in output.rglob("config.json") if ".dern" not in file.parts]
    done = any(manifest["layers"] for manifest in manifests)
    return Counter({"kills": 1, "kills_with_work_done": int(done), "kills_while_publishing": int(bool(moved))})


def print_differing(names: list[str]) -> int:
    """Print the names of files that are not what they should be, and count them."""
    for name in sorted(names):
        print(f"{name} differs", flush=True)
    return len(names)


if __name__ == "__main__":
    main()
