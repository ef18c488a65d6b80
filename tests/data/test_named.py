"""`general`: a mix of domains from the Hub, and the sample in the package where there is no Hub."""

import datasets
import pytest
from datasets import IterableDataset
from tiny import adding_tokenizer, tiny_tokenizer

from optimum_dern.data.batches import load_samples
from optimum_dern.data.named import GENERAL, SAMPLE


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose datasets have rows of their own name."""
    requests = []

    def load_dataset(name, config, split, streaming):
        requests.append((name, config, split, streaming))

        def rows():
            for _ in range(900):
                yield {"text": f"{name} {config} ", "solution": "def f(): ", "messages": MESSAGES, "prompt": "Hi"}

        return IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests


@pytest.mark.parametrize("template", [True, False])
def test_domains(hub, template):
    """Every domain has its share; text is packed into whole windows, chats are a sequence each."""
    tokenizer = adding_tokenizer() if template else tiny_tokenizer()
    samples = load_samples("general", tokenizer, 100, 40, 0)
    counts = {part.name: sum(sample.source == part.name for sample in samples) for part in GENERAL}
    assert counts == {part.name: part.weight for part in GENERAL}
    texts = {part.name: [tokenizer.decode(s.ids) for s in samples if s.source == part.name] for part in GENERAL}
    assert {len(sample.ids) for sample in samples if sample.source != "chat"} == {40}
    chat = "<bos><user>Hi\n<assistant>Ho\n<eos>" if template else "user: Hi\n\nassistant: Ho"
    assert set(texts["chat"]) == {chat}
    assert "wikimedia/wikipedia 20231101.de" in texts["encyclopaedia_de"][0] and "def" in texts["code"][0]
    assert ("HuggingFaceH4/ultrachat_200k", None, "train_sft", True) in hub
    assert sum(part.weight for part in GENERAL) == 100


def test_in_a_mix(hub, tmp_path):
    """It is one source there."""
    (tmp_path / "notes.txt").write_text("text", "utf-8")
    mix = {"general": 3, str(tmp_path / "notes.txt"): 1}
    assert [sample.source for sample in load_samples(mix, tiny_tokenizer(), 4, 40, 0)].count("general") == 3


def test_without_the_hub(caplog):
    """The sample of the package, of which one warning tells."""
    samples = load_samples("general", tiny_tokenizer(), 12, 128, 0)
    files = sorted(file.name for file in SAMPLE.glob("*.txt"))
    assert [sample.source for sample in samples] == [file for file in files for _ in range(3)]
    (record,) = caplog.records
    assert "the package's small sample of English books, news, mathematics and code is used instead" in record.message
    assert load_samples("general", tiny_tokenizer(), 12, 128, 1)[0].ids.ne(samples[0].ids).any()


def test_the_sample():
    """Four domains, small, and with their licences."""
    sizes = [file.stat().st_size for file in SAMPLE.iterdir()]
    assert len(sizes) == 5 and sum(sizes) < 400_000
    readme = (SAMPLE / "README.md").read_text("utf-8")
    assert all(f"`{file.name}`" in readme for file in SAMPLE.glob("*.txt")) and "licence" in readme
