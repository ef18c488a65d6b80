"""Criteria, protection and mixes of text on the command line, from the option to the report."""

import json

import pytest
from tiny import make_model, sample_texts, tiny_tokenizer

from optimum_dern import CompressionReport, DernCompressor, DernConfig
from optimum_dern.commands.main import main
from optimum_dern.data.batches import load_batches
from optimum_dern.results.description import describe_calibration


QUICK = ["--num-experts", "4", "--method", "prune", "--preset", "paper", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "mixtral"
    make_model("mixtral").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two calibration sources of different forms."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "notes.txt").write_text("\n<|endoftext|>\n".join(sample_texts() * 4), "utf-8")
    rows = [json.dumps({"text": f"def function_{i}(x):\n    return x + {i}"}) for i in range(30)]
    (folder / "code.jsonl").write_text("\n".join(rows), "utf-8")
    return folder / "notes.txt", folder / "code.jsonl"


def report_of(output):
    """What a run has written about itself."""
    return CompressionReport.load(output / "dern_report.json")


def test_a_mix_of_sources(tmp_path, capsys, monkeypatch, checkpoint, sources):
    """`--dataset A=3 B=1` calibrates on three quarters of A and one of B; the report can be repeated beside them."""
    notes, code = map(str, sources)
    data = ["--dataset", f"{notes}=3", f"{code}=1", "--num-samples", "8"]
    main(["compress", str(checkpoint), str(tmp_path / "out"), *QUICK, *data, "--selection", "reap"])
    report = report_of(tmp_path / "out")
    monkeypatch.chdir(sources[0].parent)
    mix = {"notes.txt": 3.0, "code.jsonl": 1.0}
    assert report.config["dataset"] == mix
    assert report.calibration["sequences"] == 8
    assert report.calibration["dataset"] == "3 x notes.txt + 1 x code.jsonl"
    parts = [
        load_batches(name, tiny_tokenizer(), num_samples=count, sequence_length=32)
        for name, count in ((notes, 6), (code, 2))
    ]
    assert report.calibration["sha256"] == describe_calibration(mix, parts[0] + parts[1])["sha256"]
    again = DernCompressor(**{**report.config, "num_experts": 4, "sparsity": None})
    model = again.compress_model(make_model("mixtral"), tiny_tokenizer())
    assert model.config.num_local_experts == 4
    assert [layer.saliency for layer in again.report.layers] == [layer.saliency for layer in report.layers]


@pytest.mark.parametrize("selection", ["hope", "easy_ep", "greedy"])
def test_criteria(tmp_path, capsys, monkeypatch, checkpoint, sources, selection):
    """`--selection` reaches the report, with the experts that the Python API retains."""
    data = ["--dataset", str(sources[0]), "--num-samples", "6", "--selection", selection]
    main(["compress", str(checkpoint), str(tmp_path / "out"), *QUICK, *data])
    report = report_of(tmp_path / "out")
    assert report.config["selection"] == selection
    monkeypatch.chdir(sources[0].parent)  # the report has the names of files alone
    same = DernCompressor(**report.config)
    same.compress_model(make_model("mixtral"), tiny_tokenizer())
    assert [layer.retained for layer in report.layers] == [layer.retained for layer in same.report.layers]


def test_super_experts(tmp_path, capsys, sources):
    """`--protect-experts super` names what it found in the report, and `inspect` says that it will be looked for."""
    model = make_model("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data[5] *= 200
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    options = [*QUICK, "--protect-experts", "super", "--selection", "frequency", "--num-samples", "6"]
    main(["compress", str(tmp_path / "source"), str(tmp_path / "out"), *options, "--dataset", str(sources[0])])
    report = report_of(tmp_path / "out")
    assert report.config["protect_experts"] == "super"
    assert [layer.protected for layer in report.layers] == [[5], []] and 5 in report.layers[0].retained
    capsys.readouterr()
    main(["inspect", str(tmp_path / "source"), *options])
    assert "protected: super experts, found while compressing" in capsys.readouterr().out
    main(["inspect", str(tmp_path / "source"), *options, "--json"])
    assert json.loads(capsys.readouterr().out)["protected"] == "super"
    main(["inspect", str(tmp_path / "source"), *QUICK, "--protect-experts", '{"1": [3, 0]}'])
    assert "protected: layer 1: 0, 3" in capsys.readouterr().out


def test_super_in_a_config():
    """It is no path, stays through JSON and copies, and other texts still are paths."""
    config = DernConfig(protect_experts="super")
    assert config.protect_experts == "super"
    assert DernConfig(**json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="'supper' is not a dern_report.json"):
        DernConfig(protect_experts="supper")
    with pytest.raises(ValueError, match="be 'super', or be the path"):
        DernConfig(protect_experts=[0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--selection", "norm", "--dataset", "SOURCE"], "unknown selection criterion 'norm'"),
    ],
)
def test_refusals(tmp_path, capsys, checkpoint, sources, options, message):
    """One line, exit code 2, nothing written."""
    options = [str(sources[0]) if option == "SOURCE" else option for option in options]
    with pytest.raises(SystemExit) as exit_info:
        main(["compress", str(checkpoint), str(tmp_path / "out"), *QUICK, *options])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2 and message in line
    assert not (tmp_path / "out").exists()
