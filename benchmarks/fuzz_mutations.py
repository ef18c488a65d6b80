"""Files broken at random: bytes flipped, cut, doubled and inserted, and JSON values replaced by hostile ones."""

import json
import random
from typing import Any


__all__ = ["mutated"]

PATHS = ["../../etc/passwd", "/etc/passwd", "C:\\x", "a/../..", "\0", "\ud800"]
NUMBERS = [0, -1, 1 << 63, 1 << 70, 1e308, -0.5]
VALUES = [*NUMBERS, True, None, "", "x", *PATHS, [], [[]], {}, {"a": {}}, ["x"] * 50, [1, 2, 3]]
INSERTED = (b"[" * 2000, b'{"a":' * 2000, b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"1" * 400, b"1" * 5000)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Change a file once or several times, in its bytes or, where it is JSON, in its values."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        content = changed_value(content, draw) if draw.random() < 0.5 else changed_bytes(content, draw)
    return content


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    at, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 8, 64))
    kind = draw.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at + length :]
    if kind == 2:
        return content[:at] + draw.randbytes(length) + content[at:]
    if kind == 3:
        return content[:at] + draw.randbytes(length) + content[at + length :]
    if kind == 4:
        return content[:at] + content[max(0, at - length) : at] * draw.choice((2, 9)) + content[at:]
    return content[:at] + draw.choice(INSERTED) + content[at:]


def changed_value(content: bytes, draw: random.Random) -> bytes:
    """Replace a value of the JSON in a file, or in the header of a safetensors file; nothing where there is none."""
    start, end = 0, len(content)
    if content[8:9] == b"{":
        start, end = 8, min(len(content), 8 + int.from_bytes(content[:8], "little"))
    try:
        tree = json.loads(content[start:end])
    except (ValueError, RecursionError):
        return content
    places = list(containers(tree))
    if not places:
        return content
    container, key = draw.choice(places)
    if isinstance(container, dict) and draw.random() < 0.2:
        container[str(draw.choice(VALUES))[:20]] = container.pop(key)
    elif draw.random() < 0.2:
        container.pop(key)
    else:
        container[key] = draw.choice(VALUES)
    text = json.dumps(tree).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[end:] if start else text


def containers(tree: Any) -> Any:
    """Yield every place of a value inside a JSON tree: the container, and the key or index."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from containers(tree[key])
