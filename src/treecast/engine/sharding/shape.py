"""How a group divides a model, and which part is whose. Imports nothing that loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treecast.errors import ModelError, SettingsError


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Attributes:
    tp: ranks that divide each layer's heads and features.
    pp: stages that divide the layers.
    """

    tp: int = 1
    pp: int = 1

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.tp * self.pp


_STAGE_PARTS = {"embed_tokens", "layers", "norm"}
"""The parts of a model, besides its head, that transformers knows how to take out of a stage."""

ALONE = GroupShape()
"""One process has the whole model."""


@dataclass(frozen=True, slots=True)
class Place:
    """One process's place in its group; ranks of a stage are next to one another.

    Attributes:
        local_rank: its number on this host.
        local_size: ranks of the group on this host; they share its cores.
    """

    rank: int
    shape: GroupShape
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], shape: GroupShape) -> Place | None:
        """What torchrun's variables say; None without them.

        Raises:
            SettingsError: a variable is no number, or the world has another size than the group.
        """
        if "RANK" not in environment:
            return None
        size = _number(environment, "WORLD_SIZE", shape.size)
        if size != shape.size:
            raise SettingsError(
                f"WORLD_SIZE is {size}; --tp {shape.tp} with --pp {shape.pp} takes {shape.size}"
            )
        return cls(
            _number(environment, "RANK", 0),
            shape,
            _number(environment, "LOCAL_RANK", 0),
            _number(environment, "LOCAL_WORLD_SIZE", 1),
        )

    @property
    def stage(self) -> int:
        return self.rank // self.shape.tp

    @property
    def shard(self) -> int:
        """Which of its stage's ranks it is."""
        return self.rank % self.shape.tp

    def threads(self, torch_threads: int) -> int:
        """Our part of the threads that the ranks of a host have together."""
        return max(1, torch_threads // self.local_size)


def _number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environment.get(name, str(otherwise))
    try:
        return int(text)
    except ValueError:
        raise SettingsError(f"{name} is {text!r}; it must be a number") from None


def check_divides(folder: Path, shape: GroupShape) -> None:
    """See that a group can divide a model, by its config alone.

    Raises:
        ModelError: the heads or layers do not come out even, or transformers has no plan for it.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder).get_text_config()
    if shape.tp > 1:
        _check_shards(config, shape.tp, folder.name)
    if shape.pp > 1:
        _check_stages(config, shape.pp, folder.name)


def _check_shards(config: Any, tp: int, name: str) -> None:
    if not config.base_model_tp_plan:
        raise ModelError(f"--tp {tp}: model type {config.model_type} has no plan to divide layers")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % tp:
        raise ModelError(f"--tp {tp} does not divide the {heads} KV heads of {name}")


def _check_stages(config: Any, pp: int, name: str) -> None:
    parts = set(config.base_model_pp_plan or ())
    if parts != _STAGE_PARTS:
        raise ModelError(
            f"--pp {pp}: model type {config.model_type} has parts {sorted(parts)}; stages are made "
            f"of models with {sorted(_STAGE_PARTS)}"
        )
    if config.num_hidden_layers < pp:
        raise ModelError(f"--pp {pp} is more than the {config.num_hidden_layers} layers of {name}")
