"""optimum-dern: make sparse Mixture-of-Experts models smaller without training (DERN, arXiv 2509.10377)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from .versions import __version__


if TYPE_CHECKING:
    from .checkpoint.hub.errors import HubPushError
    from .checkpoint.output.loading import load_compressed_model
    from .compressor import DernCompressor
    from .config import DernConfig
    from .integration.transformers import DernModelForCausalLM, patch_transformers, unpatch_transformers
    from .patterns.load import load_for
    from .results.report import CompressionReport
    from .search.active import active_experts
    from .search.driver import expert_search

_LOCATIONS = {
    "CompressionReport": ".results.report",
    "DernCompressor": ".compressor",
    "DernConfig": ".config",
    "DernModelForCausalLM": ".integration.transformers",
    "HubPushError": ".checkpoint.hub.errors",
    "active_experts": ".search.active",
    "expert_search": ".search.driver",
    "load_compressed_model": ".checkpoint.output.loading",
    "load_for": ".patterns.load",
    "patch_transformers": ".integration.transformers",
    "unpatch_transformers": ".integration.transformers",
}
__all__ = [
    "CompressionReport",
    "DernCompressor",
    "DernConfig",
    "DernModelForCausalLM",
    "HubPushError",
    "__version__",
    "active_experts",
    "expert_search",
    "load_compressed_model",
    "load_for",
    "patch_transformers",
    "unpatch_transformers",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import optimum_dern` and `--help` stay quick."""
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LOCATIONS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _register(module: Any) -> None:
    import_module(".integration.transformers", __name__)


# transformers' registries of quantizers have no discovery; importing them here would take seconds.
register_post_import_hook(_register, "transformers.quantizers.auto")
