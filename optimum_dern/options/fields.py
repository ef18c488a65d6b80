"""Options of a compression: the fields of `DernConfig`, their defaults and help texts.

Kept apart from transformers, so that the command line can list and check the options without importing it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .presets import OFF, PRESETS
from .rules import (
    check_effects,
    describes_recombination,
    idle_options,
    method_defaults,
    settle_amount_,
    settle_width_,
)
from .values import (
    check_choice,
    checked_layers,
    checked_protection,
    checked_similarity,
    checked_value,
    retained_as_reported,
)


__all__ = ["CHOICES", "GROUPS", "DernOptions", "without_retired"]

CHOICES = {
    "preset": tuple(PRESETS),
    "router_update": ("none", "rows"),
    "cluster_init": ("own", "gate", "random"),
    "calibration_order": ("sequential", "oneshot"),
    "width_budget": ("uniform", "global"),
}
RETIRED = {"layer_budget": "uniform"}  # fields of earlier releases, with the only value that still means something
GROUPS = {  # of the options in `--help`, in this order: title and description
    "what": "the method, and how it selects the retained experts",
    "how much": "how many experts stay, and which ones in any case",
    "data": "calibration data and how it is sampled",
    "how": "refits of the retained experts and the choice between candidates; by default the preset decides",
    "for ablations": "details of the methods; the defaults are meant to be left as they are",
}


def _option(default: Any, help: str, group: str | None) -> Any:
    """Make a dataclass field that carries its command-line help text and argument group.

    Args:
        default: of the field.
        help: shown by `--help`.
        group: one of `GROUPS`, under which `--help` lists the option; None for a field that is no option.
    """
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(repr=False)
class DernOptions:
    """Options for compressing a Mixture-of-Experts model, validated when they are created.

    A field left at None takes the value of the preset, or is switched off where it would have no effect in combination
    with the other options.

    Raises:
        ValueError: a value outside its range, or without effect; the message names the legal ones.
        TypeError: an unknown field.
    """

    sparsity: float | None = _option(
        None, "fraction of the routed experts that every layer drops (default: 0.5)", group="how much"
    )
    num_experts: int | None = _option(
        None, "number of routed experts that every layer keeps; give this or a sparsity", group="how much"
    )
    width: int | None = _option(
        None,
        "number of neurons that every routed expert keeps; experts stay unless num_experts or sparsity is given too",
        group="how much",
    )
    width_sparsity: float | None = _option(
        None, "fraction of its neurons that every routed expert drops, instead of width", group="how much"
    )
    width_multiple_of: int = _option(
        1,
        "with width_sparsity: round the width up to a multiple of this (kernels may want 16, 64 or 128)",
        group="how much",
    )
    width_budget: str = _option(
        "uniform",
        "with a width: uniform, the same for every expert; or global, that width on average, each expert as many as "
        "its neurons are worth beside those of the others, with zeros in the place of the rest, which saves no memory",
        group="how much",
    )
    condensed_layers: int | list[int] | None = _option(
        None,
        "with method cd_moe: make these decoder layers dense, or that many, which a search finds, each of its shared "
        "and num_experts routed experts (default: as many as a token uses); the other layers stay as they are",
        group="how much",
    )
    method: str = _option(
        "dern",
        "dern, prune, mone, ream, m_smoe, hc_smoe, mergemoe, sub_moe or uncurl drop or merge experts; heapr, camera_p "
        "or slim make them narrower; cd_moe makes layers dense",
        group="what",
    )
    preset: str = _option(
        "recommended",
        "default values of the other options: recommended (best results), fast (one pass, closed-form refit) or "
        "paper (DERN exactly as published: no refit, no guard)",
        group="what",
    )
    selection: str | None = _option(
        None,
        "criterion that selects the retained experts: router, frequency, ean, reap, man, msan, mone, hope, easy_ep, "
        "aimer, greedy or random (default: the method's own)",
        group="what",
    )
    importance: str | None = _option(
        None,
        "criterion that selects the neurons of narrower experts: heapr (needs a backward pass), camera_p (default) or "
        "slim (needs a backward pass); with method dern and no width, by which neurons weigh when recombine averages "
        "them, instead of by their experts' saliency",
        group="what",
    )
    recombine: bool | None = _option(
        None,
        "with method dern: move neurons of dropped experts to retained ones and cluster them, as in the paper; with "
        "guard the result competes with plain pruning",
        group="how",
    )
    similarity_threshold: float = _option(
        0.5,
        "with recombine: a dropped expert's neuron is moved only if its best cosine similarity to a retained "
        "expert's neuron exceeds this (the paper's alpha)",
        group="for ablations",
    )
    similarity_weights: tuple[float, float, float] = _option(
        (0.0, 1.0, 1.0),
        "weights of the gate, up and down projections in the cosine similarity of two neurons, also in the report's "
        "similarity map",
        group="for ablations",
    )
    router_update: str = _option(
        "none",
        "with recombine: none, or rows: add a dropped expert's router row to those of the experts that received its "
        "neurons, in proportion to their number",
        group="for ablations",
    )
    cluster_init: str | None = _option(
        None,
        "initial centroids of the neuron clustering: own (the retained expert's neurons), gate (the neurons "
        "of the largest gate projection weights, as in the paper) or random",
        group="for ablations",
    )
    cluster_iterations: int = _option(
        30, "maximum number of spherical k-means iterations of the neuron clustering", group="for ablations"
    )
    cluster_tolerance: float = _option(
        1e-4, "relative shift of the centroids below which k-means stops", group="for ablations"
    )
    importance_weighting: bool = _option(
        True,
        "with recombine: weight each neuron by its source expert's saliency when clusters are averaged",
        group="for ablations",
    )
    refit: bool | None = _option(
        None, "refit the retained experts: their down projections, by closed-form ridge regression", group="how"
    )
    router_refit: bool | None = _option(
        None,
        "with refit: also refit the router, by a Gauss-Newton step",
        group="how",
    )
    neuron_refit: bool | None = _option(
        None,
        "with refit: instead of the closed form, refit gate, up and down projections together by minibatch gradient "
        "descent on the error of the layer's output",
        group="how",
    )
    drift_correction: float | None = _option(
        None,
        "with refit and sequential calibration: fraction, from 0 to 1, of the error left by earlier compressed layers "
        "that a layer's refit target corrects",
        group="how",
    )
    refit_ridge: float | None = _option(
        None,
        "ridge penalty of the refits of down projections and router, relative to the mean eigenvalue of their normal "
        "equations (default: 1e-2; with guard and no neuron refit the down projections' is the best of 1e-3, 1e-2 "
        "and 1e-1)",
        group="for ablations",
    )
    refit_sweeps: int = _option(
        2,
        "passes of the down projections' refit over a layer's experts",
        group="for ablations",
    )
    guard: bool | None = _option(
        None, "keep for every layer the candidate of lowest error on held-out calibration tokens", group="how"
    )
    calibration_order: str | None = _option(
        None,
        "sequential (a layer is calibrated on the outputs of the compressed layers before it) or oneshot (on those of "
        "the original model)",
        group="how",
    )
    dataset: Any = _option(
        None,
        "calibration data: a file, a folder, a Hub dataset (owner/name, owner/name:config:split), or the name of a "
        "known one (general: a mix of domains; wikitext2, c4, c4-new); in Python also texts, chats, token ids, a "
        "datasets.Dataset, or {source: weight}",
        group="data",
    )
    self_share: float | None = _option(
        None,
        "share of text that the model writes itself among all calibration sequences, beside the num_samples of the "
        "dataset; it keeps refits from harming text that the dataset does not resemble",
        group="data",
    )
    random_share: float | None = _option(
        None,
        "likewise share of random token ids, for the same purpose (default: 0.25 where the model does not fit in "
        "memory to write text of its own, else 0)",
        group="data",
    )
    num_samples: int = _option(128, "maximum number of sequences of the dataset", group="data")
    sequence_length: int = _option(2048, "maximum number of tokens per calibration sequence", group="data")
    batch_size: int | None = _option(
        None,
        "calibration sequences per forward pass (default: as many of like lengths as have some 8,000 tokens); the "
        "result depends on it by rounding only",
        group="data",
    )
    seed: int = _option(0, "seed of the calibration draw and of every other random choice", group="data")
    text_column: str = _option("text", "column of calibration rows that holds the text", group="data")
    protect_experts: Mapping[int, list[int]] | str | None = _option(
        None,
        'experts that are never dropped: a map from decoder layers to lists of experts, such as {"3": [0, 5]}; super '
        "for experts with outlier outputs, which are detected during calibration; or the path of an earlier run's "
        "dern_report.json, whose retained experts stay",
        group="how much",
    )
    experts_multiple_of: int = _option(
        1,
        "round the number of retained experts up to a multiple of this (serving kernels may want 4 or 8)",
        group="how much",
    )
    quant_method: str = _option("dern", "constant by which transformers recognises this config", group=None)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, CHOICES["preset"])
        for option in fields(DernOptions):
            setattr(self, option.name, checked_value(option, getattr(self, option.name)))
        defaults = {**PRESETS[self.preset], "selection": "router", **method_defaults(self.method)}
        if self.condensed_layers is not None:
            self.condensed_layers = checked_layers(self.condensed_layers)
            defaults["calibration_order"] = "oneshot"
        defaults["recombine"] |= describes_recombination(self)
        for name in ("refit", "calibration_order", "recombine", *defaults):  # the first ones decide about others
            if getattr(self, name) is None:
                setattr(self, name, (OFF if name in idle_options(self) else {}).get(name, defaults[name]))
        for name in CHOICES:
            check_choice(name, getattr(self, name), CHOICES[name])
        if isinstance(self.protect_experts, str | Path) and self.protect_experts != "super":
            self.protect_experts = retained_as_reported(Path(self.protect_experts))
            if self.sparsity is None and self.num_experts is None:  # as many as stayed then
                self.num_experts = max(map(len, self.protect_experts.values()), default=None)
        settle_amount_(self)
        settle_width_(self)
        check_effects(self, defaults)
        self.similarity_weights = checked_similarity(self.similarity_weights)
        if isinstance(self.dataset, Path):
            self.dataset = str(self.dataset)
        if isinstance(self.dataset, Mapping):
            from ..data.batches import read_mapping

            self.dataset = read_mapping(self.dataset)
        if self.protect_experts not in (None, "super"):
            self.protect_experts = checked_protection(self.protect_experts)
        if self.quant_method != "dern":
            raise ValueError(f"quant_method={self.quant_method!r} is not this package's; leave it out or give 'dern'")

    @property
    def narrows(self) -> bool:
        """Whether experts are made narrower."""
        return self.width is not None or self.width_sparsity is not None

    @property
    def corrects_drift(self) -> bool:
        """Whether refits also correct the error that earlier compressed layers leave in a layer's input."""
        return self.calibration_order == "sequential" and bool(self.refit) and self.drift_correction > 0


def without_retired(values: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the fields of earlier releases that no longer exist from a saved config.

    Args:
        values: fields by name, as saved by `DernConfig.to_dict` of this or an earlier release.

    Raises:
        ValueError: a retired field with a value that this release cannot carry out.
    """
    for name, value in values.items():
        if name in RETIRED and value != RETIRED[name]:
            raise ValueError(f"{name}={value!r} is no longer supported; leave it out, which means {RETIRED[name]!r}")
    return {name: value for name, value in values.items() if name not in RETIRED}
