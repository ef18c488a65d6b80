"""Calibration data for a model: what it gives less of than was asked for is told."""

import json

import pytest
from tiny import make_model, random_tokens, tiny_tokenizer

from optimum_dern import DernConfig
from optimum_dern.engine.run.model_batches import load_model_batches


def warnings_of(caplog, dataset, num_samples):
    """The messages of a call."""
    caplog.clear()
    config = DernConfig(dataset=dataset, num_samples=num_samples, sequence_length=16)
    load_model_batches(config, make_model("mixtral"), tiny_tokenizer())
    return [record.getMessage() for record in caplog.records]


def test_fewer_sequences_than_asked_for(caplog):
    """One warning with the numbers; none where there are enough."""
    rows = random_tokens(6)
    assert len(warnings_of(caplog, rows, 6)) == 1
    message, elsewhere = warnings_of(caplog, rows, 7)
    assert "how the result does on other text is not known" in elsewhere
    assert message.endswith("dicts in memory (list)) gives 6 sequences of up to 16 tokens, fewer than num_samples=7")


@pytest.mark.parametrize("mixed", [False, True])
def test_what_a_folder_has_besides(caplog, tmp_path, mixed):
    """Files of other types and folders, which are not read, are named."""
    (tmp_path / "a.json").write_text(json.dumps([[1, 2]] * 3), "utf-8")
    (tmp_path / "b.md").write_text("text", "utf-8")
    (tmp_path / "more").mkdir()
    message = warnings_of(caplog, {str(tmp_path): 1} if mixed else tmp_path, 5)[0]
    assert f"gives 3 sequences of up to 16 tokens, fewer than num_samples=5; not read: {tmp_path}/b.md" in message
    assert message.endswith(f", {tmp_path}/more/")


def test_a_short_source_of_several(caplog, tmp_path):
    """Its name and number, where the others make up for it."""
    for name, rows in (("a", 2), ("b", 9)):
        (tmp_path / f"{name}.json").write_text(json.dumps([[1, 2]] * rows), "utf-8")
    (message,) = warnings_of(caplog, tmp_path, 8)
    assert message.endswith(f"share: {tmp_path}/a.json has 2; the other sources give the rest")
