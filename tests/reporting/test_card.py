"""The model card: valid metadata, true numbers, and a command that makes the checkpoint again."""

import argparse
import shlex

import pytest
from huggingface_hub import ModelCard
from tiny import random_tokens

from optimum_dern import CompressionReport, DernConfig
from optimum_dern.calibration.description import describe_dataset
from optimum_dern.commands import compress
from optimum_dern.commands.arguments import config_from_arguments
from optimum_dern.evaluation.perplexity import TextLoss
from optimum_dern.reporting.card import model_card, reproduction_command
from optimum_dern.reporting.report import ModelSize


def make_report(config=None, source="allenai/OLMoE-1B-7B-0924", **fields):
    """The report of a run that never was."""
    config = config or DernConfig(dataset="notes.txt")
    return CompressionReport(
        source=source,
        revision=None,
        model_type="olmoe",
        method=config.method,
        config=config.to_dict(),
        calibration={
            "dataset": describe_dataset(config.dataset),
            "sha256": "0123456789abcdef" * 4,
            "sequences": 128,
            "tokens": 262144,
        },
        before=ModelSize(6919161856, 1281952768, 13838323712, 64),
        after=ModelSize(3697000000, 1280904192, 7394000000, 32),
        **fields,
    )


def parsed(command):
    """The command line's arguments and config, parsed as the shell and the program would."""
    words = shlex.split(command)
    assert words[:2] == ["optimum-dern", "compress"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    compress.add_arguments(parser)
    args = parser.parse_args(words[2:])
    return args, config_from_arguments(args)


def test_metadata():
    """The header is what the Hub reads."""
    content = str(model_card(make_report()))
    card = ModelCard(content)
    assert card.data.base_model == ["allenai/OLMoE-1B-7B-0924"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"moe", "dern", "expert-pruning", "compressed"} <= set(card.data.tags)
    assert "{{" not in content and "{%" not in content
    assert content.startswith("---\n")


@pytest.mark.parametrize("source", ["/home/me/models/olmoe", "./olmoe", "models/olmoe/final", None])
def test_local_sources_are_no_base_model(source):
    """A path is not a Hub id; the card's own name is taken from its last part."""
    card = model_card(make_report(source=source))
    assert card.data.base_model is None
    assert "base_model" not in card.content
    name = "olmoe" if source is None else source.split("/")[-1]
    assert f"# {name}, 32 of 64 experts" in card.content
    assert "huggingface.co/" not in card.text.replace("huggingface.co/docs", "")


def test_numbers():
    """Sizes, ratio and calibration are those of the report."""
    text = model_card(make_report()).text
    assert "| routed experts per layer | 64 | 32 |" in text
    assert "| parameters | 6,919,161,856 | 3,697,000,000 |" in text
    assert "| active parameters per token | 1,281,952,768 | 1,280,904,192 |" in text
    assert "| bytes | 13,838,323,712 | 7,394,000,000 |" in text
    assert "0.53 of the bytes" in text
    assert "128 sequences, 262,144 tokens from `notes.txt`" in text
    assert "0123456789abcdef" in text


def test_evaluation():
    """Measured losses make a table; without them the card says that none were measured."""
    report = make_report()
    assert "No evaluation was run" in model_card(report).text
    report.add_evaluation({"news": TextLoss(2.5, 0.01, 1000)}, {"news": TextLoss(2.75, 0.02, 1000)})
    text = model_card(report).text
    assert "No evaluation was run" not in text
    assert "| news | 2.5000 (0.0100) | 2.7500 (0.0200) | +0.2500 |" in text


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"preset": "paper"},
        {"num_experts": 4},
        {"sparsity": 0.25, "experts_multiple_of": 8},
        {"preset": "paper", "refit": True, "cluster_init": "own"},
        {"router_refit": False},
        {"neuron_refit": False},
        {"refit": False, "guard": False, "importance_weighting": False},
        {"calibration_order": "oneshot", "cluster_init": "random", "seed": 7},
        {"method": "prune", "selection": "reap", "num_samples": 64, "sequence_length": 512, "batch_size": 4},
        {"similarity_threshold": -0.5, "similarity_weights": (1, 0.5, 2), "router_update": "rows"},
        {"cluster_iterations": 5, "cluster_tolerance": 1e-7, "refit_ridge": 0.3, "refit_sweeps": 1},
        {"text_column": "a column"},
        {"dataset": "my notes/it's here.txt"},
        {"dataset": "a=1.txt"},
        {"protect_experts": {0: [1, 2], 3: [0]}},
        {"dataset": {"code.jsonl": 2.0, "wikitext2": 1.0}},
        {"dataset": {"my notes.txt": 0.5}},
    ],
    ids=str,
)
def test_the_command_makes_the_same_checkpoint(fields):
    """Parsed by the command line's own parser, the command gives an equal config."""
    config = DernConfig(**{"dataset": "notes.txt", **fields})
    report = make_report(config, source="./my models/olmoe")
    args, again = parsed(reproduction_command(report))
    assert again.to_dict() == config.to_dict()
    assert args.model == "./my models/olmoe"
    assert reproduction_command(report) in model_card(report).text


def test_the_command_survives_a_file(tmp_path):
    """A report that was read back gives an equal config, too."""
    report = make_report(DernConfig(dataset="notes.txt", protect_experts={3: [0]}, similarity_weights=(1, 1, 1)))
    report.save(tmp_path / "report.json")
    again = CompressionReport.load(tmp_path / "report.json")
    assert parsed(reproduction_command(again))[1].to_dict() == report.config


def test_the_command_names_the_revision():
    """A Hub model moves on; the command asks for the commit that was compressed."""
    report = make_report()
    report.revision = "abc123"
    assert parsed(reproduction_command(report))[0].revision == "abc123"


def test_defaults_are_left_out():
    """A command of defaults is short."""
    assert reproduction_command(make_report()) == (
        "optimum-dern compress allenai/OLMoE-1B-7B-0924 OUTPUT --sparsity 0.5 --dataset notes.txt"
    )


def test_data_in_memory_is_named():
    """Data that no command can give is described."""
    text = model_card(make_report(DernConfig(dataset=random_tokens(3)))).text
    assert "from `3 dicts in memory (list)`" in text
