"""Versions of this package and its dependencies, recorded in compressed checkpoints."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


__all__ = ["__version__", "tool_versions"]

__version__ = "0.1.0"
TOOLS = ("torch", "transformers", "optimum", "accelerate", "safetensors")


def tool_versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that its results depend on."""
    return {"optimum-dern": __version__, **{name: _version(name) for name in TOOLS}}


@cache
def _version(name: str) -> str:
    """Return a package's version, which takes milliseconds to read."""
    try:
        return version(name)
    except PackageNotFoundError:  # running from a source tree that was never installed
        return "unknown"
