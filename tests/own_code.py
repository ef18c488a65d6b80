"""A tokenizer with custom code, for checkpoints that need `trust_remote_code`."""

import json

from tiny import tiny_tokenizer


MODULE = "tokenization_own"
CODE = '''"""Counts how often it has been imported."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

with Path(r"{log}").open("a") as file:
    file.write("ran\\n")


class OwnTokenizer(PreTrainedTokenizerFast):
    """Reads text backwards."""

    def _encode_plus(self, text, *args, **kwargs):
        turn = (lambda t: t[::-1]) if isinstance(text, str) else (lambda ts: [t[::-1] for t in ts])
        return super()._encode_plus(turn(text), *args, **kwargs)
'''


def save_own_tokenizer(folder, log):
    """Save a tokenizer whose class is defined in FOLDER; running its code adds a line to LOG."""
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, f"{MODULE}.OwnTokenizer"]}}
    path.write_text(json.dumps(config), "utf-8")
    (folder / f"{MODULE}.py").write_text(CODE.replace("{log}", str(log)), "utf-8")
    return folder
