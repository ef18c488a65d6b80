"""The model card: valid metadata, true numbers, and a command that makes the checkpoint again."""

import argparse
import shlex
import subprocess
import sys

import pytest
from hub import LoopbackHub
from hub.card import card_problems
from huggingface_hub import ModelCard
from huggingface_hub import __version__ as HUB_VERSION
from tiny import random_tokens

from optimum_dern import CompressionReport, DernConfig
from optimum_dern.commands import compress
from optimum_dern.commands.shared.arguments import config_from_arguments
from optimum_dern.evaluation.loss.perplexity import TextLoss
from optimum_dern.reporting.card import model_card
from optimum_dern.reporting.reproduction import reproduction_command
from optimum_dern.results.description import describe_dataset, recordable_dataset
from optimum_dern.results.report import ModelSize


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
    assert "leaves 53 % of the bytes" in text
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
    assert "Loss in nats per token on held-out text (standard error" in text  # how long sequences were is not known
    report.add_evaluation({"news": TextLoss(2.5, 0.01, 9)}, {"news": TextLoss(2.75, 0.02, 9, 2048)})
    assert "on held-out text, in sequences of up to 2,048 tokens (standard error" in model_card(report).text


def test_training():
    """What was trained afterwards is said; losses from before it are not the checkpoint's, later ones are."""
    before, after = {"news": TextLoss(2.5, 0.01, 1000)}, {"news": TextLoss(2.75, 0.02, 1000)}
    report = make_report()
    report.add_evaluation(before, after)
    assert "trained" not in model_card(report).text
    report.add_training("LoRA, 50 steps")
    text = model_card(report).text
    assert "It was trained after the compression: LoRA, 50 steps." in text
    assert "before it was trained.\n\n```bash" in text
    assert "2.7500" not in text and "No evaluation was run" in text
    assert "model-index" not in model_card(report).content
    report.add_evaluation(before, after)
    assert "2.7500" in model_card(report).text
    assert CompressionReport.from_dict(report.to_dict()) == report


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
        {"cluster_iterations": 5, "cluster_tolerance": 1e-7, "refit_ridge": 0.3},
        {"neuron_refit": False, "refit_sweeps": 1},
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
    report = make_report(config, source="my olmoe")
    args, again = parsed(reproduction_command(report))
    assert again.to_dict() == config.to_dict()
    assert args.model == "my olmoe"
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
    for fields, options in (({}, ""), ({"refit": False}, "--no-refit "), ({"preset": "paper"}, "--preset paper ")):
        report = make_report(DernConfig(dataset="notes.txt", **fields))
        begin, _, end = "optimum-dern compress allenai/OLMoE-1B-7B-0924 OUTPUT | --dataset notes.txt".partition("|")
        words = sorted([*options.split(), "--sparsity", "0.5"])
        command = reproduction_command(report)
        assert command.startswith(begin) and command.endswith(end)
        assert sorted(command.removeprefix(begin).removesuffix(end).split()) == words


def test_data_in_memory_is_named():
    """Data that no command can give is described, and the command says where it goes."""
    report = make_report(DernConfig(dataset=random_tokens(3)), versions={"torch": "2.6"})
    report.config["dataset"] = recordable_dataset(report.config["dataset"])
    text = model_card(report).text
    assert "from `3 dicts in memory (list)`" in text
    assert reproduction_command(report).endswith("--dataset DATA")
    assert "`DATA` stands for" in text
    assert "`DATA` stands for" not in model_card(make_report(versions={"torch": "2.6"})).text


def test_versions():
    """The command makes the same checkpoint with the same tools, so they are named."""
    text = model_card(make_report(versions={"optimum-dern": "0.1.0", "torch": "2.6"})).text
    assert "With optimum-dern 0.1.0, torch 2.6:\n\n```bash" in text
    assert "With " not in model_card(make_report()).text


def evaluated(**fields):
    """A report with losses on two texts."""
    report = make_report(**fields)
    before = {"news": TextLoss(2.5, 0.01, 1000), "code: C": TextLoss(1.5, 0.01, 1000)}
    report.add_evaluation(before, {"news": TextLoss(2.75, 0.02, 1000), "code: C": TextLoss(1.66666, 0.02, 1000)})
    return report


def test_evaluation_is_in_the_metadata():
    """The compressed model's losses, as the Hub shows them; none where none was measured."""
    results = ModelCard(str(model_card(evaluated()))).data.eval_results
    assert {result.dataset_name: result.metric_value for result in results} == {"news": 2.75, "code: C": 1.6667}
    assert {(result.task_type, result.metric_type) for result in results} == {("text-generation", "loss")}
    assert "model-index" not in model_card(make_report()).content


VALIDATE = (
    "import sys; from huggingface_hub import ModelCard; [ModelCard.load(name).validate() for name in sys.argv[1:]]"
)


@pytest.mark.skipif(
    HUB_VERSION.startswith("1."), reason="this check of huggingface_hub 1 asks no Hub but the real one"
)
def test_the_hub_accepts_the_card(tmp_path):
    """By the client's own check, which asks the Hub; what is wrong is refused there."""
    cards = {
        "hub.md": model_card(evaluated()),
        "local.md": model_card(make_report(source="./olmoe")),
        "memory.md": model_card(make_report(DernConfig(dataset=random_tokens(3)), source=None)),
    }
    for name, card in cards.items():
        card.save(tmp_path / name)
    (tmp_path / "wrong.md").write_text(
        str(cards["hub.md"]).replace("base_model:\n- ", "base_model:\n- /home/"), "utf-8"
    )
    with LoopbackHub() as hub:
        for names, fault in ((list(cards), None), (["wrong.md"], "base_model is not valid")):
            done = subprocess.run(
                [sys.executable, "-c", VALIDATE, *(str(tmp_path / name) for name in names)],
                env=hub.environment(tmp_path),
                capture_output=True,
                text=True,
            )
            assert (done.returncode == 0) == (fault is None), done.stderr
            assert fault is None or fault in done.stderr
    assert [stage for stage, _, _ in hub.requests] == ["validate"] * 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("---\n", ""),
        ("tags:\n", "tags: [\n"),
        ("- moe\n", "- 5\n"),
        ("pipeline_tag: text-generation", "pipeline_tag: Text Generation"),
        ("library_name: transformers", "license: other"),
        ("  - task:\n      type: text-generation\n    dataset", "  - dataset"),
        ("value: 2.75", "other: 2.75"),
    ],
)
def test_the_check_finds_faults(old, new):
    """So that a card which passes means something."""
    content = str(model_card(evaluated()))
    assert card_problems(content) == []
    assert old in content
    assert card_problems(content.replace(old, new, 1)) != []
