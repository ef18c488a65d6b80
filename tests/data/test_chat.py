"""Rows of chats, prompts and instructions are written by the chat template."""

import json

import pytest
from datasets import Dataset
from tiny import adding_tokenizer, tiny_tokenizer

from optimum_dern.data.batches import load_samples


PLAIN, CHAT = tiny_tokenizer(), adding_tokenizer()
CHAT.backend_tokenizer.post_processor = None  # BOS has tests of its own
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
TURNS = "<user>Hi\n<assistant>Ho\n"
SYSTEM = {"role": "system", "content": "Be"}
SHAREGPT = [{"from": "system", "value": "Be"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def texts_of(rows, tokenizer=CHAT, column="text"):
    """What the samples of rows say, between BOS and EOS."""
    samples = load_samples(rows, tokenizer, 128, 2048, 0, column)
    return [tokenizer.decode(sample.ids).removeprefix("<bos>").removesuffix("<eos>") for sample in samples]


FORMS = {
    "messages": ({"messages": MESSAGES}, TURNS),
    "system": ({"messages": [SYSTEM, *MESSAGES]}, f"<system>Be\n{TURNS}"),
    "null-keys": ({"messages": [message | {"tool_calls": None} for message in MESSAGES]}, TURNS),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}}, TURNS),
    "sharegpt": ({"conversations": SHAREGPT}, f"<system>Be\n{TURNS}"),
    "prompt": ({"prompt": "Hi", "completion": "Ho"}, TURNS),
    "prompt-messages": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, TURNS),
    "messages-and-prompt": ({"prompt": "Hi", "messages": MESSAGES}, TURNS),
    "instruction": ({"instruction": "Hi", "input": "you", "output": "Ho"}, "<user>Hi\n\nyou\n<assistant>Ho\n"),
    "no-input": ({"instruction": "Hi", "input": "", "output": "Ho"}, TURNS),
    "two-columns": ({"instruction": "Hi", "output": "Ho"}, TURNS),
    "list": (MESSAGES, TURNS),
    "text-wins": ({"text": "abc", "messages": MESSAGES}, "abc"),
    "null-text": ({"text": None, "messages": MESSAGES}, TURNS),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    """Every form is found by its columns; a text comes before them."""
    row, expected = FORMS[form]
    assert texts_of([row]) == [expected]


@pytest.mark.parametrize("kind", ["dataset", "jsonl", "parquet"])
def test_from_everywhere(tmp_path, kind):
    """Data in memory and files alike."""
    rows, data = [{"messages": MESSAGES}] * 3, tmp_path / f"rows.{kind}"
    if kind == "dataset":
        data = Dataset.from_list(rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(data)
    else:
        data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert texts_of(data) == [TURNS] * 3


def test_a_named_column_wins():
    """Over every form, and it may hold chats itself."""
    row = {"text": "abc", "messages": MESSAGES, "body": "xyz", "talk": SHAREGPT[1:]}
    assert texts_of([row], column="body") == ["xyz"]
    assert texts_of([row], column="talk") == [TURNS]
    with pytest.raises(ValueError, match="no column 'none', only .*; name it with text_column$"):
        texts_of([row], column="none")


def test_without_a_template():
    """Texts that follow one another are read so; chats are refused, with the column and the mend."""
    rows = [{"prompt": "Hi ", "completion": "Ho"}, {"instruction": "Hi", "input": "you", "output": "Ho"}]
    assert texts_of(rows, PLAIN) == ["Hi Ho", "Hi\n\nyou\n\nHo"]
    for row, column in (
        ({"messages": MESSAGES}, "messages"),
        ({"conversations": SHAREGPT}, "conversations"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt"),
    ):
        with pytest.raises(ValueError, match=f"column '{column}' holds chats, but .* no chat template; give a token"):
            texts_of([row], PLAIN)


def test_a_template_without_a_system_role():
    """Its message goes in front of the user's; what is refused even so is told in the template's words."""
    strict = adding_tokenizer()
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    )
    assert texts_of([{"messages": [SYSTEM, *MESSAGES]}], strict) == ["<user>Be\n\nHi\n<assistant>Ho\n"]
    with pytest.raises(ValueError, match=r"refuses a chat of column 'messages' with the roles user, system \(No sys"):
        texts_of([{"messages": [MESSAGES[0], SYSTEM]}], strict)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": [{"text": "Hi"}]}, r"message of column 'messages' has \['text'\]; give messages of role and"),
        ({"conversations": ["Hi"]}, "column 'conversations' has str"),
        ({"messages": "Hi"}, "column 'messages' holds a str; give a list of messages"),
        ({"body": "x"}, "or give messages, conversations, prompt and completion, or instruction and output"),
    ],
)
def test_no_chat(row, match):
    """What is found, what is allowed."""
    with pytest.raises(ValueError, match=match):
        texts_of([row])


def test_only_chats_that_are_drawn_are_written(monkeypatch):
    """A template is slow: a million rows must not all go through it."""
    written = []
    render = CHAT.apply_chat_template
    monkeypatch.setattr(
        CHAT, "apply_chat_template", lambda *args, **options: written.append(1) or render(*args, **options)
    )
    assert len(load_samples([{"messages": MESSAGES}] * 500, CHAT, 3, 64, 0)) == len(written) == 3
