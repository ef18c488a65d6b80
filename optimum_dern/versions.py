"""Versions of this package and its dependencies, recorded in compressed checkpoints."""

from importlib.metadata import PackageNotFoundError, version


__all__ = ["__version__", "tool_versions"]

__version__ = "0.1.0"
TOOLS = ("torch", "transformers", "optimum", "accelerate", "safetensors")


def tool_versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that its results depend on."""
    versions = {"optimum-dern": __version__}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # running from a source tree that was never installed
            versions[name] = "unknown"
    return versions
