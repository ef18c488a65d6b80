"""The fixed tokens around the turns of a conversation, as a tokenizer's chat template writes them."""

from typing import Any, NamedTuple


__all__ = ["Turns", "find_turns"]

MARKS = ("zqfirst", "zqsecond", "zqthird")  # contents that no template writes itself


class Turns(NamedTuple):
    """Token ids that a chat template writes around the words of the user and of the model."""

    opening: list[int]  # before the first words of the user
    answer: list[int]  # between the user's words and the model's
    question: list[int]  # between the model's words and the user's next ones
    ends: set[int]  # tokens that end a turn


def find_turns(tokenizer: Any) -> Turns | None:
    """Find the tokens around turns by rendering a conversation of two questions and one answer.

    Args:
        tokenizer: of the model, or None.

    Returns:
        None where the tokenizer has no chat template, or one that does not write the three contents as they are.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
    rest, parts = tokenizer.apply_chat_template(messages, tokenize=False), []
    for mark in MARKS:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        parts.append(before)
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    # A prompt for an answer may end with more than a finished one keeps, such as the begin of a thought.
    answer = max(asked.partition(MARKS[0])[2], parts[1], key=len)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    opening, answered, question = map(ids, (parts[0], answer, parts[2]))
    special = set(tokenizer.all_special_ids)
    ends = {part[0] for part in (answered, question) if part and part[0] in special}
    ends |= set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    return Turns(opening, answered, question, ends) if opening else None
