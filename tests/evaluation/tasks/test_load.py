"""Task files: what is scored, which rows are taken, what is refused."""

import json

import pytest
from task_rows import ROWS, write_tasks

from optimum_dern.evaluation.tasks.items import Request, kind_of_row
from optimum_dern.evaluation.tasks.load import SUITE, load_tasks, make_task


def requests_of(row, **options):
    """Contexts and continuations of one row."""
    (item,) = make_task("t", [row], **options).items
    return [(request.context, request.continuation) for request in item.requests]


def test_multiple_choice():
    """A space joins context and choice; the choices' texts normalise."""
    row = ROWS["arc_easy"][0]
    assert requests_of(row) == [(row["context"], " water"), (row["context"], " sand"), (row["context"], " air")]
    (item,) = make_task("t", [row]).items
    assert (item.label, item.lengths) == (0, ("water", "sand", "air"))


def test_letters_and_cloze():
    """Letters are scored where a row has them; cloze scores the choices after the question alone."""
    row = ROWS["mmlu"][0]
    assert requests_of(row) == [(row["context"], f" {letter}") for letter in "ABCD"]
    question = "Question: What has mass?\nAnswer:"
    assert requests_of(row, cloze=True) == [(question, f" {choice}") for choice in row["choices"]]
    letters, cloze = make_task("mmlu", [row]), make_task("mmlu", [row], cloze=True)
    assert (letters.name, cloze.name) == ("mmlu", "mmlu:cloze")
    assert letters.items[0].lengths == () and cloze.items[0].lengths == tuple(row["choices"])


def test_multiple_context():
    """One continuation after several contexts, a single space before it, or none where there was none."""
    row = ROWS["winogrande"][1]
    first = "The cup fell off the shelf as the cup"
    assert requests_of(row) == [(first, " was steep."), (first[:-3] + "shelf", " was steep.")]
    assert requests_of({"contexts": ["a", "b"], "continuation": "'s hat.", "label": 1})[1] == ("b", "'s hat.")


def test_minimal_pair_and_last_word():
    """Whole sentences without a context; one word after a passage."""
    assert requests_of(ROWS["blimp"][1]) == [("", " Who did he saw?"), ("", " Who did he see?")]
    assert requests_of(ROWS["lambada_openai"][0]) == [("She took the key and opened the", " door")]


def test_kinds():
    """Every made-up task is of the kind that its rows have."""
    kinds = {name: make_task(name, rows).kind for name, rows in ROWS.items()}
    assert kinds.pop("winogrande") == "multiple_context"
    assert kinds.pop("lambada_openai") == "last_word"
    assert kinds.pop("blimp") == "minimal_pair"
    assert set(kinds.values()) == {"multiple_choice"}


def test_chance():
    """The mean over items of one in so many choices; a word cannot be guessed."""
    assert make_task("t", ROWS["arc_easy"]).chance == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)
    assert make_task("t", ROWS["lambada_openai"]).chance == 0


def test_lines_end_with_newlines_only(tmp_path):
    """A line separator inside a JSON string, which JSON allows, is part of the string."""
    row = ROWS["riddles"][0] | {"context": "one\u2028two\u0085three"}
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n" + json.dumps(row, ensure_ascii=False), "utf-8")
    (task,) = load_tasks([path])
    assert len(task.items) == 2
    assert task.items[0].requests[0] == Request("one\u2028two\u0085three", " a comb")


def test_a_limit_is_spread_over_the_file():
    """Files may be sorted by subject, so the first rows are no sample; items keep their rows."""
    rows = [{"id": f"q{i}", "context": "c", "target": f"t{i}"} for i in range(10)]
    task = make_task("t", rows, limit=3)
    assert [item.id for item in task.items] == ["q0", "q3", "q6"]
    assert [row["target"] for row in task.rows] == ["t0", "t3", "t6"]
    assert len(make_task("t", rows, limit=99).items) == 10


def test_names(tmp_path):
    """Files, names in a folder, the paper's suite, all that can be scored, and cloze."""
    folder = write_tasks(tmp_path)
    for name in set(SUITE) - set(ROWS):
        (folder / f"{name}.jsonl").write_text(json.dumps(ROWS["arc_easy"][0]), "utf-8")
    (folder / "sums.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}', "utf-8")
    assert [task.name for task in load_tasks(["suite"], folder)] == list(SUITE)
    (folder / "late.jsonl").write_text("\n \n" + json.dumps(ROWS["riddles"][0]), "utf-8")  # not on its first line
    (folder / "nothing.jsonl").write_text("\n\n", "utf-8")
    assert {task.name for task in load_tasks(["all"], folder)} == {*SUITE, *ROWS, "late"}
    names = ["mmlu", "mmlu:cloze", folder / "riddles.jsonl"]
    tasks = load_tasks(names, folder, limit=2)
    assert [(task.name, len(task.items)) for task in tasks] == [("mmlu", 2), ("mmlu:cloze", 2), ("riddles", 2)]


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (["nothing"], FileNotFoundError, "no task 'nothing' in .*; it has blimp, riddles"),
        (["/nowhere/t.jsonl"], FileNotFoundError, "no task file '/nowhere/t.jsonl'"),
        (["riddles", "blimp", "riddles"], ValueError, "'riddles' is given twice"),
        (["riddles:cloze"], ValueError, "row 0 has no 'question'"),
    ],
)
def test_names_that_do_not_work(tmp_path, names, error, match):
    """Errors say what there is."""
    with pytest.raises(error, match=match):
        load_tasks(names, write_tasks(tmp_path, "riddles", "blimp"))


def test_a_name_without_a_folder():
    """A name needs the folder that it is looked up in."""
    with pytest.raises(FileNotFoundError, match="or the folder that holds it"):
        load_tasks(["piqa"])
    with pytest.raises(ValueError, match="name the folder"):
        load_tasks(["suite"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"label": 2}, "has the label 2; .* 0 to 1"),
        ({"label": "0"}, "has the label '0'"),
        ({"choices": ["one"]}, "at least two strings"),
        ({"choices": ["one", 2]}, "at least two strings"),
        ({"choices": ["one", " "]}, "empty choice"),
    ],
)
def test_rows_that_cannot_be_scored(change, match):
    """The task and the row are named."""
    with pytest.raises(ValueError, match=f"task 'riddles': row 2 .*{match}"):
        make_task("riddles", [*ROWS["riddles"][:2], ROWS["riddles"][2] | change])


def test_rows_of_another_kind():
    """A file holds one kind, and generated answers are of none."""
    with pytest.raises(ValueError, match="row 1 has no 'context', which multiple_choice rows have"):
        make_task("t", [ROWS["riddles"][0], ROWS["blimp"][0]])
    with pytest.raises(ValueError, match="of no kind that is scored"):
        kind_of_row({"question": "1 + 1?", "answer": "2"})


@pytest.mark.parametrize(
    ("text", "match"), [("{}\n{oops", "t.jsonl, line 2 is not JSON"), ("[1]", "line 1 holds a list")]
)
def test_lines_that_are_no_objects(tmp_path, text, match):
    """The line is named."""
    (tmp_path / "t.jsonl").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=match):
        load_tasks([tmp_path / "t.jsonl"])


def test_nothing_to_score():
    """No row, or none asked for."""
    with pytest.raises(ValueError, match="has no row"):
        make_task("t", [])
    with pytest.raises(ValueError, match="limit is 0"):
        make_task("t", ROWS["piqa"], limit=0)
