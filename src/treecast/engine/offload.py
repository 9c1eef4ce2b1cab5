"""Layers whose weights lie elsewhere and take turns in two buffers (FlexGen, arXiv 2303.06865).

While a layer computes, a thread brings the next one's weights into the other buffer, so that a pass
pays for moving them once, however many rows it has: the rows of a tree come nearly for nothing
(SpecInfer, arXiv 2305.09781, section 6.4). What is moved is what is computed with (fused, packed
for the matrix library, quantised), so nothing is worked out anew for a pass, and no bit depends on
whether weights were moved.

The buffers are the tensors of the first two layers of a kind: those of the others are let go, and
they are pointed at these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from treecast.engine.layer_stores import LayerStore, layout_of
from treecast.errors import EngineLost, ModelError

NUM_BUFFERS = 2

OffloadMode = Literal["none", "cpu", "disk"]


@dataclass(frozen=True, slots=True)
class Offload:
    """Where weights lie that the device is not to hold.

    Attributes:
        mode: none: all on the device; cpu: pinned memory of the host; disk: a scratch file.
        device_bytes: what weights may take of the device, buffers included; None for no bound.
        folder: where the scratch file is made; None for the folder of model caches.
        most_bytes_per_s: of what is moved, to measure as if the disk were slower; None for no
            bound.
    """

    mode: OffloadMode = "none"
    device_bytes: int | None = None
    folder: Path | None = None
    most_bytes_per_s: float | None = None

    def check_adapters(self, names: Collection[str]) -> None:
        """Refuse adapters beside layers that are not there to hang them on.

        Raises:
            ModelError: there are both.
        """
        if names and self.mode != "none":
            raise ModelError(
                f"adapters {', '.join(names)} cannot be served with offload {self.mode}; they "
                "need a model whose layers stay on the device"
            )


RESIDENT = Offload()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer finds one of the tensors that it computes with."""

    names: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.names[self.name]
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Have the layer find this tensor from now on."""
        kept = isinstance(self.names[self.name], nn.Parameter)
        self.names[self.name] = nn.Parameter(tensor, requires_grad=False) if kept else tensor


def places_of(layer: object) -> list[Place]:
    """All tensors that a layer reaches by way of modules and objects of ours, in a fixed order."""
    return list(_places(layer, set()))


def _places(owner: object, seen: set[int]) -> Iterator[Place]:
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, MethodType):
        yield from _places(owner.__self__, seen)
    elif isinstance(owner, dict):
        for name, value in owner.items():
            if isinstance(value, Tensor):
                yield Place(owner, name)
            else:
                yield from _places(value, seen)
    elif isinstance(owner, nn.Module) or type(owner).__module__.startswith("treecast."):
        yield from _places(getattr(owner, "__dict__", None), seen)


Kind = tuple[tuple[object, ...], ...]
"""Layers of one kind have tensors of the same shapes, types and layouts."""


def _kind(tensors: Sequence[Tensor]) -> Kind:
    return tuple((t.shape, t.dtype, t.device, layout_of(t)) for t in tensors)


@dataclass(slots=True)
class _Buffer:
    """The tensors that some layers take turns in.

    Attributes:
        layers: in the order of their turns.
        holds: the layer whose weights are here, or on their way.
        coming: bringing them; None once that has been waited for.
    """

    tensors: Sequence[Tensor]
    holds: int
    layers: list[int] = field(default_factory=list)
    coming: Future[None] | None = None

    def next_after(self, layer: int) -> int:
        return self.layers[(self.layers.index(layer) + 1) % len(self.layers)]


class Fence(Protocol):
    """What keeps moving and computing apart where neither waits for the host."""

    def moving(self, buffer: int) -> AbstractContextManager[object]:
        """Around what moves weights into a buffer: not before its layer has computed."""

    def before_computing(self, buffer: int) -> None:
        """Not before the weights are there."""

    def computed(self, buffer: int) -> None:
        """What has been asked of the device so far is the last use of what the buffer holds."""


class HostFence:
    """On CPU a call returns when it is done, so there is nothing more to wait for."""

    def moving(self, buffer: int) -> AbstractContextManager[object]:
        return nullcontext()

    def before_computing(self, buffer: int) -> None: ...

    def computed(self, buffer: int) -> None: ...


class LayerStream:
    """Layers that take turns in buffers; made and used by one thread.

    Layers are computed in the order in which they were added, pass after pass. Any other order is
    right too, only slower: `enter` brings what is not there.
    """

    def __init__(self, store: LayerStore, fence: Fence) -> None:
        self._store = store
        self._fence = fence
        self._buffers: list[_Buffer] = []
        self._of_kind: dict[Kind, list[int]] = {}
        self._buffer_of: dict[int, int] = {}
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="offload")
        self._bytes_of: dict[int, int] = {}
        self.moved_bytes = 0

    @property
    def pass_bytes(self) -> int:
        """What is moved for one pass; layers that have a buffer of their own never are."""
        moving = (b.layers for b in self._buffers if len(b.layers) > 1)
        return sum(self._bytes_of[layer] for layers in moving for layer in layers)

    def add(self, layer: int, places: Sequence[Place]) -> None:
        """Put a layer's tensors away and have it find those of its buffer from now on."""
        tensors = _each_once(places)
        self._bytes_of[layer] = self._store.add(layer, tensors)
        of_kind = self._of_kind.setdefault(_kind(tensors), [])
        count = sum(len(self._buffers[buffer].layers) for buffer in of_kind)
        if count < NUM_BUFFERS:
            of_kind.append(len(self._buffers))
            self._buffers.append(_Buffer(tensors, layer))
        number = of_kind[count % NUM_BUFFERS]
        buffer = self._buffers[number]
        buffer.layers.append(layer)
        self._buffer_of[layer] = number
        mine = {id(t): stands for t, stands in zip(tensors, buffer.tensors, strict=True)}
        for place in places:
            place.put(mine[id(place.tensor)])

    def wrap(self, layer: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's computation, with its weights in place."""

        def computed(*args: Any, **kwargs: Any) -> Any:
            self.enter(layer)
            done = compute(*args, **kwargs)
            self.leave(layer)
            return done

        return computed

    def hook(self, layer: int, module: nn.Module) -> None:
        """The same for a module that others call."""
        module.register_forward_pre_hook(lambda *_: self.enter(layer))
        module.register_forward_hook(lambda *_: self.leave(layer))

    def enter(self, layer: int) -> None:
        """Wait until a layer's weights are in its buffer.

        Raises:
            EngineLost: they cannot be read any more.
        """
        number = self._buffer_of[layer]
        buffer = self._buffers[number]
        if buffer.holds != layer:
            self._bring(number, layer)
        if buffer.coming is not None:
            try:
                buffer.coming.result()
            except (OSError, EOFError) as error:
                raise EngineLost(f"the weights of layer {layer} cannot be read: {error}") from error
            buffer.coming = None
        self._fence.before_computing(number)

    def leave(self, layer: int) -> None:
        """A layer has computed: its buffer goes to the next one."""
        number = self._buffer_of[layer]
        buffer = self._buffers[number]
        self._fence.computed(number)
        following = buffer.next_after(layer)
        if following != layer:
            self._bring(number, following)

    def close(self) -> None:
        """End the thread and give back what is stored; the layers must not be used again."""
        self._mover.shutdown(cancel_futures=True)
        self._store.close()

    def _bring(self, number: int, layer: int) -> None:
        buffer = self._buffers[number]
        buffer.holds = layer
        buffer.coming = self._mover.submit(self._move, number, layer)

    def _move(self, number: int, layer: int) -> None:
        with self._fence.moving(number):
            self.moved_bytes += self._store.load(layer, self._buffers[number].tensors)


def _each_once(places: Sequence[Place]) -> list[Tensor]:
    return list({id(place.tensor): place.tensor for place in places}.values())


class StreamFence:
    """On a GPU: moves go by a stream of their own, and events keep them apart from computing.

    Unproved: it has not been run on a device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._moved: dict[int, Any] = {}
        self._computed: dict[int, Any] = {}

    def moving(self, buffer: int) -> AbstractContextManager[object]:
        return _Moving(self._copies, self._computed.get(buffer), self._event(self._moved, buffer))

    def before_computing(self, buffer: int) -> None:
        if (moved := self._moved.get(buffer)) is not None:
            torch.cuda.current_stream(self._device).wait_event(moved)

    def computed(self, buffer: int) -> None:
        self._event(self._computed, buffer).record(torch.cuda.current_stream(self._device))

    def _event(self, events: dict[int, Any], buffer: int) -> Any:
        return events.setdefault(buffer, torch.cuda.Event())  # type: ignore[no-untyped-call]


class _Moving:
    """Copies within go by one stream, after one event and before another."""

    def __init__(self, stream: Any, after: Any | None, before: Any) -> None:
        self._stream, self._after, self._before = stream, after, before
        self._current: Any = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self._current.__enter__()
        if self._after is not None:
            self._stream.wait_event(self._after)

    def __exit__(self, *failure: Any) -> None:
        self._before.record(self._stream)
        self._current.__exit__(*failure)
