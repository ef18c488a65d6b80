"""Checks of a request before any long work: names of methods and criteria, expert counts, and the data they need."""

from collections.abc import Sequence
from dataclasses import replace
from logging import getLogger
from typing import Any

from ...condensing.plan import plan_condensing
from ...config import DernConfig
from ...core.criteria.registry import check_criterion
from ...core.neurons.importance import check_importance
from ...data.sources import SELF
from ...methods import METHODS, get_method
from ...models.moe.overrides import takes_routing
from ...models.moe.structure import MoELayer, layers_by_position
from ...models.refusals import advise_count, check_model, check_protection, check_router_logits, resolve_count
from ...models.width import width_settings
from ..layer.importance import gradient_needed
from ..layer.narrowing import find_width, padding_notice, written_width
from ..layer.needs import selection_needs, why_tokens


__all__ = [
    "check_names",
    "check_narrowing",
    "check_request",
    "check_statistics",
    "configs_for",
    "needs_data",
    "resolve_counts",
    "warn_of_padding",
    "with_dataset",
]

logger = getLogger(__name__)
NO_TOKENS = "leave the refits and the guard out, and choose a method and a criterion of statistics or weights alone"


def check_names(config: DernConfig) -> None:
    """Refuse an unknown method, selection criterion or importance of neurons; needs no model.

    Raises:
        ValueError: the name is unknown; the message lists those that exist.
    """
    get_method(config.method)
    check_criterion(config.selection)
    if config.importance is not None:
        check_importance(config.importance)


def check_request(config: DernConfig, model: Any, layers: list[MoELayer]) -> int:
    """Refuse a config that cannot work on a model, whose weights need not be loaded yet.

    Args:
        config: of the compression.
        model: the model to compress.
        layers: its MoE layers.

    Returns:
        How many experts every layer would keep.

    Raises:
        ValueError: the config or the model cannot work; the message tells what is allowed.
    """
    check_names(config)
    check_model(model, layers)
    if config.condensed_layers is not None:
        plan_condensing(model, layers, config.condensed_layers, config.num_experts)
        return layers[0].num_experts  # in the layers that do not become dense
    if getattr(get_method(config.method), "needs_router_logits", False):
        check_router_logits(config.method, layers)
    if find_width(layers[0], config) < layers[0].width:
        check_narrowing(config)
        width_settings(model, layers, written_width(layers[0], config))
    check_gradient(config, layers)
    count = resolve_count(layers[0], config.sparsity, config.num_experts, config.experts_multiple_of)
    get_method(config.method).check(layers, count)
    check_protection(layers_by_position(model, layers), config.protect_experts or {}, count)
    return count


def check_narrowing(config: DernConfig) -> None:
    """Refuse narrower experts where the method merges experts.

    Raises:
        ValueError: naming the methods that do not.
    """
    if not getattr(get_method(config.method), "keeps_experts", False):
        keeping = sorted(name for name, method in METHODS.items() if getattr(method, "keeps_experts", False))
        raise ValueError(
            f"method={config.method!r} merges experts, whose neurons have no importance of their own; experts become "
            f"narrower with {', '.join(keeping)}"
        )


def check_gradient(config: DernConfig, layers: list[MoELayer]) -> None:
    """Refuse an importance of neurons that needs gradients where there are none.

    Raises:
        ValueError: naming what can be given instead.
    """
    if gradient_needed(config) and not takes_routing(layers[0].experts):
        raise ValueError(
            f"importance={config.importance!r} needs the gradient by the experts' routed output, which the experts of "
            f"{layers[0].name} do not return; choose camera_p"
        )


def warn_of_padding(config: DernConfig, layer: MoELayer) -> None:
    """Say before any work that experts of different widths save no memory, where the config asks for them."""
    if notice := padding_notice(layer, config):
        logger.warning("%s", notice)


def check_statistics(config: DernConfig) -> None:
    """Refuse a config for which the recorded statistics of an earlier run are not enough.

    Raises:
        ValueError: the message tells what to give.
    """
    reason = why_tokens(config)
    if reason is not None:
        raise ValueError(f"recorded statistics are not enough: {reason}; {NO_TOKENS}, or leave statistics out")
    if config.calibration_order != "oneshot" and selection_needs(config) == "statistics":
        raise ValueError(
            "recorded statistics are those of the original model, but calibration_order='sequential' lets later "
            "layers see compressed ones; give calibration_order='oneshot', or leave statistics out"
        )


def with_dataset(config: DernConfig) -> DernConfig:
    """Return the config with text that the model writes itself as its dataset, where it needs one and names none."""
    return replace(config, dataset=SELF) if config.dataset is None and needs_data(config) else config


def needs_data(config: DernConfig) -> bool:
    """Whether a config needs calibration data, or statistics recorded from some."""
    return why_tokens(config) is not None or selection_needs(config) == "statistics"


def configs_for(
    config: DernConfig,
    num_experts: int | Sequence[int] | None = None,
    sparsity: float | Sequence[float] | None = None,
) -> list[DernConfig]:
    """Make one config for every requested number of experts or sparsity.

    Args:
        config: common options; its own `num_experts` or `sparsity` is used where none is given here.
        num_experts: one number or several.
        sparsity: one number or several, instead of `num_experts`.

    Raises:
        ValueError: both are given, a list is empty, or a value is out of range.
    """
    if num_experts is not None and sparsity is not None:
        raise ValueError(f"both sparsity={sparsity} and num_experts={num_experts} are given; give one of them")
    if num_experts is None and sparsity is None:
        return [config]
    name, amounts = ("num_experts", num_experts) if sparsity is None else ("sparsity", sparsity)
    amounts = list(amounts) if isinstance(amounts, Sequence) else [amounts]
    if not amounts:
        raise ValueError(f"{name} is an empty list; give at least one")
    if len(amounts) > 1 and config.condensed_layers is not None:
        raise ValueError(
            f"{name}={amounts} with condensed_layers={config.condensed_layers}: a run condenses layers in one way; "
            "give one number, and run again for the others"
        )
    return [replace(config, **{"num_experts": None, "sparsity": None, name: amount}) for amount in amounts]


def resolve_counts(configs: Sequence[DernConfig], model: Any, layers: list[MoELayer]) -> list[int]:
    """Determine how many experts every layer keeps in each result.

    Args:
        configs: one for each result.
        model: the model to compress.
        layers: its MoE layers.

    Raises:
        ValueError: a count is impossible, is that of the original model, or is asked for twice.
    """
    counts = [check_request(config, model, layers) for config in configs]
    if configs[0].condensed_layers is not None:
        return counts
    if layers[0].num_experts in counts and find_width(layers[0], configs[0]) == layers[0].width:
        raise ValueError(
            f"nothing to compress: every layer would keep all of its {layers[0].num_experts} experts; "
            f"{advise_count(layers[0])}"
        )
    twice = [count for count in dict.fromkeys(counts) if counts.count(count) > 1]
    if twice:
        raise ValueError(f"two results would keep the same {twice[0]} experts a layer; ask for each count once")
    return counts
