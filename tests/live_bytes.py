"""Bytes of all tensors that are alive at the worst moment, counted from storages as operations make them."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts while its context is open; what was there before is not counted."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {self.key(value) for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)}
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self.count(value.untyped_storage(), given)
        return result

    def count(self, storage, given):
        """A storage that is seen for the first time, and is not one of the operation's arguments."""
        key = storage._cdata
        if key in self.known or key in given:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key, size):
        """The storage has gone."""
        self.known.discard(key)
        self.now -= size

    @staticmethod
    def key(tensor):
        """Of the storage of a tensor."""
        return tensor.untyped_storage()._cdata
