"""`DernConfig`: presets, ranges, and its life as JSON."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_tokens, sample_texts

from optimum_dern import DernConfig
from optimum_dern.options import CHOICES, PRESETS


def test_defaults():
    """The documented defaults."""
    expected = {
        "sparsity": 0.5,
        "num_experts": None,
        "condensed_layers": None,
        "width": None,
        "width_sparsity": None,
        "width_multiple_of": 1,
        "width_budget": "uniform",
        "importance": None,
        "method": "dern",
        "preset": "recommended",
        "selection": "router",
        "recombine": False,
        "similarity_threshold": 0.5,
        "similarity_weights": (0.0, 1.0, 1.0),
        "router_update": "none",
        "cluster_init": "own",
        "cluster_iterations": 30,
        "cluster_tolerance": 1e-4,
        "importance_weighting": True,
        "refit": True,
        "router_refit": False,
        "neuron_refit": True,
        "drift_correction": 0.5,
        "refit_ridge": None,
        "refit_sweeps": 2,
        "guard": True,
        "calibration_order": "sequential",
        "dataset": None,
        "num_samples": 128,
        "sequence_length": 2048,
        "batch_size": None,
        "seed": 0,
        "self_share": 0.0,  # of the tests; 2 / 3 otherwise
        "random_share": None,
        "text_column": "text",
        "protect_experts": None,
        "experts_multiple_of": 1,
        "quant_method": "dern",
    }
    assert vars(DernConfig()) == expected


def test_paper_preset():
    """DERN exactly as published: neither refit nor guard, statistics of the original model."""
    config = DernConfig(preset="paper")
    assert not (config.refit or config.router_refit or config.neuron_refit or config.guard)
    assert (config.calibration_order, config.cluster_init) == ("oneshot", "gate")


@pytest.mark.parametrize(
    ("preset", "field", "value"),
    [
        ("paper", "refit", True),
        ("paper", "guard", True),
        ("recommended", "recombine", True),
        ("fast", "calibration_order", "sequential"),
        ("paper", "calibration_order", "sequential"),
        ("paper", "cluster_init", "random"),
        ("paper", "refit", False),
        ("recommended", "router_refit", True),
        ("recommended", "neuron_refit", False),
        ("recommended", "guard", False),
    ],
)
def test_explicit_fields_win_over_the_preset(preset, field, value):
    """A preset fills only what was left open."""
    config = DernConfig(preset=preset, **{field: value})
    rest = {name: setting for name, setting in PRESETS[preset].items() if name != field}
    assert getattr(config, field) == value
    assert {name: getattr(config, name) for name in rest} == rest


@pytest.mark.parametrize(
    ("fields", "off"),
    [
        ({"refit": False}, {"router_refit": False, "neuron_refit": False, "drift_correction": 0}),
        ({"calibration_order": "oneshot"}, {"drift_correction": 0}),
        (
            {"method": "cd_moe", "condensed_layers": [5, 3], "num_experts": 0},
            {"neuron_refit": False, "drift_correction": 0, "calibration_order": "oneshot", "sparsity": None},
        ),
        ({"preset": "paper", "refit": True, "calibration_order": "sequential"}, {"router_refit": False}),
    ],
)
def test_what_would_have_no_effect_is_off(fields, off):
    """A report does not tell of steps that were not done; explicit values that change nothing pass."""
    assert {name: getattr(DernConfig(**fields), name) for name in off} == off
    assert DernConfig(**fields, **off) == DernConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"refit": False, "neuron_refit": True}, "neuron_refit=True has no effect without refit=True; give refit"),
        ({"refit": False, "router_refit": True}, "router_refit=True has no effect without refit=True"),
        ({"preset": "paper", "router_refit": True}, "or leave router_refit out"),
        ({"refit": False, "drift_correction": 0.1}, "drift_correction=0.1 has no effect without refit=True"),
        ({"calibration_order": "oneshot", "drift_correction": 1}, "without calibration_order='sequential'"),
        ({"refit": False, "refit_ridge": 0.1}, "refit_ridge=0.1 has no effect without refit=True"),
        ({"preset": "paper", "refit_sweeps": 5}, "refit_sweeps=5 has no effect without refit=True"),
        (
            {"recombine": False, "similarity_threshold": 0.1},
            "similarity_threshold=0.1 has no effect without recombine=True",
        ),
        ({"method": "prune", "recombine": True}, "recombine=True has no effect without method='dern'"),
        ({"protect_experts": "supper"}, r"'supper' is not a dern_report.json.*like {3: \[0, 5\]}, be 'super', or"),
        ({"sparsity": 0.5, "num_experts": 4}, "give one of them"),
        ({"sparsity": 1.0}, "below 1"),
        ({"sparsity": -0.1}, "at least 0"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"num_experts": 0}, "whole number of at least 1; 0 is for condensed_layers"),
        ({"condensed_layers": 2}, "condensed_layers=2 needs method='cd_moe', not 'dern'"),
        ({"method": "cd_moe", "condensed_layers": 0}, "a list of decoder layers, such as"),
        ({"method": "cd_moe", "condensed_layers": []}, "condensed_layers=.., but it must be a list"),
        ({"method": "cd_moe", "condensed_layers": [1.5]}, "or a whole number of layers of at least 1"),
        ({"method": "cd_moe", "condensed_layers": True}, "condensed_layers=True"),
        ({"method": "cd_moe", "condensed_layers": 2, "sparsity": 0.5}, "sparsity=0.5 is of experts behind a router"),
        ({"method": "cd_moe", "condensed_layers": 2, "width": 8}, "width=8 is of experts behind a router"),
        ({"method": "cd_moe", "condensed_layers": 2, "neuron_refit": True}, "without condensed_layers=None"),
        ({"method": "cd_moe", "condensed_layers": [2], "calibration_order": "sequential"}, "has no effect without"),
        ({"num_experts": 4.0}, "whole number"),
        ({"num_experts": True}, "whole number"),
        ({"preset": "best"}, "'recommended', 'fast', 'paper'"),
        ({"router_update": "columns"}, "'none', 'rows'"),
        ({"cluster_init": "kmeans++"}, "'own', 'gate', 'random'"),
        ({"calibration_order": "parallel"}, "'sequential', 'oneshot'"),
        ({"cluster_iterations": 0}, "cluster_iterations=0"),
        ({"cluster_tolerance": 0.0}, "above 0"),
        ({"refit_ridge": -1.0}, "above 0"),
        ({"refit_sweeps": 0}, "refit_sweeps=0"),
        ({"drift_correction": 1.5}, "from 0 to 1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"sequence_length": 1.5}, "sequence_length=1.5"),
        ({"batch_size": "8"}, "batch_size='8'"),
        ({"experts_multiple_of": 0}, "experts_multiple_of=0"),
        ({"similarity_weights": (1.0, 1.0)}, "three finite weights"),
        ({"similarity_weights": (0.0, 0.0, 0.0)}, "three finite weights"),
        ({"similarity_weights": (1.0, -1.0, 1.0)}, "three finite weights"),
        ({"similarity_threshold": "high"}, "must be a finite number"),
        ({"sparsity": "half"}, "sparsity='half', but it must be a finite number of at least 0"),
        ({"seed": None}, "seed=None, but it must be a whole number from 0"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "from 0 to 2[*][*]32 - 1"),
        ({"num_samples": None}, "num_samples=None"),
        ({"drift_correction": True}, "drift_correction=True, but it must be a finite number from 0 to 1"),
        ({"dataset": {"train": ["one"], "test": ["two"]}}, r"'train', 'test'.*dataset\['train'\]"),
        ({"protect_experts": [0, 1]}, "must map decoder layers"),
        ({"protect_experts": {"first": [0]}}, "must map decoder layers"),
        ({"protect_experts": {0: 1}}, "must map decoder layers"),
        ({"protect_experts": {0: [None]}}, "must map decoder layers"),
        ({"similarity_weights": 1}, "three finite weights"),
        ({"similarity_weights": ("high", 1, 1)}, "three finite weights"),
        ({"similarity_weights": (None, 1, 1)}, "three finite weights"),
        ({"method": ["dern"]}, r"method=\['dern'\], but it must be a name"),
        ({"selection": 3}, "selection=3, but it must be a name"),
        ({"text_column": None}, "text_column=None, but it must be a name"),
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
    ],
)
def test_out_of_range(fields, match):
    """One exception that tells what was given and what is allowed."""
    with pytest.raises(ValueError, match=match):
        DernConfig(**fields)


OF_DERN = {
    "similarity_threshold": 0.3,
    "router_update": "rows",
    "cluster_init": "random",
    "cluster_iterations": 5,
    "cluster_tolerance": 0.1,
    "importance_weighting": False,
}


@pytest.mark.parametrize("method", ["prune", "ream", "m_smoe", "hc_smoe", "mergemoe", "sub_moe", "uncurl"])
@pytest.mark.parametrize("preset", PRESETS)
def test_options_of_another_method(method, preset):
    """What only dern reads is refused where another method would ignore it; its defaults pass, as from a file."""
    for name, value in OF_DERN.items():
        assert getattr(DernConfig(preset=preset, **{name: value}), name) == value
        with pytest.raises(ValueError, match=f"{name}=.* has no effect without method='dern'; give method='dern', or"):
            DernConfig(method=method, preset=preset, **{name: value})
    config = DernConfig(method=method, preset=preset)
    assert DernConfig.from_dict(config.to_dict()) == config


def test_methods_of_others_may_read_any_option():
    """Nobody knows what a method that is not this package's reads."""
    assert DernConfig(method="my method", **OF_DERN).cluster_init == "random"
    assert DernConfig(method="my method", importance="heapr").importance == "heapr"


