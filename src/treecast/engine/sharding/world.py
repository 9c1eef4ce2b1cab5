"""The processes of a group, as one of them sees them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treecast.engine.sharding.shape import Place
from treecast.errors import EngineLost

LOADING_S = 3600.0
"""How long the first rank that has loaded waits for the last."""


@dataclass(frozen=True, slots=True)
class World:
    """Every call blocks until the ranks concerned have made it too, and `timeout_s` at most.

    Attributes:
        everyone: all ranks, for what rank 0 says: gloo wherever the model is.
        shards: the ranks of our stage, which hold parts of the same layers.
        stages: all ranks, for what one stage sends another.
    """

    place: Place
    everyone: Any  # torch does not type its process groups
    shards: Any
    stages: Any

    @classmethod
    def join(cls, place: Place, rendezvous: str, device: str, timeout_s: float) -> World:
        """Meet the other ranks.

        Args:
            place: ours.
            rendezvous: where, as torch's `init_method`: `env://` or `file:///PATH`.
            device: the backend is nccl for cuda and gloo for cpu.
            timeout_s: for everything said or summed once the group has formed.

        Raises:
            EngineLost: the others do not come.
        """
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        patience, timeout = timedelta(seconds=LOADING_S), timedelta(seconds=timeout_s)
        size, tp = place.shape.size, place.shape.tp
        try:
            dist.init_process_group(
                f"cpu:gloo,cuda:{backend}" if backend == "nccl" else backend,
                init_method=rendezvous,
                rank=place.rank,
                world_size=size,
                timeout=patience,
            )
            everyone = dist.new_group(backend="gloo", timeout=timeout)
            shards = [
                dist.new_group(range(first, first + tp), timeout=timeout, backend=backend)
                for first in range(0, size, tp)
            ]
            stages = dist.new_group(timeout=timeout, backend=backend)
        except (RuntimeError, ValueError) as error:
            raise EngineLost(
                f"rank {place.rank} of {size} cannot join its group: {error}"
            ) from error
        return cls(place, everyone, shards[place.stage], stages)

    def wait_for_loading(self) -> None:
        """Wait until every rank has come here, however long loading takes."""
        dist.barrier()

    def meet(self) -> None:
        """See that all ranks are there."""
        dist.all_reduce(torch.zeros(1), group=self.everyone)

    def say(self, words: Tensor) -> None:
        """Rank 0's words become everybody's, in place."""
        dist.broadcast(words, 0, group=self.everyone)

    def sum(self, partial: Tensor) -> Tensor:
        """Sum over the shards, the same bits on each of them.

        Over gloo the parts are added rank by rank in float32, so that a number's bits depend on its
        parts alone. (gloo's own all-reduce begins each chunk of the buffer at another rank, and
        where chunks end depends on how many rows there are.)
        """
        if self.shards.name() != "gloo":
            dist.all_reduce(partial, group=self.shards)
            return partial
        first, *others = self.gather(partial)
        total = first.float()
        for other in others:
            total = total + other
        return total.to(partial.dtype)

    def gather(self, part: Tensor) -> list[Tensor]:
        """Everybody's part, by shard; all of one shape."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.place.shape.tp)]
        dist.all_gather(parts, part, group=self.shards)
        return parts

    def send_on(self, hidden: Tensor) -> None:
        """Activations to the rank of the next stage that has the same shard."""
        dist.send(hidden.contiguous(), self.place.rank + self.place.shape.tp, group=self.stages)

    def receive_on(self, hidden: Tensor) -> Tensor:
        """Activations of the stage before, into a tensor of their shape."""
        dist.recv(hidden, self.place.rank - self.place.shape.tp, group=self.stages)
        return hidden

    def send_home(self, logits: Tensor) -> None:
        """Logits to rank 0, from the first rank of the last stage."""
        if self.place.shard == 0:
            dist.send(logits.contiguous(), 0, group=self.stages)

    def receive_home(self, logits: Tensor) -> Tensor:
        """Logits of the last stage, into a tensor of their shape."""
        dist.recv(logits, self.place.shape.size - self.place.shape.tp, group=self.stages)
        return logits
