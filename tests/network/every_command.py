"""Every command, run with the wheel in an environment that has nothing else: no tests, no extras, no source tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from environments import BUILD, CPU_TORCH, ROOT, install_in, run_quietly


__all__ = ["run_every_command"]

TINY = ROOT / "examples" / "tiny_moe"
TEXT = TINY / "text" / "calibration"
FEW = "--num-samples 8 --sequence-length 64"
MODEL = TINY / "upcycled"
COMMANDS = [  # in an order in which each finds what it needs; `{...}` are the paths above
    "--version",
    "--help",
    "inspect {MODEL} --num-experts 5",
    "sample {MODEL} sample.jsonl {FEW}",
    "compress {MODEL} smaller --num-experts 5 --preset fast --dataset {TEXT} {FEW}",
    "compress {MODEL} narrower --width-sparsity 0.5 --preset fast --dataset {TEXT} {FEW}",
    "report smaller",
    "evaluate smaller --data {TEXT} --limit 4 --sequence-length 64",
    "compare {MODEL} smaller --data {TEXT} --sequence-length 64 --limit 2 --no-speed",
    "attribute {MODEL} who --data all={TEXT} {FEW}",
    "patterns build {MODEL} library --task all={TEXT} {FEW}",
    "patterns list library",
    "patterns match library --model {MODEL} --prompt hello",
    "merge {MODEL} {MODEL} {MODEL} merged --method ties",
]
HELP = [name.split()[0] for name in COMMANDS if not name.startswith("-")]
# A command that needs an extra, and the words of its one-line refusal.
WITHOUT_EXTRAS = {"evaluate smaller --lm-eval --tasks piqa": "lm-eval is not installed; run `pip install '.[eval]'`"}


def run_every_command() -> tuple[list[str], bool]:
    """Build the wheel, install it with what it requires, run all commands; returns lines, and whether one failed."""
    work = BUILD / "clean" / "work"
    shutil.rmtree(work, ignore_errors=True)
    wheel = build_wheel(work / "wheel")
    programs = install_in(
        BUILD / "clean" / "environment", ["--no-deps", *CPU_TORCH], [str(wheel), CPU_TORCH[0]]
    ).parent
    run_quietly([programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel])
    lines, failed = [], False
    helps = [f"{name} --help" for name in dict.fromkeys(HELP)]
    for command in [*COMMANDS, *helps, *WITHOUT_EXTRAS]:
        text = command.format(MODEL=MODEL, TEXT=TEXT, FEW=FEW)
        result = run(programs / "optimum-dern", text.split(), work)
        if wrong := complaint(result, WITHOUT_EXTRAS.get(command)):
            lines.append(f"  optimum-dern {command}: {wrong}")
            failed = True
    other = run(programs / "optimum-cli", ["dern", "inspect", str(MODEL)], work)
    if wrong := complaint(other, None):
        lines.append(f"  optimum-cli dern inspect: {wrong}")
        failed = True
    count = len(COMMANDS) + len(helps) + len(WITHOUT_EXTRAS) + 1
    return [f"wheel in a clean environment: {count} commands, {len(lines)} of them wrong", *lines], failed


def build_wheel(folder: Path) -> Path:
    """Build the wheel with the build backend of this environment."""
    run_quietly(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(program: Path, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a program in a folder, away from the source tree and from the Hub."""
    variables = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([program, *arguments], cwd=folder, env=variables, capture_output=True, text=True)


def complaint(result: subprocess.CompletedProcess, refusal: str | None) -> str | None:
    """What is wrong with a command's result: it should succeed, or refuse on one line with these words."""
    if refusal is None:
        return None if result.returncode == 0 else f"status {result.returncode}: {result.stderr[-300:]}"
    last = result.stderr.strip().splitlines()[-1:] or [""]
    right = result.returncode == 2 and last[0].startswith("optimum-dern: error: ") and refusal in last[0]
    return None if right else f"status {result.returncode}, not the refusal {refusal!r}: {result.stderr[-300:]}"