def test_importance_asks_for_recombination():
    """With dern and no width, it weighs the neurons that are averaged; with a width, it chooses them."""
    assert DernConfig(importance="slim").recombine
    assert not DernConfig(importance="slim", width=8).recombine
    assert not DernConfig(importance="slim", method="prune", width=8).recombine
    for fields in ({"recombine": False}, {"method": "ream"}, {"method": "prune"}):
        with pytest.raises(ValueError, match=r"width or width_sparsity \(or method='dern' with recombine=True\)"):
            DernConfig(importance="slim", **fields)
    with pytest.raises(ValueError, match="importance='slim' has no effect without importance_weighting=True"):
        DernConfig(importance="slim", importance_weighting=False)
    with pytest.raises(ValueError, match="width_budget='global' has no effect without width or width_sparsity"):
        DernConfig(width_budget="global")


@pytest.mark.parametrize("fields", [{}, {"preset": "fast"}, {"neuron_refit": False}])
def test_sweeps_that_are_made(fields):
    """The number of sweeps counts in every preset with refits."""
    assert DernConfig(refit_sweeps=5, **fields).refit_sweeps == 5


def test_details_of_the_recombination_ask_for_it():
    """Who gives a threshold wants neurons moved, whatever the preset leaves out."""
    assert DernConfig(similarity_threshold=0.3).recombine and not DernConfig().recombine
    assert not DernConfig(method="prune").recombine


