"""Everything that decides how a model is compressed: the fields of `DernConfig` and their checks.

Kept apart from transformers, so that the command line can list and check the options without importing it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any


__all__ = ["CHOICES", "OFF", "PRESETS", "DernOptions", "without_retired"]

PRESETS = {
    "recommended": {
        "cluster_init": "own",
        "refit": True,
        "router_refit": True,
        "neuron_refit": True,
        "drift_correction": 0.5,
        "guard": True,
        "calibration_order": "sequential",
    },
    "paper": {
        "cluster_init": "gate",
        "refit": False,
        "router_refit": False,
        "neuron_refit": False,
        "drift_correction": 0.0,
        "guard": False,
        "calibration_order": "oneshot",
    },
}
RETIRED = {"layer_budget": "uniform"}  # fields of earlier releases, with the only value that still means something
OFF = {"router_refit": False, "neuron_refit": False, "drift_correction": 0.0}
CHOICES = {
    "preset": tuple(PRESETS),
    "router_update": ("none", "rows"),
    "cluster_init": ("own", "gate", "random"),
    "calibration_order": ("sequential", "oneshot"),
}
PROTECTION = (
    "map decoder layers to lists of experts, like {3: [0, 5]}, be 'super', or be the path of a dern_report.json"
)
# Of fields, by annotation and by name: what is accepted, and its words.
KINDS = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a finite number"),
    str: (str, "a name"),
}
COUNTS = (
    "num_experts",
    "cluster_iterations",
    "refit_sweeps",
    "num_samples",
    "sequence_length",
    "batch_size",
    "experts_multiple_of",
)
RANGES = {
    **dict.fromkeys(COUNTS, (lambda value: value >= 1, "of at least 1")),
    **dict.fromkeys(("refit_ridge", "cluster_tolerance"), (lambda value: value > 0, "above 0")),
    "sparsity": (lambda value: 0 <= value < 1, "of at least 0 and below 1 (the fraction dropped)"),
    "drift_correction": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"),
}


def _option(default: Any, help: str) -> Any:
    """A field whose help text the command line shares."""
    return field(default=default, metadata={"help": help})


@dataclass(repr=False)
class DernOptions:
    """How to compress a Mixture-of-Experts model.

    Fields left at None that a preset names take the preset's value when the options are made, or are off where they
    would have no effect beside the others.

    Raises:
        ValueError: a value outside its range, or without effect; the message names the legal ones.
        TypeError: an unknown field.
    """

    sparsity: float | None = _option(None, "fraction of the routed experts dropped per layer (default: 0.5)")
    num_experts: int | None = _option(None, "how many experts stay per layer, instead of a sparsity")
    method: str = _option("dern", "dern, prune, ream, m_smoe, hc_smoe, mergemoe or sub_moe")
    preset: str = _option("recommended", "recommended, or paper: DERN exactly as published, no refit and no guard")
    selection: str | None = _option(
        None,
        "which experts stay: router, frequency, ean, reap, man, msan, hope, easy_ep, aimer, greedy or random "
        "(default: the method's own)",
    )
    similarity_threshold: float = _option(0.5, "alpha: a segment moves only if its best cosine exceeds it")
    similarity_weights: tuple[float, float, float] = _option(
        (0.0, 1.0, 1.0), "of the gate, up and down projections, in the report's map of similarities too"
    )
    router_update: str = _option("none", "none, or rows: add moved shares of dropped router rows to their destination")
    cluster_init: str | None = _option(None, "initial centroids: own (neurons), gate (largest response) or random")
    cluster_iterations: int = _option(30, "of spherical k-means, at most")
    cluster_tolerance: float = _option(1e-4, "relative centroid shift that ends k-means")
    importance_weighting: bool = _option(True, "segments weigh as their source expert's saliency")
    refit: bool | None = _option(None, "closed-form ridge refit of the retained experts' down projections")
    router_refit: bool | None = _option(None, "with refit: Gauss-Newton steps of the router in turn with it")
    neuron_refit: bool | None = _option(
        None, "with refit: minibatch descent of all projections towards the layer's own output"
    )
    drift_correction: float | None = _option(
        None, "with refit, sequential: share of what earlier layers have changed that a layer's refits make up for"
    )
    refit_ridge: float | None = _option(
        None,
        "ridge of the refit, relative to the mean eigenvalue of its equations (default: 1e-2; with guard and without "
        "neuron_refit, the best of 1e-3, 1e-2 and 1e-1)",
    )
    refit_sweeps: int = _option(
        3, "passes of the refit over a layer's experts; with guard and neuron_refit, the default, it is always one"
    )
    guard: bool | None = _option(None, "keep per layer the candidate of lowest error on held-out calibration tokens")
    calibration_order: str | None = _option(None, "sequential (later layers see compressed ones) or oneshot")
    dataset: Any = _option(None, "calibration data: file, folder, wikitext2, c4, texts, tokens or {source: weight}")
    num_samples: int = _option(128, "calibration sequences, at most")
    sequence_length: int = _option(2048, "tokens per calibration sequence, at most")
    batch_size: int = _option(1, "calibration sequences per forward pass")
    seed: int = _option(0, "of the calibration draw and of every random choice")
    text_column: str = _option("text", "column of calibration rows that holds the text")
    protect_experts: Mapping[int, list[int]] | str | None = _option(
        None,
        "experts never dropped: decoder layer -> experts; super: those with outlier outputs, found by the way; or an "
        "earlier dern_report.json, whose experts stay",
    )
    experts_multiple_of: int = _option(1, "round the retained count up to a multiple (serving kernels like 4 or 8)")
    quant_method: str = _option("dern", "fixed: how transformers recognises this config")

    def __post_init__(self) -> None:
        self._choose("preset")
        for option in fields(DernOptions):
            self._check_value(option)
        defaults = {**PRESETS[self.preset], "selection": "router", **_method_defaults(self.method)}
        for name in ("refit", "calibration_order", *defaults):  # the first two decide about others
            if getattr(self, name) is None:
                setattr(self, name, (OFF if name in self._idle() else {}).get(name, defaults[name]))
        for name in CHOICES:
            self._choose(name)
        if isinstance(self.protect_experts, str | Path) and self.protect_experts != "super":
            self._retain_as_reported(Path(self.protect_experts))
        self._check_amount()
        self._check_effects(defaults)
        self._check_similarity()
        if isinstance(self.dataset, Path):
            self.dataset = str(self.dataset)
        if isinstance(self.dataset, Mapping):
            from .data.batches import read_mapping

            self.dataset = read_mapping(self.dataset)
        if self.protect_experts not in (None, "super"):
            self.protect_experts = _normalised_protection(self.protect_experts)
        if self.quant_method != "dern":
            raise ValueError(f"quant_method={self.quant_method!r} is not this package's; leave it out or give 'dern'")

    @property
    def corrects_drift(self) -> bool:
        """Whether refits also make up for what compressed layers before have changed."""
        return self.calibration_order == "sequential" and bool(self.refit) and self.drift_correction > 0

    def _idle(self) -> dict[str, str]:
        """Options without effect beside the others, and what they would need."""
        idle = _options_of_others(self.method)
        if self.calibration_order == "oneshot":
            idle["drift_correction"] = "calibration_order='sequential'"
        if self.guard and self.neuron_refit:
            idle["refit_sweeps"] = "neuron_refit=False or guard=False"
        if self.refit is not None and not self.refit:
            idle |= dict.fromkeys((*OFF, "refit_ridge", "refit_sweeps"), "refit=True")
        return idle

    def _check_effects(self, filled: Mapping[str, Any]) -> None:
        """Refuse what has no effect, unless it is off or the default, as in a config that was written to a file."""
        defaults = {option.name: option.default for option in fields(DernOptions)} | filled | OFF
        for name, needed in self._idle().items():
            if getattr(self, name) != defaults[name]:
                given = f"{name}={getattr(self, name)!r}"
                raise ValueError(f"{given} has no effect without {needed}; give {needed}, or leave {name} out")

    def _choose(self, name: str) -> None:
        if getattr(self, name) not in CHOICES[name]:
            raise ValueError(
                f"{name}={getattr(self, name)!r}, but it must be one of {', '.join(map(repr, CHOICES[name]))}"
            )

    def _check_value(self, option: Field) -> None:
        """Refuse what is not of the field's kind and range; numpy's numbers become Python's."""
        value, kind = getattr(self, option.name), next((k for k in KINDS if option.type in (k, k | None)), None)
        if kind is None or (value is None and option.default is None):
            return
        accepted, words = KINDS[kind]
        holds, range_words = RANGES.get(option.name, (lambda value: True, ""))
        of_kind = isinstance(value, bool) == (kind is bool) and isinstance(value, accepted)
        if not of_kind or (isinstance(value, Real) and not _is_finite(value)) or not holds(value):
            raise ValueError(f"{option.name}={value!r}, but it must be {words} {range_words}".rstrip())
        setattr(self, option.name, kind(value))

    def _check_amount(self) -> None:
        if self.sparsity is not None and self.num_experts is not None:
            raise ValueError(
                f"both sparsity={self.sparsity} and num_experts={self.num_experts} are given; give one of them"
            )
        if self.sparsity is None and self.num_experts is None:
            self.sparsity = 0.5

    def _retain_as_reported(self, path: Path) -> None:
        """Take the retained experts of an earlier report, and with them, unless told otherwise, their number."""
        try:
            layers = json.loads(path.read_text("utf-8"))["layers"]
            self.protect_experts = {layer["layer"]: layer["retained"] for layer in layers}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"protect_experts={str(path)!r} is not a dern_report.json ({error!r}); it must {PROTECTION}"
            ) from error
        if self.sparsity is None and self.num_experts is None:
            self.num_experts = max(map(len, self.protect_experts.values()), default=None)

    def _check_similarity(self) -> None:
        try:
            weights = tuple(float(weight) for weight in self.similarity_weights)
        except (TypeError, ValueError):  # no numbers, or nothing that has several
            weights = ()
        if len(weights) != 3 or not all(map(_is_finite, weights)) or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(
                f"similarity_weights={self.similarity_weights!r}, but it must be three finite weights >= 0 (gate, up, "
                "down), not all zero"
            )
        self.similarity_weights = weights


