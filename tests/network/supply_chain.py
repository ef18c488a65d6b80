"""Script that checks what this package depends on, and what it ships; `make supply-chain`.

    python tests/network/supply_chain.py                                          # everything
    python tests/network/supply_chain.py audit package
    python tests/network/supply_chain.py lowest highest -- -m "not slow" -n auto  # the rest are arguments of pytest

audit: pip-audit over the newest versions that resolve, and bandit over the package.
package: the wheel, alone in an environment, runs every command (what it holds is in tests/test_distributions.py).
lowest, highest: the oldest and the newest versions of the direct dependencies resolve, and pass the tests.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from audit import audit
from environments import BUILD, CPU_TORCH, ROOT, install_in, run_quietly
from every_command import run_every_command
from versions import run_tests


FOLDER = BUILD / "supply"
# transformers' own code of two families scatters by int32 indices, which torch 2.8 and later do.
LOWEST = ["-k", "not qwen4_exp and not glm5_next"]
VERSION = "from importlib.metadata import version; print(version('torch'))"
CHECKS: dict[str, Callable[[list[str]], tuple[list[str], bool]]] = {
    "audit": lambda options: audit(resolve("highest")),
    "package": lambda options: run_every_command(),
    "lowest": lambda options: run_tests_with("lowest-direct", [*LOWEST, *options]),
    "highest": lambda options: run_tests_with("highest", options),
}


def main() -> int:
    """Run the checks that are named, or all, and print a summary; returns 1 if one found something."""
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    names, options = given[:end] or list(CHECKS), given[end + 1 :]
    if unknown := set(names) - set(CHECKS):
        sys.exit(f"unknown checks {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    summary, failed = [], False
    for name in names:
        lines, found = CHECKS[name](options)
        summary += lines
        failed |= found
    print("", *summary, sep="\n")
    return int(failed)


def resolve(resolution: str) -> Path:
    """Let uv find exact versions of everything, tests included; returns the file with them.

    Args:
        resolution: `highest`, or `lowest-direct`: the oldest direct dependencies, and the newest that those depend on.
    """
    uv, file = install_in(BUILD / "uv", ["uv"]).with_name("uv"), FOLDER / f"{resolution}.txt"
    before = file.read_text("utf-8") if file.exists() else ""
    what = ["pyproject.toml", "--extra", "tests", "--resolution", resolution, "--upgrade", "--output-file", file]
    here = ["--python", sys.executable, "--no-python-downloads", "--no-annotate", "--no-header", "--quiet"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    run_quietly([uv, "pip", "compile", "--directory", ROOT, *what, *here])
    if file.read_text("utf-8") != before:
        shutil.rmtree(FOLDER / resolution, ignore_errors=True)
    return file


def run_tests_with(resolution: str, options: list[str]) -> tuple[list[str], bool]:
    """Run tests in an environment with other versions; returns the lines to print, and whether any failed."""
    file = resolve(resolution)
    torch = next(line for line in file.read_text("utf-8").splitlines() if line.startswith("torch=="))
    python = install_in(
        FOLDER / resolution,
        ["--no-deps", torch.split(" ")[0], *CPU_TORCH[1:]],
        lambda python: ["--no-deps", *_others(file, python)],
        ["hatchling", "editables", "setuptools", "--constraint", str(file)],
        ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
    )
    counts, failed = run_tests(options, python=python)
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return [f"{resolution} versions ({torch}): {said}", *(f"  {name}" for name in failed)], bool(failed)


def _others(file: Path, python: Path) -> list[str]:
    lines = file.read_text("utf-8").splitlines()
    if run_quietly([python, "-c", VERSION]).strip().endswith("+cpu"):  # which needs no CUDA
        lines = [line for line in lines if not line.startswith(("nvidia-", "cuda-", "triton"))]
    return [line for line in lines if line and not line.startswith("torch==")]


if __name__ == "__main__":
    sys.exit(main())