KINDS = (int, int | None, float, float | None)
NUMBERS = [field.name for field in dataclasses.fields(DernConfig) if field.type in KINDS]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), numpy.float32("nan")])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite(name, value):
    """NaN compares with nothing and infinity is no setting: both are refused in every field that holds a number."""
    assert len(NUMBERS) > 10
    with pytest.raises(ValueError, match=f"{name}=.*, but it must be a"):
        DernConfig(**{name: value})


def test_a_number_beyond_all_floats():
    """A whole number may be too large to be one."""
    with pytest.raises(ValueError, match="must be a finite number"):
        DernConfig(similarity_threshold=10**400)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_finite(value):
    """In a field that holds several numbers, too."""
    for weights in ((value, 1.0, 1.0), (1.0, 1.0, value)):
        with pytest.raises(ValueError, match="three finite weights"):
            DernConfig(similarity_weights=weights)


FLAGS = [field.name for field in dataclasses.fields(DernConfig) if field.type in (bool, bool | None)]


@pytest.mark.parametrize("value", [0, 1, "no", 1.0, numpy.True_, torch.tensor(True)])
@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name, value):
    """What only counts as true elsewhere would run as yes, or worse; from keywords as from a dict."""
    for make in (lambda fields: DernConfig(**fields), DernConfig.from_dict):
        with pytest.raises(ValueError, match=f"{name}=.*must be True or False"):
            make({name: value})