def _method_defaults(method: str) -> Mapping[str, Any]:
    """What a method's paper fixes; nothing for a method that does not exist, which is refused where it is used."""
    from .methods import METHODS

    return METHODS[method].defaults if method in METHODS else {}


def _options_of_others(method: str) -> dict[str, str]:
    """Options that only other methods read, and the method that each of them would need."""
    from .methods import METHODS

    own = METHODS[method].options if method in METHODS else None
    if own is None:  # it may read any
        return {}
    others = {option: name for name, other in METHODS.items() for option in other.options or ()}
    return {option: f"method={name!r}" for option, name in others.items() if option not in own}


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a saved config, without those of earlier releases that no longer exist.

    Args:
        values: by name, as `DernConfig.to_dict` of this or an earlier release gave them.

    Raises:
        ValueError: a retired field with a value that this release cannot carry out.
    """
    for name, value in values.items():
        if name in RETIRED and value != RETIRED[name]:
            raise ValueError(f"{name}={value!r} is no longer supported; leave it out, which means {RETIRED[name]!r}")
    return {name: value for name, value in values.items() if name not in RETIRED}


def _is_finite(value: Real) -> bool:
    """Whether a number is neither NaN nor infinite, nor too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _normalised_protection(protect: Any) -> dict[int, list[int]]:
    try:
        return {int(layer): sorted({int(expert) for expert in experts}) for layer, experts in protect.items()}
    except (AttributeError, TypeError, ValueError) as error:  # no mapping, no list, no number
        raise ValueError(f"protect_experts={protect!r}, but it must {PROTECTION}") from error
