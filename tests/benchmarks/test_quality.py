"""`benchmarks/quality.py` from a checkpoint to its result file, and what later runs may add to that."""

import json

import pytest
from tiny import make_model, sample_texts, tiny_tokenizer


OPTIONS = ["--num-samples", "8", "--sequence-length", "24", "--windows", "2", "--threads", "1", "--device", "cpu"]
METHODS = ["--methods", "prune, router", "dern", "--variants", "published", "guard"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and a text."""
    folder = tmp_path_factory.mktemp("quality")
    make_model("mixtral").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for split in ("train", "test"):
        file = folder / "text" / "words" / f"{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(sample_texts()), "utf-8")
    return folder


@pytest.fixture
def measure(script, folder, monkeypatch, capsys):
    """Runs the script; gives what the file has of the model, and what was printed."""
    quality = script("quality")

    def measure(*options, output="results.json"):
        text = str(folder / "text" / "words" / "train.txt")
        words = [folder / "model", "--calibration", text, "--evaluation", text, "--output", folder / output]
        monkeypatch.setattr("sys.argv", ["quality.py", *map(str, words), *OPTIONS, *METHODS, *options])
        quality.main()
        return json.loads((folder / output).read_text("utf-8"))["model"], capsys.readouterr().out

    return measure


def key(row):
    return row["seed"], row["method"], row["variant"], row["sparsity"]


def figures(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_runs_are_merged(measure, folder):
    """Other seeds are added, the same ones are measured again, and other settings are refused before any work."""
    first, printed = measure()
    assert [key(row) for row in first["rows"]] == [
        (0, method, variant, 0.5) for method in ("prune, router", "dern") for variant in ("published", "guard")
    ]
    assert all(row["loss"].keys() == {"train"} and len(row["winners"]) == 2 for row in first["rows"])
    assert "| dern + guard |" in printed and "50% of the experts dropped" in printed
    assert not {"device", "dtype"} & first["settings"].keys() and first["settings"]["evaluation"] == "train.txt"

    both, _ = measure("--first-seed", "1", "--refit-seeds", "2")
    assert both["rows"][:4] == first["rows"]
    assert [row["seed"] for row in both["rows"]] == [0] * 4 + [1] * 4
    assert both["settings"] == first["settings"] and both["loss"] == first["loss"]

    again, _ = measure("--refit-seeds", "0")
    assert sorted(map(key, again["rows"])) == sorted(map(key, both["rows"]))
    before = (folder / "results.json").read_bytes()
    for options, name in ((["--windows", "3"], "windows"), (["--dtype", "bfloat16"], "dtype")):
        with pytest.raises(SystemExit, match=f"figures of model with other {name}; give another --output"):
            measure(*options)
    assert (folder / "results.json").read_bytes() == before


def test_fewer_results_at_once(measure):
    """More passes give the same figures, those of the experts that `recommended` kept included."""
    options = [
        "--methods",
        "prune, router",
        "ream",
        "recommended",
        "--variants",
        "published",
        "--sparsity",
        "0.25",
        "0.5",
    ]
    together, _ = measure(*options, output="together.json")
    assert [row["method"] for row in together["rows"]][4:] == ["recommended"] * 2 + ["prune, same keep-set"] * 2
    one_by_one, _ = measure(*options, "--at-once", "1", output="one_by_one.json")
    assert list(map(figures, one_by_one["rows"])) == list(map(figures, together["rows"]))


def test_same_experts(measure, script, monkeypatch):
    """Those that are pruned "with the same keep-set" are those that `recommended` dropped."""
    quality, kept = script("quality"), {}
    original = quality.measure_configs

    def recording(*arguments):
        rows, retained = original(*arguments)
        kept.update(retained)
        return rows, retained

    monkeypatch.setattr(quality, "measure_configs", recording)
    measure("--methods", "recommended", "--sparsity", "0.25", "0.5", output="same.json")
    for sparsity, count in ((0.25, 6), (0.5, 4)):
        assert kept["recommended", "", sparsity] == kept["prune, same keep-set", "", sparsity]
        assert [len(experts) for experts in kept["recommended", "", sparsity].values()] == [count] * 2
    assert len(kept) == 4


def test_split_text_and_bfloat16(measure, folder):
    """A split folder gives calibration and evaluation text by domain; the file says what is unusual."""
    options = ["--data", str(folder), "--evaluation", str(folder), "--dtype", "bfloat16"]
    result, _ = measure(*options, output="split.json")
    assert result["rows"][0]["loss"].keys() == {"words"}
    expected = {"calibration": "DATA/text/*/train.txt", "evaluation": "DATA/text/*/test.txt", "dtype": "bfloat16"}
    assert {name: result["settings"][name] for name in expected} == expected


def test_methods_that_fit_some_models(measure):
    """Condensed layers are measured where as many experts stay as a token uses; MoNE where experts have biases."""
    result, _ = measure("--methods", "cd_moe", "mone", "uncurl", "--sparsity", "0.5", "0.75", output="some.json")
    assert {(row["method"], row["sparsity"]) for row in result["rows"]} == {
        ("uncurl", 0.5),
        ("uncurl", 0.75),
        ("cd_moe", 0.75),
    }