def test_numbers_of_numpy():
    """They become Python's, so that the config is JSON."""
    config = DernConfig(num_experts=numpy.int64(4), seed=numpy.int32(3), drift_correction=numpy.float32(0.5))
    assert json.loads(json.dumps(config.to_dict())) == json.loads(
        json.dumps(DernConfig(num_experts=4, seed=3, drift_correction=0.5).to_dict())
    )


def test_unknown_fields():
    """A misspelt field is an error, from keywords as from a dict."""
    with pytest.raises(TypeError, match="num_expert"):
        DernConfig(num_expert=4)
    with pytest.raises(TypeError, match="num_expert"):
        DernConfig.from_dict({"num_expert": 4})


def test_protection_is_normalised():
    """JSON turns layers into strings; both forms mean the same."""
    assert DernConfig(protect_experts={"3": [5, 0, 5]}) == DernConfig(protect_experts={3: (0, 5)})
    assert DernConfig(protect_experts={"3": [5, 0, 5]}).protect_experts == {3: [0, 5]}


fields = st.fixed_dictionaries(
    {},
    optional={
        "sparsity": st.floats(0, 0.99),
        "preset": st.sampled_from(CHOICES["preset"]),
        "method": st.sampled_from(["dern", "prune"]),
        "selection": st.sampled_from(["router", "reap", "random"]),
        "similarity_threshold": st.floats(-1, 2),
        "similarity_weights": st.tuples(*[st.floats(0.1, 3)] * 3),
        "router_update": st.sampled_from(CHOICES["router_update"]),
        "cluster_init": st.sampled_from((None, *CHOICES["cluster_init"])),
        "calibration_order": st.sampled_from((None, *CHOICES["calibration_order"])),
        "refit": st.sampled_from([None, True, False]),
        "router_refit": st.sampled_from([None, True, False]),
        "neuron_refit": st.sampled_from([None, True, False]),
        "drift_correction": st.sampled_from([None, 0.0, 0.3, 1]),
        "guard": st.sampled_from([None, True, False]),
        "importance_weighting": st.booleans(),
        "cluster_iterations": st.integers(1, 99),
        "refit_ridge": st.floats(1e-6, 10),
        "batch_size": st.sampled_from([None, 1, 8]),
        "seed": st.integers(0, 2**31),
        "dataset": st.sampled_from([None, "c4", Path("notes.txt"), {"a.txt": 2, "c4": 1.5}, ["one", "two"]]),
        "protect_experts": st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 7)), max_size=3),
    },
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(fields)
def test_json_round_trip(values):
    """`to_dict` is JSON and makes an equal config, so that a run can be repeated from it."""
    try:
        config = DernConfig(**values)
    except ValueError as error:
        assert "has no effect without" in str(error)
        return
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored.keys() == {field.name for field in dataclasses.fields(DernConfig)}
    assert DernConfig.from_dict(stored) == config
    assert DernConfig(**stored).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("dataset", "description"),
    [
        (random_tokens(3), "3 dicts in memory (list)"),
        ([torch.tensor([1, 2]), torch.tensor([3])], "2 Tensors in memory (list)"),
        ((text for text in sample_texts()), "unknown number rows in memory (generator)"),
    ],
)
def test_datasets_in_memory_are_described(dataset, description):
    """What JSON cannot hold is recorded as a description; the config keeps the object."""
    config = DernConfig(dataset=dataset)
    assert config.dataset is dataset
    assert json.loads(json.dumps(config.to_dict()))["dataset"] == description


