"""Script that runs the fast tests with the oldest supported and the newest transformers, and reports differences.

python tests/network/versions.py OLDEST NEWEST [argument of pytest]...

OLDEST is a folder with the oldest transformers; NEWEST becomes one with the newest on PyPI and what that depends on,
over the torch of this environment.  A test that fails is run once more with this environment's own transformers: what
fails there, too, is not about versions.  The exit status tells of the oldest alone, so that a release of transformers
turns nobody's tests red.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version
from pathlib import Path
from xml.etree import ElementTree


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
PYTEST = ["-m", "pytest", "--continue-on-collection-errors", "-o", "junit_family=xunit1"]
SUPPORTED = "transformers<6"


def main() -> int:
    """Run the tests and print a summary; returns 1 if a test fails with the oldest transformers."""
    oldest, newest, *options = sys.argv[1:]
    lines, failed = report(Path(oldest), options)
    if (release := newest_release()) is None:
        lines.append("newest transformers: not tried, PyPI could not be asked")
    elif release == version("transformers"):
        lines.append(f"newest transformers: {release}, the one of `make test`")
    elif install(release, Path(newest)):
        lines += report(Path(newest), options)[0]
    else:
        lines.append(f"newest transformers: {release} could not be installed")
    print("", *lines, sep="\n")
    return int(failed)


def newest_release() -> str | None:
    """Ask pip for the newest version of transformers; None where no index answers."""
    command = [*PIP, "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", SUPPORTED]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout)["install"][0]["metadata"]["version"] if result.returncode == 0 else None


def install(release: str, folder: Path) -> bool:
    """Install one version of transformers into a folder, unless it is there; returns whether that worked."""
    if version_in(folder) == release:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return subprocess.run([*PIP, "--target", folder, f"transformers=={release}"]).returncode == 0


def version_in(folder: Path) -> str | None:
    """Return the version of transformers that is installed in a folder."""
    return next((found.version for found in distributions(name="transformers", path=[str(folder)])), None)


def report(folder: Path, options: list[str]) -> tuple[list[str], bool]:
    """Run the tests with the transformers of one folder; returns the lines to print, and whether any test failed."""
    counts, failed = run_tests(options, folder)
    tests, pinned = [name for name in failed if ".py" in name], version("transformers")
    also = run_tests(tests)[1] if tests else []
    lines = [f"transformers {version_in(folder)}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())]
    lines += [f"  {name}" + f" (with {pinned}, too)" * (name in also) for name in failed]
    return lines, bool(failed)


def run_tests(
    options: list[str], folder: Path | None = None, python: str | Path = sys.executable
) -> tuple[dict[str, int], list[str]]:
    """Run pytest in a process of its own.

    Args:
        options: its arguments.
        folder: what comes before the packages of the environment.
        python: interpreter of the environment, by default of this one.

    Returns:
        How many tests passed, failed and were skipped, and the names of those that failed.
    """
    paths = filter(None, [str(folder.resolve()) if folder else "", os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        command = [python, *PYTEST, f"--junit-xml={results}", *options]
        status = subprocess.run(command, env=environment).returncode
        cases = ElementTree.parse(results).iter("testcase") if results.exists() else ()
        outcomes = {name_of(case): outcome_of(case) for case in cases}
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    if status not in (0, 1) and not failed:
        failed = [f"pytest ended with status {status}"]
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "skipped")}
    return {"passed": counts["passed"], "failed": len(failed), "skipped": counts["skipped"]}, failed


def name_of(case: ElementTree.Element) -> str:
    """Return pytest's name of a test, or of a file that cannot be imported."""
    file, module = case.get("file", ""), case.get("classname", "")
    if not module:
        return file
    classes = module.removeprefix(file.removesuffix(".py").replace("/", ".")).split(".")[1:]
    return "::".join([file, *classes, case.get("name", "")])


def outcome_of(case: ElementTree.Element) -> str:
    """Return the outcome of a test."""
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


if __name__ == "__main__":
    sys.exit(main())
