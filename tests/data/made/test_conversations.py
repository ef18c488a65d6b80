"""The tokens that a chat template writes around the turns of a conversation."""

import pytest
from tiny import tiny_tokenizer

from optimum_dern.data.made.conversations import find_turns


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(template):
    """The byte-level tokenizer of the tests with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_turns():
    """Opening, answer and question put together around words are what the template renders."""
    tokenizer = with_template(TEMPLATE)
    turns = find_turns(tokenizer)
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Hi", "Ho", "Hu")]
    found = [*turns.opening, *words[0], *turns.answer, *words[1], *turns.question, *words[2]]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("Hi", "Ho", "Hu"), strict=True)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.startswith(tokenizer.decode(found))
    assert turns.ends == {tokenizer.eos_token_id}


def test_the_end_of_a_turn_is_its_special_token():
    """Where a special token follows the words, the model ends a turn by writing it."""
    tokenizer = with_template(TEMPLATE.replace("</{{ m.role }}>", "<|turn|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    turns = find_turns(tokenizer)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert turn == turns.answer[0] == turns.question[0]
    assert turns.ends == {turn, tokenizer.eos_token_id}


@pytest.mark.parametrize("template", [None, "{{ messages[0].content | upper }}"])
def test_no_template_that_can_be_used(template):
    """There is none, or it does not write the words as they are."""
    assert find_turns(with_template(template)) is None
    assert find_turns(None) is None
