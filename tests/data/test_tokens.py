"""Every sequence begins with one BOS where the tokenizer puts one in front of text, and is as before where not."""

import pytest
import torch
from tiny import BOS, EOS, adding_tokenizer, sample_texts, tiny_tokenizer

from optimum_dern.data.batches import load_samples


TEXTS = sample_texts()
BOTH = {"two": ("<bos>", BOS), "one": ("<eos>", EOS)}  # BOS and EOS are two tokens, or one and the same


def ids_of(source, tokenizer, length=2048):
    """The ids of all samples."""
    samples = load_samples(source, tokenizer, 1000, length, 0)
    assert all(sample.mask.all() and len(sample.ids) <= length for sample in samples)
    return [sample.ids.tolist() for sample in samples]


@pytest.mark.parametrize("kind", BOTH)
def test_rows_and_chats(kind):
    """Also where a chat template has written it, here or before."""
    token, bos = BOTH[kind]
    tokenizer = adding_tokenizer(token)
    plain = tiny_tokenizer()("<user>a\n")["input_ids"]
    rows = ["<user>a\n", f"{token}<user>a\n", {"messages": [{"role": "user", "content": "a"}]}]
    assert ids_of(rows, tokenizer) == [[bos, *plain], [bos, *plain], [bos, *plain, EOS]]
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"  # without BOS
    assert ids_of(rows, tokenizer) == [[bos, *plain]] * 3
    assert ids_of(rows, tokenizer, 4) == [[bos, *plain[:3]]] * 3


@pytest.mark.parametrize("kind", BOTH)
def test_windows(tmp_path, kind):
    """One in front of every document and every window, whole windows, and no text lost."""
    token, bos = BOTH[kind]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(TEXTS), "utf-8")
    tokenizer, plain = adding_tokenizer(token), tiny_tokenizer()
    documents = [plain(text)["input_ids"] for text in TEXTS]
    (whole,) = ids_of(tmp_path / "text.txt", tokenizer, 10**4)
    if kind == "two":
        assert whole == [token for ids in documents for token in (BOS, *ids, EOS)]
    else:
        assert whole == [EOS] + [token for ids in documents for token in (*ids, EOS)]
    found = ids_of(tmp_path / "text.txt", tokenizer, 50)
    assert {len(window) for window in found} == {50}
    assert all(window[0] == bos != window[1] for window in found)
    said = [token for window in found for token in window if token < EOS]
    everything = [token for ids in documents for token in ids]
    assert said == everything[: len(said)] and len(everything) - len(said) < 50


def test_windows_of_written_documents(tmp_path):
    """Rendered chats in a .txt file have theirs already."""
    (tmp_path / "chats.txt").write_text("<bos>ab<eos>\n<|endoftext|>\n<bos>c<eos>", "utf-8")
    ab, c = (tiny_tokenizer()(text)["input_ids"] for text in ("ab", "c"))
    assert ids_of(tmp_path / "chats.txt", adding_tokenizer()) == [[BOS, *ab, EOS, BOS, *c, EOS]]


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_windows(tmp_path, length):
    """They have no room for much else."""
    (tmp_path / "text.txt").write_text("abc", "utf-8")
    assert {tuple(ids[:1]) for ids in ids_of(tmp_path / "text.txt", adding_tokenizer(), length)} == {(BOS,)}


@pytest.mark.parametrize("named", [False, True])
def test_tokenizers_that_add_none(tmp_path, named):
    """They read text as ever, whether or not they have such a token, even where the text begins with it."""
    tokenizer = tiny_tokenizer()
    if named:
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
    text = "<eos>ab"
    (tmp_path / "text.txt").write_text(f"{text}\n<|endoftext|>\n{TEXTS[0]}", "utf-8")
    first, second = (tokenizer(each)["input_ids"] for each in (text, TEXTS[0]))
    stream = [*first, EOS, *second, EOS]
    assert ids_of([text, TEXTS[0]], tokenizer) == [first, second]
    assert ids_of(tmp_path / "text.txt", tokenizer, 10) == [stream[i : i + 10] for i in range(0, len(stream) - 9, 10)]


def test_dtypes(tmp_path):
    """Windows are int64, like all samples."""
    (tmp_path / "text.txt").write_text("abc", "utf-8")
    (sample,) = load_samples(tmp_path / "text.txt", adding_tokenizer(), 9, 9, 0)
    assert sample.ids.dtype == sample.mask.dtype == torch.int64
