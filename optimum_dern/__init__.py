"""optimum-dern: make sparse Mixture-of-Experts models smaller without training (DERN, arXiv 2509.10377)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .versions import __version__


if TYPE_CHECKING:
    from .compressor import DernCompressor
    from .config import DernConfig
    from .reporting.report import CompressionReport

__all__ = ["CompressionReport", "DernCompressor", "DernConfig", "__version__"]

_LOCATIONS = {"DernConfig": ".config", "DernCompressor": ".compressor", "CompressionReport": ".reporting.report"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import optimum_dern` and `--help` stay quick."""
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LOCATIONS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
