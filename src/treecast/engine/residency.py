"""Which layers' weights stay on the device, and how the others come and go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import structlog
import torch
from torch import nn

from treecast.checkpoints import default_cache_dir
from treecast.engine.layer_stores import DiskStore, LayerStore, PinnedStore
from treecast.engine.linears import RowLayers, replace_linears
from treecast.engine.llama import Compute, keep_alone
from treecast.engine.loading import LoadOptions
from treecast.engine.memory import LayerPlan, plan_layers
from treecast.engine.offload import HostFence, LayerStream, StreamFence, places_of
from treecast.engine.unread import LayerSource, decoder_layers

_log = structlog.get_logger()


class Residency(Protocol):
    """Where a runner's layers have their weights."""

    @property
    def drops(self) -> bool:
        """Whether `keep` takes a layer's own weights from it."""

    @property
    def moves(self) -> bool:
        """Whether any are moved for a pass."""

    @property
    def moved_bytes(self) -> int:
        """What has been moved so far."""

    def keep(self, index: int, layer: nn.Module, build: Callable[[Any], Compute]) -> Compute:
        """What computes a layer: `build` of the layer with its weights."""

    def keep_modules(self, model: nn.Module, layers: RowLayers) -> None:
        """Have the model's own modules compute, their linears replaced."""

    def done(self) -> None:
        """The runner is chosen: nobody asks for a layer's own weights any more."""

    def close(self) -> None:
        """The layers must not be used again."""


class AllResident:
    """All weights are where they are computed with."""

    drops = True
    moves = False
    moved_bytes = 0
    keep = staticmethod(keep_alone)

    def keep_modules(self, model: nn.Module, layers: RowLayers) -> None:
        replace_linears(model, layers)

    def done(self) -> None: ...

    def close(self) -> None: ...


ALL_RESIDENT = AllResident()


class Offloaded:
    """Layers that the plan does not keep on the device are streamed."""

    drops = False

    def __init__(self, model: nn.Module, source: LayerSource, options: LoadOptions) -> None:
        """Plan; `source` is closed with the choice of a runner (`done`).

        Raises:
            ModelError: the device's share is too small.
        """
        self._source = source
        self._options = options
        self._plan: LayerPlan = plan_layers(model, options)
        self._stream = self._new_stream()

    @classmethod
    def of(cls, model: nn.Module, path: Path, options: LoadOptions) -> Offloaded:
        """Of a model that was read from a folder, its layers or not."""
        return cls(model, LayerSource(model, path), options)

    @property
    def moves(self) -> bool:
        return bool(self._plan.streamed)

    @property
    def moved_bytes(self) -> int:
        return self._stream.moved_bytes

    def keep(self, index: int, layer: nn.Module, build: Callable[[Any], Compute]) -> Compute:
        filled = copy.deepcopy(layer)  # of no weights: the original computes what this is held to
        self._source.fill(index, filled)
        compute = build(filled)
        if index not in self._plan.streamed:
            return compute
        self._stream.add(index, places_of(compute))
        return self._stream.wrap(index, compute)

    def keep_modules(self, model: nn.Module, layers: RowLayers) -> None:
        self._stream.close()
        self._stream = self._new_stream()
        for index, layer in enumerate(decoder_layers(model)):
            self._source.fill(index, layer)
            replace_linears(layer, layers)
            if index in self._plan.streamed:
                self._stream.add(index, places_of(layer))
                self._stream.hook(index, layer)
        self._source.close()
        replace_linears(model, layers)

    def done(self) -> None:
        self._source.close()
        _log.info(
            "offload.ready",
            mode=self._options.offload.mode,
            resident_layers=self._plan.num_layers - len(self._plan.streamed),
            streamed_layers=len(self._plan.streamed),
            pass_bytes=self._stream.pass_bytes,
        )

    def close(self) -> None:
        self._stream.close()

    def _new_stream(self) -> LayerStream:
        device = torch.device(self._options.device)
        fence = HostFence() if device.type == "cpu" else StreamFence(device)
        return LayerStream(self._store(), fence)

    def _store(self) -> LayerStore:
        offload = self._options.offload
        if offload.mode == "cpu":
            return PinnedStore()
        return DiskStore(offload.folder or default_cache_dir(), offload.most_bytes_per_s)
