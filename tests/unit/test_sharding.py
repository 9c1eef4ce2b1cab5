"""What the ranks of a group tell one another, and which part is whose."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
)

from treecast.engine.executor import PackedPass, PackedSegment
from treecast.engine.sharding.line import Line
from treecast.engine.sharding.orders import (
    Compute,
    Copy,
    Forget,
    Load,
    Meet,
    Order,
    Save,
    Stop,
    decode,
    encode,
)
from treecast.engine.sharding.shape import ALONE, GroupShape, Place, check_divides
from treecast.engine.sharding.stages import check_passes_on
from treecast.errors import EngineLost, ModelError, SettingsError
from treecast.services.verifier.loading import _member
from treecast.services.verifier.settings import VerifierSettings
from treecast.settings import as_environment

SEGMENTS = (
    PackedSegment(num_rows=3, length=70, parents=(-1, 0, 0), pages=(4, 9)),
    PackedSegment(num_rows=1, length=0, parents=(-1,), pages=(2,)),
)
PASS = PackedPass((7, 8, 9, 3), (70, 71, 71, 0), (0, 3), SEGMENTS)
MOVES = (Copy((5, 6), (1, 2)), Save(8, (4, 5)), Copy((3,), (4,)), Load(8, (1, 2)), Forget(9))
COMPUTE = Compute(MOVES, PASS)


@pytest.mark.parametrize("order", [COMPUTE, Compute((), PASS), Meet(), Stop()])
def test_an_order_is_understood_when_it_was_encoded(order: Order) -> None:
    assert decode(encode(order)) == order


class Wire:
    """A world of rank 0 and one other in this process: what one says, the other hears."""

    def __init__(self) -> None:
        self._said: deque[torch.Tensor] = deque()
        self.meddle: Callable[[torch.Tensor], None] = lambda words: None

    def world(self, rank: int) -> Any:
        wire = self

        class End:
            place = Place(rank, GroupShape(tp=2))

            def say(self, words: torch.Tensor) -> None:
                if rank == 0:
                    wire._said.append(words.clone())
                else:
                    words.copy_(wire._said.popleft())
                    wire.meddle(words)

        return End()


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def ends(wire: Wire) -> tuple[Line, Line]:
    return Line(wire.world(0)), Line(wire.world(1))


def test_orders_arrive_in_order_when_some_are_longer_than_a_block(ends: tuple[Line, Line]) -> None:
    first, second = ends
    places = tuple(range(1000))
    orders = [Meet(), Compute((Copy(places, places),), PASS), COMPUTE, Stop()]
    for order in orders:
        first.send(order)
    assert [second.receive() for _ in orders] == orders


def test_a_rank_ends_when_it_missed_an_order(ends: tuple[Line, Line], wire: Wire) -> None:
    first, second = ends
    first.send(Meet())
    wire._said.clear()
    first.send(Meet())
    with pytest.raises(EngineLost, match=r"rank 1 is out of step: order is 0 here, 1 at rank 0"):
        second.receive()


def test_a_rank_ends_when_an_order_came_changed(ends: tuple[Line, Line], wire: Wire) -> None:
    def meddle(words: torch.Tensor) -> None:
        words[10] += 1

    first, second = ends
    wire.meddle = meddle
    first.send(COMPUTE)
    with pytest.raises(EngineLost, match="out of step: checksum of all orders"):
        second.receive()


def test_a_rank_ends_when_it_computed_something_else(ends: tuple[Line, Line]) -> None:
    first, second = ends
    logits = torch.randn(3, 50)
    for line in ends:
        line.computed(logits)
    first.send(Meet())
    second.receive()
    second.computed(logits + 1e-6)
    first.send(Meet())
    with pytest.raises(EngineLost, match="out of step: checksum of the last logits"):
        second.receive()


def test_a_place_is_read_from_the_variables_of_torchrun() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    place = Place.from_environment(variables, GroupShape(tp=2, pp=4))
    assert place == Place(5, GroupShape(2, 4), local_rank=1, local_size=4)
    assert (place.stage, place.shard) == (2, 1)
    assert [place.threads(count) for count in (1, 4, 16)] == [1, 1, 4]


def test_there_is_no_place_without_the_variables() -> None:
    assert Place.from_environment({"WORLD_SIZE": "2"}, ALONE) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "3"}, "WORLD_SIZE is 3; --tp 2 with --pp 1 takes 2"),
        ({"RANK": "first"}, "RANK is 'first'; it must be a number"),
    ],
)
def test_a_place_is_refused_when_the_variables_do_not_fit(
    variables: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        Place.from_environment(variables, GroupShape(tp=2))


def test_a_child_reads_the_same_settings_from_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--speculators=a:1,b:2", "--tp=2", "--announce", "--no-log-json", "--session-ttl-s=.5"]
    settings = VerifierSettings.load(flags, "test")
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert VerifierSettings.load([], "test").model_dump() == settings.model_dump()


def test_a_gpu_by_number_is_refused_when_ranks_take_their_own() -> None:
    settings = VerifierSettings(tp=2, device="cuda:1", pool_tokens=256)
    message = r"^--device cuda:1 is not for a group \(--tp 2, --pp 1\)"
    with pytest.raises(SettingsError, match=message):
        _member(settings, Path("model"), Place(0, settings.group))


def test_the_fingerprint_is_another_when_the_model_is_divided() -> None:
    from treecast.engine.loading import LoadOptions, fingerprint

    options = LoadOptions("float32", "exact", "cpu", None)
    shapes = [ALONE, GroupShape(tp=2), GroupShape(pp=2), GroupShape(2, 2)]
    assert len({fingerprint("r", replace(options, group=shape)) for shape in shapes}) == 4


TINY: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def test_a_model_is_refused_as_stages_when_it_scales_its_embeddings() -> None:
    hidden = torch.randn(1, 2, 32)
    check_passes_on(LlamaForCausalLM(LlamaConfig(**TINY)), hidden)
    scaling = GraniteForCausalLM(GraniteConfig(embedding_multiplier=2.0, **TINY))
    with pytest.raises(ModelError, match="GraniteForCausalLM changes embeddings before its first"):
        check_passes_on(scaling, hidden)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (LlamaConfig(num_key_value_heads=4, **TINY), GroupShape(tp=3), "--tp 3 .* 4 KV heads of m"),
        (GPTNeoXConfig(**TINY), GroupShape(tp=8), "--tp 8 does not divide the 4 KV heads of m"),
        (GPT2Config(), GroupShape(tp=2), "--tp 2: model type gpt2 has no plan to divide layers"),
        (
            GPTNeoXConfig(**TINY),
            GroupShape(pp=2),
            "--pp 2: model type gpt_neox has parts .*embed_in",
        ),
        (LlamaConfig(**TINY), GroupShape(pp=3), "--pp 3 is more than the 2 layers of m"),
    ],
)
def test_a_group_is_refused_by_name_when_it_cannot_divide_the_model(
    tmp_path: Path, config: PreTrainedConfig, shape: GroupShape, message: str
) -> None:
    config.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=message):
        check_divides(tmp_path / "m", shape)


def test_a_group_is_not_refused_when_it_divides_the_model(tmp_path: Path) -> None:
    LlamaConfig(num_key_value_heads=4, **TINY).save_pretrained(tmp_path / "m")
    for shape in (ALONE, GroupShape(2, 2), GroupShape(4, 1)):
        check_divides(tmp_path / "m", shape)
