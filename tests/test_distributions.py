"""Wheel and source distribution hold the package with all its data files and its licence, and nothing else."""

import shutil
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import optimum_dern


sdist = pytest.importorskip("hatchling.builders.sdist")
wheel = pytest.importorskip("hatchling.builders.wheel")

ROOT = Path(__file__).parent.parent
PACKAGE = Path(optimum_dern.__file__).parent
NAME = f"optimum_dern-{optimum_dern.__version__}"
PLUG = "optimum/commands/register/register_dern.py"  # where `optimum-cli` looks for commands
ABOUT = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
BESIDE = {"PKG-INFO", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", ".gitignore"}
STRAY = """
    tests/test_it.py benchmarks/quality.py docs/source/index.md examples/quickstart.py .ci/run notes.txt
    build/demo/model.safetensors dist/old.whl .venv/lib/module.py runs/log.txt optimum_dern/__pycache__/old.pyc
""".split()


def own_files():
    """Files of the package, whose bytes a distribution must have, by name."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"optimum_dern/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes() for path in files}


def build_wheel(root, folder):
    """Build a wheel; returns the bytes of its files by name."""
    (path,) = wheel.WheelBuilder(str(root)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def build_sdist(root, folder):
    """Build a source distribution; returns where it lies unpacked, and the bytes of its files by name."""
    (path,) = sdist.SdistBuilder(str(root)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    unpacked = Path(folder) / NAME
    return unpacked, {
        path.relative_to(unpacked).as_posix(): path.read_bytes() for path in unpacked.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project after some work in it: with tests, caches, results and builds."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(PACKAGE, root / "optimum_dern")
    for name in BESIDE - {"PKG-INFO"}:
        shutil.copy(ROOT / name, root / name)
    for name in STRAY:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not part of the package", "utf-8")
    return root


def test_wheel(project, tmp_path):
    """The package, the plug of optimum-cli, what the installer needs, the licence."""
    found, own = build_wheel(project, tmp_path), own_files()
    own[PLUG] = own.pop("optimum_dern/commands/optimum_cli.py")  # lies there instead
    assert found.keys() == own.keys() | {f"{NAME}.dist-info/{name}" for name in ABOUT}
    assert found.items() >= own.items()
    assert found[f"{NAME}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_sdist(project, tmp_path):
    """What builds the wheel, which is the same to the bit when it is built from there."""
    unpacked, found = build_sdist(project, tmp_path)
    own = own_files()
    assert found.keys() == own.keys() | BESIDE
    assert found.items() >= own.items()
    assert build_wheel(unpacked, tmp_path) == build_wheel(project, tmp_path)


def test_metadata(project, tmp_path):
    """The licence is named, tests need no extra of users, and the command is the one that the documentation names."""
    found = build_wheel(project, tmp_path)
    (tmp_path / "METADATA").write_bytes(found[f"{NAME}.dist-info/METADATA"])
    metadata = Distribution.at(tmp_path).metadata
    assert (metadata["License-Expression"], metadata.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    assert {"eval", "heal", "report", "tests"} <= set(metadata.get_all("Provides-Extra"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in needed if line.startswith(("pytest", "lm-eval", "peft", "matplotlib"))]
    assert b"optimum-dern = optimum_dern.commands.main:main" in found[f"{NAME}.dist-info/entry_points.txt"]
