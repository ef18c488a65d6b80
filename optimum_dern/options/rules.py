"""Rules between options: which contradict each other, which have no effect, and what one decides about another."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .presets import OFF


if TYPE_CHECKING:
    from .fields import DernOptions


__all__ = [
    "check_effects",
    "describes_recombination",
    "idle_options",
    "method_defaults",
    "settle_amount_",
    "settle_width_",
]

NOT_OF_CONDENSED = (
    "calibration_order",
    "selection",
    "router_refit",
    "neuron_refit",
    "drift_correction",
    "refit_sweeps",
    "experts_multiple_of",
)
PARTS_OF_REFIT = ("router_refit", "neuron_refit", "drift_correction", "refit_ridge", "refit_sweeps")


def settle_width_(options: "DernOptions") -> None:
    """Refuse contradictory widths, and fill in by which importance neurons are chosen."""
    if options.width is not None and options.width_sparsity is not None:
        raise ValueError(
            f"both width={options.width} and width_sparsity={options.width_sparsity} are given; give one of them"
        )
    if not options.narrows:
        return
    if options.importance is None:
        options.importance = "camera_p"
    if options.recombine:
        raise ValueError(
            "recombine=True makes experts of neurons of others, whose importance is not known; with narrower "
            "experts give recombine=False"
        )


def describes_recombination(options: "DernOptions") -> bool:
    """Whether the user gives details of the recombination, and so asks for it."""
    details = [option for option in fields(options) if option.name in _recombination_options()]
    if options.importance is not None and options.method == "dern" and not options.narrows:
        return True
    return any(getattr(options, option.name) != option.default for option in details)


def idle_options(options: "DernOptions") -> dict[str, str]:
    """Return the options that have no effect in combination with the others, with what each would need."""
    idle = _options_of_others(options.method)
    if not options.narrows:
        idle |= dict.fromkeys(("width_budget", "width_multiple_of"), "width or width_sparsity")
        if not _may_read_all(options.method) and (options.method != "dern" or not options.recombine):
            idle["importance"] = "width or width_sparsity (or method='dern' with recombine=True)"
        elif not options.importance_weighting:
            idle["importance"] = "importance_weighting=True"
    if options.condensed_layers is not None:
        idle |= dict.fromkeys(NOT_OF_CONDENSED, "condensed_layers=None (all layers, in another form)")
    if options.calibration_order == "oneshot":
        idle["drift_correction"] = "calibration_order='sequential'"
    if options.recombine is not None and not options.recombine:
        idle |= {name: "recombine=True" for name in _recombination_options() if name not in idle}
    if options.refit is not None and not options.refit:
        idle |= dict.fromkeys(PARTS_OF_REFIT, "refit=True")
    return idle


def check_effects(options: "DernOptions", filled: Mapping[str, Any]) -> None:
    """Refuse options without effect, unless they are off or at the default (as in a config saved to a file)."""
    defaults = {option.name: option.default for option in fields(options)} | filled | OFF
    for name, needed in idle_options(options).items():
        if getattr(options, name) != defaults[name]:
            given = f"{name}={getattr(options, name)!r}"
            raise ValueError(f"{given} has no effect without {needed}; give {needed}, or leave {name} out")


def _check_condensed(options: "DernOptions") -> None:
    """Refuse what contradicts dense layers beside others that stay as they are."""
    if options.condensed_layers is None:
        if options.num_experts == 0:
            raise ValueError(
                "num_experts=0, but it must be a whole number of at least 1; 0 is for condensed_layers, of the "
                "shared experts alone"
            )
        return
    if options.method != "cd_moe":
        raise ValueError(
            f"condensed_layers={options.condensed_layers} needs method='cd_moe', not {options.method!r}; give that, "
            "or leave condensed_layers out"
        )
    for name in ("sparsity", "width", "width_sparsity", "protect_experts"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{name}={getattr(options, name)!r} is of experts behind a router, which condensed_layers="
                f"{options.condensed_layers} leaves as they are; leave one of the two out"
            )


def settle_amount_(options: "DernOptions") -> None:
    """Refuse contradictory amounts of experts and of data, and fill in how much goes where none is given."""
    if options.sparsity is not None and options.num_experts is not None:
        raise ValueError(
            f"both sparsity={options.sparsity} and num_experts={options.num_experts} are given; give one of them"
        )
    _check_condensed(options)
    if _is_narrowing(options.method) and not options.narrows:
        options.width_sparsity = 0.25
    if options.sparsity is None and options.num_experts is None and options.condensed_layers is None:
        options.sparsity = 0.0 if options.narrows else 0.5
    if options.self_share + (options.random_share or 0) >= 1:
        raise ValueError(
            f"self_share={options.self_share} and random_share={options.random_share} leave no calibration sequence "
            "for the dataset; give shares that add up to less than 1"
        )


def _is_narrowing(method: str) -> bool:
    """Return whether a method is one that makes experts narrower."""
    return "importance" in method_defaults(method)


def method_defaults(method: str) -> Mapping[str, Any]:
    """Return a method's own default options; none for an unknown method, which is refused where it is used."""
    from ..methods import METHODS

    return METHODS[method].defaults if method in METHODS else {}


def _options_of_others(method: str) -> dict[str, str]:
    """Return the options that this method ignores, each with a method that reads it."""
    from ..methods import METHODS

    if _may_read_all(method):
        return {}
    own = METHODS[method].options
    others = {option: name for name, other in METHODS.items() for option in other.options or ()}
    return {option: f"method={name!r}" for option, name in others.items() if option not in own}


def _may_read_all(method: str) -> bool:
    """Return whether a method may read every option: one that does not say which it ignores, or is not known yet."""
    from ..methods import METHODS

    return method not in METHODS or METHODS[method].options is None


def _recombination_options() -> tuple[str, ...]:
    """Return the options that have no effect without recombination."""
    from ..methods.dern import RECOMBINATION

    return RECOMBINATION
