"""What a layer makes of its scores, besides scaling them: windows, caps, biases and sinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from treecast.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRule:
    """From scaled products of a query and its keys to attention weights.

    Attributes:
        softcap: scores become softcap * tanh(score / softcap), before any bias.
        window: positions that a row sees, its own among them; None is all.
        bias: from positions [keys] to what is added to the scores of keys there, [query heads,
            keys] float32 (ALiBi: a constant less per row changes nothing, so the key's is enough).
        sinks: [query heads] float32: a score that takes part in the softmax and has no value.
    """

    softcap: float | None = None
    window: int | None = None
    bias: Callable[[Tensor], Tensor] | None = None
    sinks: Tensor | None = None


PLAIN = ScoreRule()


def check_on_device(rule: ScoreRule) -> None:
    """Refuse what Triton's kernels have no code for.

    Raises:
        ModelError: position biases or sinks.
    """
    for name, value in (("position biases", rule.bias), ("attention sinks", rule.sinks)):
        if value is not None:
            raise ModelError(f"attention with {name} is not served on a device; use --device cpu")


def cap(scores: Tensor, softcap: float) -> None:
    """Bound scores smoothly, in place."""
    scores.div_(softcap).tanh_().mul_(softcap)


def weights_of(
    scores: Tensor,  # [..., KV heads, group, rows, keys], written to
    visible: Tensor,  # broadcasts to `scores`; False hides a key
    positions: Tensor,  # [keys]
    rule: ScoreRule,
) -> Tensor:  # as `scores`
    """Attention weights by a rule, its window left to `visible`; free to add in any order."""
    if rule.softcap is not None:
        cap(scores, rule.softcap)
    if rule.bias is not None:
        scores += rule.bias(positions).view(scores.shape[-4], scores.shape[-3], 1, -1)
    scores.masked_fill_(~visible, -torch.inf)
    if rule.sinks is None:
        return scores.softmax(-1)
    sinks = rule.sinks.view(scores.shape[-4], scores.shape[-3], 1, 1).to(scores.dtype)
    joined = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), -1)
    return joined.softmax(-1)[..., :-1]
