"""The files that people look at: page, picture and card beside a checkpoint, from Python and from the command line."""

import dataclasses
import importlib.util
import json
import re

import pytest
from hub.card import card_problems
from sample_reports import sample_report

from optimum_dern.checkpoint.output.publishing import write_report
from optimum_dern.commands.main import main
from optimum_dern.reporting import plots
from optimum_dern.reporting.page import PAGE_NAME, report_page
from optimum_dern.reporting.plots import IMAGE_NAME
from optimum_dern.reporting.presentation import write_presentation


needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def names(folder):
    """All files, hidden ones included."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def count(path, colour):
    """How many pixels of a picture have a colour, nearly."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    return int((abs(imread(path)[..., :3] - to_rgb(colour)).max(axis=2) < 0.02).sum())


@needs_matplotlib
def test_files_of_an_evaluated_report(tmp_path):
    """Page, picture, and a card that shows the picture and that the Hub takes."""
    files = write_presentation(sample_report(), tmp_path)
    assert {file.relative_to(tmp_path).as_posix() for file in files} == {PAGE_NAME, IMAGE_NAME, "README.md"}
    assert names(tmp_path) == {PAGE_NAME, IMAGE_NAME, "README.md"}
    card = (tmp_path / "README.md").read_text("utf-8")
    text = re.search(r"!\[(.*)\]\(assets/dern_report\.png\)\n", card)[1]
    assert "books 2.500 to 2.600" in text and "4 of 8 experts stay in each of 4 layers" in text
    assert "| mean | 2.8000 | 2.9300 | +0.1300 |" in card
    assert card_problems(card) == []


@needs_matplotlib
def test_picture(tmp_path):
    """Points of what was written, a tile for every expert that stays; the same bytes once more."""
    report = sample_report()
    assert plots.write_image(report, tmp_path) == IMAGE_NAME
    first = (tmp_path / IMAGE_NAME).read_bytes()
    assert count(tmp_path / IMAGE_NAME, plots.LOST) > 8 * 50 and count(tmp_path / IMAGE_NAME, plots.RAMP[1]) > 4 * 500
    plots.write_image(report, tmp_path)
    assert (tmp_path / IMAGE_NAME).read_bytes() == first and len(first) < 200_000


@needs_matplotlib
def test_picture_without_losses(tmp_path):
    """What was not measured has no panel; nor have errors that are infinite."""
    report = sample_report(1, 2, evaluated=False)
    report.layers[0] = dataclasses.replace(report.layers[0], errors={"pruned": float("inf")}, winner="pruned")
    plots.write_image(report, tmp_path)
    assert count(tmp_path / IMAGE_NAME, plots.LOST) == 0
    assert count(tmp_path / IMAGE_NAME, plots.RAMP[1]) > 500


def test_without_matplotlib(tmp_path, monkeypatch):
    """No picture, none of an earlier checkpoint either, and a card that does not ask for one."""
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    (tmp_path / "assets").mkdir()
    (tmp_path / IMAGE_NAME).write_bytes(b"old")
    write_presentation(sample_report(), tmp_path)
    assert names(tmp_path) == {PAGE_NAME, "README.md"}
    assert "![" not in (tmp_path / "README.md").read_text("utf-8")


def test_without_an_evaluation(tmp_path):
    """Compression alone draws nothing: it has to be cheap; a picture of an earlier checkpoint goes."""
    (tmp_path / "assets").mkdir()
    (tmp_path / IMAGE_NAME).write_bytes(b"old")
    write_presentation(sample_report(evaluated=False), tmp_path)
    assert names(tmp_path) == {PAGE_NAME, "README.md"}


def test_a_card_may_stay(tmp_path):
    """Cards are edited by hand."""
    (tmp_path / "README.md").write_text("mine", "utf-8")
    write_presentation(sample_report(evaluated=False), tmp_path, keep_card=True)
    assert (tmp_path / "README.md").read_text("utf-8") == "mine"
    write_presentation(sample_report(evaluated=False), tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") != "mine"


def test_card_of_a_report():
    """The outcome in a sentence, limits, citation; nothing of the template is left."""
    from optimum_dern.reporting.card import model_card

    text = model_card(sample_report()).text
    assert "Each layer keeps half of its routed experts (4 of 8)" in text
    for heading in ("Evaluation", "Calibration", "Limits", "Reproduce", "Licence", "Citation"):
        assert text.count(f"\n## {heading}\n") == 1
    assert text.count("arXiv:2509.10377") == 1
    assert not re.search(r"\n\n\n|\{\{|\{%|None", text)


def test_command(tmp_path, capsys):
    """`report` writes beside the JSON, leaves a card alone unless told otherwise, and names what it wrote."""
    report = sample_report()
    report.save(tmp_path / "dern_report.json")
    (tmp_path / "README.md").write_text("mine", "utf-8")
    main(["report", str(tmp_path)])
    written = capsys.readouterr().out.splitlines()
    assert str(tmp_path / PAGE_NAME) in written and str(tmp_path / "README.md") not in written
    assert (tmp_path / PAGE_NAME).read_text("utf-8") == report_page(report)
    assert (tmp_path / "README.md").read_text("utf-8") == "mine"
    main(["report", str(tmp_path), "--card"])
    assert str(tmp_path / "README.md") in capsys.readouterr().out.splitlines()
    assert "# some-moe, 4 of 8 experts" in (tmp_path / "README.md").read_text("utf-8")


def test_command_to_another_file(tmp_path, capsys):
    """`--output` writes the page and nothing else."""
    (tmp_path / "a").mkdir()
    sample_report().save(tmp_path / "a" / "dern_report.json")
    main(["report", str(tmp_path / "a" / "dern_report.json"), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert names(tmp_path) == {"a/dern_report.json", "page.html"}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "there is no .*dern_report.json; give the folder of a checkpoint"),
        ("{", [], "is not a report that this release can read"),
        ("[]", [], "is not a report that this release can read"),
        (json.dumps({"report_version": 99}), [], "report version 99; this release reads 1 and 2"),
        (json.dumps({"report_version": 2}), [], "is not a report that this release can read"),
        ("", ["--output", "/nowhere/page.html"], "."),
        ("", ["--output", "page.html", "--card"], "give one of them"),
    ],
)
def test_command_refuses(tmp_path, capsys, content, arguments, message):
    """One line that says what is wrong; nothing is written."""
    if content == "":
        sample_report().save(tmp_path / "dern_report.json")
    elif content is not None:
        (tmp_path / "dern_report.json").write_text(content, "utf-8")
    before = names(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["report", str(tmp_path), *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2 and re.search(message, line), line
    assert names(tmp_path) == before


def test_report_and_page_go_together(tmp_path):
    """Whoever writes a report into a checkpoint writes its page."""
    report = sample_report(evaluated=False)
    write_report(tmp_path, report)
    assert names(tmp_path) == {"dern_report.json", PAGE_NAME, "README.md"}
    assert (tmp_path / PAGE_NAME).read_text("utf-8") == report_page(report)
