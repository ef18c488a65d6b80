"""Versions of the tools that made a checkpoint, for its provenance."""

from importlib.metadata import PackageNotFoundError, version


__all__ = ["__version__", "tool_versions"]

__version__ = "0.1.0"
TOOLS = ("torch", "transformers", "optimum", "accelerate", "safetensors")


def tool_versions() -> dict[str, str]:
    """This package's version and those of the packages that its results depend on."""
    versions = {"optimum-dern": __version__}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # running from a source tree that was never installed
            versions[name] = "unknown"
    return versions
