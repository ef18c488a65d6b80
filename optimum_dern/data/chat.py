"""What a row of a dataset says: text, token ids, or a chat, which the tokenizer's chat template writes out.

A row's text is in the column that the caller names, by default "text".  Rows without it may have

    messages                    a list of {"role", "content"}
    conversations               a list of {"from", "value"}, as in ShareGPT
    prompt, completion          two texts, or two lists of messages
    instruction, input, output  texts; the input may be empty or missing
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


__all__ = ["Chat", "as_chat", "holds_messages", "is_blank", "plain_chat", "render", "row_content"]

ROLES = {"human": "user", "gpt": "assistant"}  # names of ShareGPT; all others are the template's business
COLUMNS = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"})
FORMS = "messages, conversations, prompt and completion, or instruction and output"


@dataclass(frozen=True)
class Chat:
    """The messages of a chat, and the column that they came from."""

    messages: list[dict[str, Any]]
    column: str
    plain: str | None = None  # what a tokenizer without a chat template reads, where that is obvious


def row_content(row: Mapping[str, Any], column: str) -> Any:
    """Find the content of a row with columns.

    Args:
        row: without token ids.
        column: that holds the text; where it is "text" and missing or null, the forms above are looked for.

    Returns:
        A text, a `Chat`, what else is in the column, or None for a row whose columns are null or empty.

    Raises:
        ValueError: none of these columns is there, or a message is none.
    """
    if row.get(column) is not None:
        return as_chat(row[column], column) if holds_messages(row[column]) else row[column]
    if column == "text":
        for name in ("messages", "conversations"):
            if row.get(name) is not None:
                return as_chat(row[name], name)
        if row.get("prompt") is not None and row.get("completion") is not None:
            return _prompt_and_completion(row["prompt"], row["completion"])
        if row.get("instruction") is not None and row.get("output") is not None:
            return _instruction(row["instruction"], row.get("input"), row["output"])
        if any(form <= row.keys() for form in COLUMNS):
            return None
    if column in row:
        return None
    forms = f", or give {FORMS}" if column == "text" else ""
    raise ValueError(f"a row has no column {column!r}, only {sorted(map(str, row))}; name it with text_column{forms}")


def holds_messages(value: Any) -> bool:
    """Return whether a value is a list of messages, or a struct of such columns."""
    if isinstance(value, Mapping):
        return {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


def as_chat(value: Any, column: str) -> Chat | None:
    """Read a list of messages in either form; None if nothing is said in them."""
    if isinstance(value, Mapping):  # how `datasets` gives a `Sequence` of structs
        columns = list(value.values())
        if not all(isinstance(part, list | tuple) and len(part) == len(columns[0]) for part in columns):
            raise ValueError(f"column {column!r} holds {value!r:.80}; give a list of messages")
        value = [dict(zip(value, message, strict=True)) for message in zip(*value.values(), strict=True)]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"column {column!r} holds a {type(value).__name__}; give a list of messages")
    messages = [_message(message, column) for message in value]
    says_nothing = all(is_blank(message["content"]) and len(message) == 2 for message in messages)
    return None if says_nothing else Chat(messages, column)


def _message(message: Any, column: str) -> dict[str, Any]:
    found = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
    values = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
    if "from" in values and "role" not in values:
        values = {"role": values["from"], "content": values.get("value", "")}
    if not isinstance(values.get("role"), str):
        raise ValueError(
            f"a message of column {column!r} has {found}; give messages of role and content, or of from and value"
        )
    # Null keys are those of other rows, such as `tool_calls`; templates would take them for given.
    return {"content": ""} | values | {"role": ROLES.get(values["role"], values["role"])}


def _prompt_and_completion(prompt: Any, completion: Any) -> Chat | None:
    if isinstance(prompt, str) and isinstance(completion, str):
        return _turns(prompt, completion, "prompt", plain=prompt + completion)
    sides = {"prompt": (prompt, "user"), "completion": (completion, "assistant")}
    messages: list[dict] = []
    for column, (value, role) in sides.items():
        chat = as_chat([{"role": role, "content": value}] if isinstance(value, str) else value, column)
        messages += chat.messages if chat else []
    return Chat(messages, "prompt") if messages else None


def _instruction(instruction: Any, more: Any, output: Any) -> Chat | None:
    for name, value in (("instruction", instruction), ("input", more), ("output", output)):
        if not isinstance(value, str | None):
            raise ValueError(f"column {name!r} holds a {type(value).__name__}; give text")
    question = "\n\n".join(part for part in (instruction, more) if not is_blank(part))
    return _turns(question, output, "instruction", plain="\n\n".join(filter(None, (question, output))))


def _turns(question: str, answer: str, column: str, plain: str) -> Chat | None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return None if is_blank(plain) else Chat(messages, column, plain)


def is_blank(value: Any) -> bool:
    """Return whether a content is null, empty or white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def plain_chat(messages: Any) -> str:
    """Write a chat without a template: every message behind its role, with blank lines between."""
    chat = as_chat(messages, "messages")
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in chat.messages) if chat else ""


def render(chat: Chat, tokenizer: Any) -> str:
    """Write a chat as the text that the model reads, by the tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has no template, and the chat no plain text; or the template refuses the chat.
    """
    if not getattr(tokenizer, "chat_template", None):
        if chat.plain is not None:
            return chat.plain
        raise ValueError(
            f"column {chat.column!r} holds chats, but the tokenizer has no chat template; give a tokenizer that has "
            "one, such as that of the model's chat release, or rows of plain text, or name a column of text with "
            "text_column"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(chat.messages, tokenize=False)
    except (TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:  # contents of another type
        folded = _without_system(chat.messages)
        if folded is None:
            raise ValueError(
                f"the tokenizer's chat template refuses a chat of column {chat.column!r} with the roles "
                f"{', '.join(message['role'] for message in chat.messages)} ({error}); leave such rows out"
            ) from error
        return render(Chat(folded, chat.column), tokenizer)


def _without_system(messages: list[dict]) -> list[dict] | None:
    """Put a system message in front of the user's first one, for templates that have no such role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    system, user, *others = messages
    if not isinstance(system["content"], str) or not isinstance(user["content"], str):
        return None
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *others]
