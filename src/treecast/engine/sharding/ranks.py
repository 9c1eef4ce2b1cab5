"""What rank 0 of a group does, and what the others do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from treecast.engine.base import ModelInfo
from treecast.engine.executor import Executor, LocalExecutor, PackedPass
from treecast.engine.hf import HFEngine, pages_of
from treecast.engine.linears import replace_linears
from treecast.engine.loading import LoadOptions, describe, load_model, num_layers
from treecast.engine.runner import layer_shapes
from treecast.engine.sharding.layers import make_plain
from treecast.engine.sharding.line import Line
from treecast.engine.sharding.orders import Compute, Copy, Forget, Load, Meet, Move, Save, Stop
from treecast.engine.sharding.shape import Place, check_divides
from treecast.engine.sharding.stages import StageRunner, own_layers
from treecast.engine.sharding.world import World
from treecast.engine.steps import PassOutput
from treecast.errors import EngineLost
from treecast.model_folder import check_model_dir


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a group, and all that it must know to become one.

    Attributes:
        folder, pool_tokens: as for `HFEngine.load`; every rank has the same.
        rendezvous, timeout_s: as for `World.join`.
    """

    place: Place
    folder: Path
    options: LoadOptions
    pool_tokens: int
    rendezvous: str
    timeout_s: float


def lead(member: Member) -> HFEngine:
    """Rank 0: load our share and make an engine of all ranks. Blocks until each has loaded.

    Raises:
        ModelError: the model cannot be served, or not be divided like this.
        EngineLost: another rank did not get that far.
    """
    world, executor, info = _load_share(member)
    return HFEngine(Leader(executor, world), info, pages_of(member.pool_tokens))


def follow(member: Member) -> None:
    """Any other rank: load our share, then do what rank 0 says until it says stop. Blocks.

    Raises:
        ModelError: as `lead`.
        EngineLost: rank 0 or another is gone, or we are out of step.
    """
    world, executor, _ = _load_share(member)
    with _together(world):
        obey(executor, world)


def _load_share(member: Member) -> tuple[World, LocalExecutor, ModelInfo]:
    folder, options = member.folder, member.options
    check_model_dir(folder)
    check_divides(folder, options.group)
    world = World.join(member.place, member.rendezvous, options.device, member.timeout_s)
    model = load_model(folder, options)
    info = describe(folder, model, options)
    with _together(world):
        world.wait_for_loading()
        if options.group.tp > 1:
            make_plain(model, world)
        return world, _executor_of(model, member, world), info


def _executor_of(model: nn.Module, member: Member, world: World) -> LocalExecutor:
    options, pages = member.options, pages_of(member.pool_tokens)
    if options.group.pp == 1:
        return LocalExecutor.of(model, options, pages)
    runner = StageRunner(model, world)
    replace_linears(model, options.row_layers())
    layers = own_layers(num_layers(model), world)
    shapes = layer_shapes(runner, layers, torch.device(options.device))
    return LocalExecutor(runner, shapes, options, pages)


class Leader:
    """Rank 0's executor: what it does, it has all ranks do. See `engine.executor.Executor`.

    What moves in the pool does so here at once and is told with the next pass, the first to need
    it elsewhere.
    """

    def __init__(self, local: LocalExecutor, world: World) -> None:
        self._local = local
        self._world = world
        self._line = Line(world)
        self._moves: list[Move] = []
        self._lost = False

    @property
    def position_bytes(self) -> int:
        """Of all ranks: their shares are about as large as ours."""
        return self._local.position_bytes * self._world.place.shape.size

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._move(Copy(tuple(sources), tuple(targets)))

    def save(self, key: int, places: Sequence[int]) -> None:
        self._move(Save(key, tuple(places)))

    def load(self, key: int, places: Sequence[int]) -> None:
        self._move(Load(key, tuple(places)))

    def forget(self, key: int) -> None:
        self._move(Forget(key))

    def _move(self, move: Move) -> None:
        self._moves.append(move)
        make(move, self._local)

    @property
    def moved_bytes(self) -> int:
        """Of rank 0 alone."""
        return self._local.moved_bytes

    def run(self, packed: PackedPass) -> PassOutput:
        with self._all_ranks():
            self._line.send(Compute(tuple(self._moves), packed))
            self._moves.clear()
            output = self._local.run(packed)
            self._line.computed(output.logits)
            return output

    def check(self) -> None:
        with self._all_ranks():
            self._line.send(Meet())
            self._world.meet()

    def close(self) -> None:
        if not self._lost:
            with suppress(EngineLost), self._all_ranks():  # whoever is gone needs not be told
                self._line.send(Stop())

    @contextmanager
    def _all_ranks(self) -> Iterator[None]:
        try:
            with _together(self._world):
                yield
        except EngineLost:
            self._lost = True
            raise


def obey(executor: LocalExecutor, world: World) -> None:
    """Do what rank 0 says until it says stop."""
    line = Line(world)
    while True:
        match line.receive():
            case Stop():
                return
            case Meet():
                world.meet()
            case Compute(moves, packed):
                for move in moves:
                    make(move, executor)
                line.computed(executor.run(packed).logits)


def make(move: Move, executor: Executor) -> None:
    """Make a move in one rank's pool."""
    match move:
        case Copy(sources, targets):
            executor.copy(sources, targets)
        case Save(key, places):
            executor.save(key, places)
        case Load(key, places):
            executor.load(key, places)
        case Forget(key):
            executor.forget(key)


@contextmanager
def _together(world: World) -> Iterator[None]:
    """Whatever breaks on one rank breaks the group: the others wait for it in the middle of a pass.

    Raises:
        EngineLost: with what broke.
    """
    try:
        yield
    except RuntimeError as error:
        place = world.place
        raise EngineLost(
            f"the group of {place.shape.size} ranks has broken at rank {place.rank}: {error}"
        ) from error