def test_a_datasets_object_is_described():
    """A `datasets.Dataset`, too."""
    from datasets import Dataset

    config = DernConfig(dataset=Dataset.from_dict({"text": sample_texts()}))
    assert config.to_dict()["dataset"] == "12 rows in memory (Dataset)"


def test_paths_become_strings():
    """A path object is stored as text."""
    assert DernConfig(dataset=Path("a") / "b.txt").dataset == str(Path("a") / "b.txt")


def test_to_dict_does_not_share_state():
    """Changing the dict or a copy leaves the config alone."""
    config = DernConfig(protect_experts={0: [1]}, similarity_weights=[1, 1, 1])
    other = copy.deepcopy(config)
    assert other == config and other is not config
    other.protect_experts[0].append(2)
    config.to_dict()["similarity_weights"].append(9)
    assert config == DernConfig(protect_experts={0: [1]}, similarity_weights=(1, 1, 1))


def test_transformers_takes_it_for_a_quantisation_config():
    """It is a `QuantizationConfigMixin`, so that `from_pretrained(quantization_config=...)` will accept it."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    config = DernConfig(num_experts=4)
    assert isinstance(config, QuantizationConfigMixin)
    assert json.loads(config.to_json_string(use_diff=False))["num_experts"] == 4
    assert "num_experts" in repr(config)


def test_retained_experts_of_an_earlier_report(tmp_path):
    """The path of a report protects the experts that it kept, and takes their number unless another is asked for."""
    layers = [{"layer": 1, "retained": [0, 2, 5]}, {"layer": 3, "retained": [1, 2, 7]}]
    path = tmp_path / "dern_report.json"
    path.write_text(json.dumps({"layers": layers}), "utf-8")
    config = DernConfig(protect_experts=path)
    assert config.protect_experts == {1: [0, 2, 5], 3: [1, 2, 7]}
    assert (config.num_experts, config.sparsity) == (3, None)
    assert DernConfig(protect_experts=str(path), num_experts=4).num_experts == 4
    path.write_text("[]", "utf-8")
    with pytest.raises(ValueError, match="is not a dern_report.json"):
        DernConfig(protect_experts=path)
    with pytest.raises(ValueError, match="is not a dern_report.json"):
        DernConfig(protect_experts=tmp_path / "nowhere.json")


def test_own_text_is_the_default():
    """Outside these tests, which turn it off (conftest.py), two thirds of all calibration text are the model's own."""
    code = "from optimum_dern.options import PRESETS; print({n: p['self_share'] for n, p in PRESETS.items()})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{{'recommended': {2 / 3}, 'fast': {2 / 3}, 'paper': 0.0}}"


@pytest.mark.parametrize(
    ("shares", "match"),
    [
        ({"self_share": 1.0}, "self_share=1.0, but it must be a finite number of at least 0 and below 1"),
        ({"random_share": -0.1}, "random_share=-0.1"),
        ({"self_share": float("nan")}, "self_share=nan"),
        ({"self_share": 0.75, "random_share": 0.25}, "leave no calibration sequence for the dataset"),
    ],
)
def test_shares_that_cannot_be(shares, match):
    """They are refused when the config is made."""
    with pytest.raises(ValueError, match=match):
        DernConfig(**shares)
