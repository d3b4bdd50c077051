"""Sees what a step sends."""

from torch.utils._python_dispatch import TorchDispatchMode


class MessageBytes(TorchDispatchMode):
    """Operators called within; of collectives, whichever way they were called, the bytes of each, and their groups."""

    def __init__(self):
        super().__init__()
        self.messages: list[int] = []
        self.groups: set[str] = set()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func.name())
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.messages.append(sum(t.nbytes for t in tensors))
            self.groups.add(args[-1])
        return func(*args, **(kwargs or {}))
