"""A GPU that is not there: of torch.cuda what steps and loaders use, on the CPU and at once, with the rules that its
documentation states and a CPU would let pass.

- a device without a number is no device to set (`torch.cuda.set_device` itself runs)
- every stream has memory of its own
- while a graph is captured the host may not wait for a number; what DDP keeps must be of the stream that captures; and
  in the mode "global" no other thread may allocate
- a capture does nothing; a replay does what was captured, operator by operator, on the memory that was captured

    with Card(monkeypatch) as card: ...  # what runs here, and in threads that enter `card.mode()`, has a GPU
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import machine
from loaders import device

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class Event:
    """Work is done when it is asked for: nothing to wait for, but counted."""

    num_waits = 0

    def __init__(self, **_: Any):
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        Event.num_waits += 1

    def query(self) -> bool:
        return True


class Stream:
    def __init__(self, device: Any = None, priority: int = 0):
        self.device, self.cuda_stream = device, id(self)

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        pass


class Card:
    """See above. `streams`: all that were made; `captures`: the arguments of each capture."""

    def __init__(self, monkeypatch: Any):
        self.streams: list[Stream] = []
        self.captures: list[dict[str, Any]] = []
        self.capturing: _Capture | None = None
        self._current = threading.local()
        self._default = Stream()
        self._device = threading.local()
        self._patch = monkeypatch

    def __enter__(self) -> Card:
        cuda, put = torch.cuda, self._patch.setattr
        put(torch._C, "_cuda_setDevice", lambda index: setattr(self._device, "index", index), raising=False)
        put(torch._C, "_cuda_getDevice", lambda: getattr(self._device, "index", 0), raising=False)
        put(cuda, "current_device", lambda: getattr(self._device, "index", 0))
        put(cuda, "is_available", lambda: True)
        put(cuda, "device_count", lambda: 1)
        put(cuda, "get_device_capability", lambda device=None: (9, 0))
        put(cuda, "Stream", self._stream)
        put(cuda, "Event", Event)
        put(cuda, "stream", self._on)
        put(cuda, "current_stream", lambda device=None: self.current)
        put(torch.Tensor, "record_stream", lambda tensor, stream: None)
        put(cuda, "synchronize", lambda device=None: None)
        put(cuda, "CUDAGraph", _Recorded)
        put(cuda, "graph", lambda graph, **how: _Capture(self, graph, **how))
        self._patch_ddp()
        self._mode = self.mode()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        for known in (machine.runs_triton, device.runs_triton, device.copy_stream):
            known.cache_clear()

    def mode(self) -> TorchFunctionMode:
        """The context in which a thread's tensors go to the card, that is to say nowhere."""
        return _ToTheCard(self)

    @property
    def current(self) -> Stream:
        return getattr(self._current, "stream", self._default)

    def _stream(self, device: Any = None, priority: int = 0) -> Stream:
        self.streams.append(Stream(device, priority))
        return self.streams[-1]

    @contextmanager
    def _on(self, stream: Stream | None) -> Iterator[None]:
        before = self.current
        self._current.stream = before if stream is None else stream
        try:
            yield
        finally:
            self._current.stream = before

    def _patch_ddp(self) -> None:
        make, forward = DistributedDataParallel.__init__, DistributedDataParallel.forward

        def made(ddp: Any, *args: Any, **kwargs: Any) -> None:
            make(ddp, *args, **kwargs)
            ddp.__dict__["made_on"] = self.current

        def called(ddp: Any, *args: Any, **kwargs: Any) -> Any:
            if self.capturing is not None and ddp.made_on is not self.capturing.stream:
                raise RuntimeError("CUDA error: operation would make the legacy stream depend on a capturing stream")
            return forward(ddp, *args, **kwargs)

        self._patch.setattr(DistributedDataParallel, "__init__", made)
        self._patch.setattr(DistributedDataParallel, "forward", called)

    def allocate(self) -> None:
        """Some thread asks the driver for memory."""
        capture = self.capturing
        if capture is not None and capture.mode == "global" and threading.get_ident() != capture.thread:
            capture.spoiled = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


class _ToTheCard(TorchFunctionMode):
    """Whatever would go to the GPU stays, and what only a GPU's tensors can do is left out."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            self.card.allocate()
            return args[0]
        if kwargs.pop("pin_memory", False) or func in (torch.empty, torch.zeros):
            self.card.allocate()
        moved_args, moved_kwargs = pytree.tree_map(_here, (args, kwargs))
        out = func(*moved_args, **moved_kwargs)
        # what goes to the card is a copy there
        return out.clone() if func is torch.Tensor.to and moved_args[1:] != args[1:] else out


def _here(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class _Recorded:
    """What a capture recorded."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(
        self, card: Card, graph: _Recorded, pool: Any = None, stream: Stream | None = None,
        capture_error_mode: str = "global",
    ):  # fmt: skip
        super().__init__()
        self.card, self.graph, self.mode = card, graph, capture_error_mode
        self.stream = stream or card._stream()
        self.spoiled = False
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what was there, by its address, and its values
        self.made: set[int] = set()
        card.captures.append({"stream": stream, "capture_error_mode": capture_error_mode})

    def __enter__(self) -> Any:
        self.thread = threading.get_ident()
        self._before = self.card._on(self.stream)
        self._before.__enter__()
        self.card.capturing = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.card.capturing = None
        self._before.__exit__(*error)
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.data.copy_(value)
        if self.spoiled and error[0] is None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name().partition(".")[0] in WAITS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and x.data_ptr() not in self.made and x.data_ptr() not in self.before:
                self.before[x.data_ptr()] = x, x.clone()
        out = func(*args, **kwargs)
        self.made |= {x.data_ptr() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)} - set(self.before)
        changes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        views = any(r.alias_info is not None for r in func._schema.returns) and not changes
        if not views:
            self.graph.calls.append((func, args, kwargs, out))
        return out
