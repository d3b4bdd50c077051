"""Fails where a step would wait for a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Fails at any operator that a GPU's host would have to wait for."""

    num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique"), name
        assert not (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])), "boolean mask"
        self.num_calls += 1
        return func(*args, **(kwargs or {}))
