"""Fixture of a base and two models that were made from it."""

import pytest
from fine_tunes import changed, dense
from tiny import make_model, tiny_tokenizer


@pytest.fixture(scope="module", params=["mixtral", "dense"])
def folders(request, tmp_path_factory):
    """Folder with `base`, `one` and `two`; the dense model's head is tied."""
    root, make = tmp_path_factory.mktemp("merge"), dense if request.param == "dense" else lambda: make_model("mixtral")
    for name, model in (("base", make()), ("one", changed(make(), 1)), ("two", changed(make(), 2))):
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root
