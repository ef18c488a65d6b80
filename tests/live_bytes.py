"""Measurement of the peak bytes of live CPU tensors, from the storages that torch operations allocate."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages while the context is open, without those that existed before."""

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
        """Count a storage if it is new and not that of an argument of the operation."""
        key = storage._cdata
        if key in self.known or key in given:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key, size):
        """Subtract a storage that has been freed."""
        self.known.discard(key)
        self.now -= size

    @staticmethod
    def key(tensor):
        """Return the identity of a tensor's storage."""
        return tensor.untyped_storage()._cdata
