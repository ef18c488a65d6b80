"""Tensors that pass through a compression: written when a layer is read, the rest by name."""

import torch

from optimum_dern.checkpoint.output.tensors import copy_rest, copy_when_read_


class Reader:
    """A source of three tensors that counts how often each is read, and shows them to whoever watches."""

    def __init__(self):
        self.tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(("embedding", "norm", "head"))}
        self.after_read, self.reads, self.closed = None, [], False

    def read(self, name):
        """One tensor."""
        self.reads.append(name)
        if self.after_read is not None:
            self.after_read(name, self.tensors[name])
        return self.tensors[name]

    def close(self):
        """No more reading."""
        self.closed = True


class Output:
    """One result that takes some of the tensors."""

    def __init__(self, wanted):
        self.wanted, self.copies, self.saved = set(wanted), [], False

    def copy(self, name, tensor):
        """Take a tensor that is wanted."""
        if name in self.wanted:
            self.copies.append((name, tensor.tolist()))

    def missing(self):
        """What is wanted and not there."""
        return self.wanted - {name for name, _ in self.copies}

    def save(self):
        """All is there."""
        self.saved = not self.missing()


def test_every_tensor_is_copied_once():
    """One is read on the way, the others at the end, each for all outputs that want it; then nobody watches."""
    reader, outputs = Reader(), [Output(["embedding", "norm", "head"]), Output(["head", "embedding"])]
    copy_when_read_(reader, outputs)
    reader.read("embedding")
    assert [output.copies for output in outputs] == [[("embedding", [0.0, 0.0])]] * 2
    copy_rest(reader, outputs)
    assert outputs[0].copies == [("embedding", [0.0, 0.0]), ("head", [2.0, 2.0]), ("norm", [1.0, 1.0])]
    assert outputs[1].copies == [("embedding", [0.0, 0.0]), ("head", [2.0, 2.0])]
    assert reader.reads == ["embedding", "head", "norm"] and reader.closed and reader.after_read is None
    assert all(output.saved for output in outputs)


def test_the_rest_needs_nobody_to_watch():
    """What is left is copied by the one who asks for it."""
    reader, output = Reader(), Output(["norm"])
    copy_rest(reader, [output])
    assert output.copies == [("norm", [1.0, 1.0])]
