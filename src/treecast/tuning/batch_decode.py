"""Decode many texts at once with a target, and note its likeliest next tokens on the way.

The target is one of the engine's models (our attention, packed linears), but its keys and values
lie in one dense block per layer. All texts have like lengths here, so pages would save little.
On one core a batch of 64 took 133 ms a step, its prompts and notes included; transformers' cache
and attention took 260 for the step alone, three quarters of it in attention and copying.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treecast.kernels.scores import PLAIN, ScoreRule, weights_of
from treecast.tuning.corpus import TopTokens

_CHUNK_ROWS = 256

Choose = Callable[[Tensor], Tensor]  # logits [num_texts, vocab] to token ids [num_texts]


@dataclass(frozen=True)
class Decoded:
    """New tokens of each text, with the stop that ended it if one did.

    `top` has a row for each noted prompt token, then one for each new token; None where nothing
    was asked to be noted.
    """

    tokens: tuple[tuple[int, ...], ...]
    top: tuple[TopTokens | None, ...]


class DenseKV:
    """Keys and values of a batch of texts, padded on the left; `engine.bridge.TreePass`."""

    def __init__(self, valid: Tensor, capacity: int) -> None:
        """`valid` [num_texts, width] is False on padding."""
        self.length = 0
        self._capacity = capacity
        self._valid = F.pad(valid, (0, capacity - valid.shape[1]), value=True)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rule: ScoreRule = PLAIN,
    ) -> Tensor:
        """Take in the new keys and values, [num_texts, heads, new, dim]; see `bridge.TreePass`."""
        keys = self._append(self._keys, layer, key)
        values = self._append(self._values, layer, value)
        mask = self._mask(key.shape[2], keys.shape[2])
        if rule is not PLAIN:
            return self._ruled(query, keys, values, mask, scaling, rule)
        if key.shape[2] > 1:
            out = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2)
        # One row of scaled_dot_product_attention took five times as long as two products.
        num_texts, heads, _, dim = query.shape
        grouped = query.reshape(num_texts, keys.shape[1], heads // keys.shape[1], dim)
        scores = (grouped @ keys.transpose(2, 3)) * scaling
        probs = scores.masked_fill_(~mask, -torch.inf).softmax(dim=-1)
        joined: Tensor = (probs @ values).reshape(num_texts, 1, heads, -1)
        return joined

    def _ruled(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
        scaling: float,
        rule: ScoreRule,
    ) -> Tensor:
        """Attention by a rule that the library's lacks; padding is on the left, so places tell."""
        num_texts, _, num_new, dim = query.shape
        grouped = query.reshape(num_texts, keys.shape[1], -1, num_new, dim)
        scores = (grouped @ keys[:, :, None].transpose(3, 4)).float() * scaling
        end = keys.shape[2]
        offsets = torch.arange(end) - torch.arange(end - num_new, end)[:, None]
        if rule.window is not None:
            mask = mask & (offsets > -rule.window)
        weights = weights_of(scores, mask[:, :, None], torch.arange(end), rule).to(values.dtype)
        return (weights @ values[:, :, None]).flatten(1, 2).transpose(1, 2)

    def keep(self, texts: Tensor) -> None:
        """Drop all but these texts."""
        self._valid = self._valid[texts]
        for block in (self._keys, self._values):
            for layer, tensor in block.items():
                block[layer] = tensor[texts]

    def _append(self, block: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        if layer not in block:
            num_texts, heads, _, dim = new.shape
            block[layer] = new.new_zeros((num_texts, heads, self._capacity, dim))
        end = self.length + new.shape[2]
        block[layer][:, :, self.length : end] = new
        return block[layer][:, :, :end]

    def _mask(self, num_new: int, end: int) -> Tensor:
        """[num_texts, 1, num_new, end], True where a new row may look."""
        row = torch.arange(self.length, end).unsqueeze(1)
        place = torch.arange(end).unsqueeze(0)
        seen = self._valid[:, None, None, :end] & (place <= row)
        # Padding looks at itself: a row that sees nothing would be NaN, and spread.
        return seen | (place == row) if num_new > 1 else seen


@torch.inference_mode()
def decode_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    max_new_tokens: int,
    stops: frozenset[int],
    top_k: int = 0,
    first: int = 1,
) -> Decoded:
    """Decode a batch to its stops or to `max_new_tokens`. Blocks.

    Args:
        model: as `engine.loading.load_model` makes it.
        top_k: how many of the target's likeliest tokens to note for each token; 0 notes none.
        first: the first prompt token to note for.
    """
    batch = _Batch(model, prompts, max_new_tokens, top_k, first)
    for step in range(max_new_tokens):
        chosen = batch.take(choose)
        going = torch.tensor([int(token) not in stops for token in chosen])
        if not going.any() or step == max_new_tokens - 1:
            break
        batch.advance(chosen, going)
    return batch.decoded()


class _Batch:
    """Texts being decoded; those that have stopped leave the computation."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        top_k: int,
        first: int,
    ) -> None:
        """Compute the prompts, padded on the left to one width."""
        self._model, self._top_k = model, top_k
        self._head = model.get_output_embeddings()
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._alive = torch.arange(len(prompts))
        width = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        valid = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            valid[row, width - len(prompt) :] = True
        self._cache = DenseKV(valid, width + max_new_tokens)
        positions = (valid.cumsum(dim=1) - 1).clamp_min(0)
        hidden = self._compute(input_ids, positions)
        self._position, self._last = positions[:, -1:], hidden[:, -1]
        self._noted = [
            [_note(self._head, hidden[row, width - len(prompt) + first - 1 : -1], top_k)]
            for row, prompt in enumerate(prompts)
        ]

    def take(self, choose: Choose) -> Tensor:
        """Choose and note the next token of each text that goes on; [num_alive] token ids."""
        logits = self._head(self._last)
        chosen = choose(logits)
        for text, token in zip(self._alive.tolist(), chosen.tolist(), strict=True):
            self._tokens[text].append(token)
        if self._top_k:
            ids, probs = top_probs(logits, self._top_k)
            for row, text in enumerate(self._alive.tolist()):
                self._noted[text].append((ids[row : row + 1], probs[row : row + 1]))
        return chosen

    def advance(self, chosen: Tensor, going: Tensor) -> None:
        """Compute the chosen tokens of the texts that go on."""
        if not going.all():
            self._alive, chosen = self._alive[going], chosen[going]
            self._position = self._position[going]
            self._cache.keep(going.nonzero().flatten())
        self._position = self._position + 1
        self._last = self._compute(chosen.unsqueeze(1), self._position)[:, -1]

    def decoded(self) -> Decoded:
        noted = (_joined(rows) if self._top_k else None for rows in self._noted)
        return Decoded(tuple(map(tuple, self._tokens)), tuple(noted))

    def _compute(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[num_alive, width, hidden_size]"""
        hidden: Tensor = self._model.base_model(
            input_ids=input_ids, position_ids=positions, use_cache=False, tree=self._cache
        )[0]
        self._cache.length += input_ids.shape[1]
        return hidden


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row."""
    return logits.topk(1, dim=-1).indices.squeeze(1)


def nucleus(
    temperature: float, top_p: float, generator: torch.Generator, top_k: int = 1024
) -> Choose:
    """Sample among the likeliest tokens that hold `top_p` of the mass, `top_k` at most."""

    def choose(logits: Tensor) -> Tensor:
        scores = logits.float() / temperature
        top = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
        probs = (top.values - scores.logsumexp(dim=-1, keepdim=True)).exp()
        probs *= probs.cumsum(dim=-1) - probs < top_p
        picked = torch.multinomial(probs, 1, generator=generator)
        return top.indices.gather(1, picked).squeeze(1)

    return choose


def top_probs(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[num_rows, top_k] likeliest tokens (int32) and their probabilities (half)."""
    scores = logits.float()
    top = scores.topk(top_k, dim=-1)
    probs = (top.values - scores.logsumexp(dim=-1, keepdim=True)).exp()
    return top.indices.to(torch.int32), probs.half()


def _note(head: Any, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if not top_k or not len(rows):
        empty = torch.empty(0, top_k)
        return empty.to(torch.int32), empty.half()
    parts = [top_probs(head(chunk), top_k) for chunk in torch.split(rows, _CHUNK_ROWS)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([probs for _, probs in parts])


def _joined(rows: Sequence[tuple[Tensor, Tensor]]) -> TopTokens:
    return TopTokens(
        torch.cat([ids for ids, _ in rows]).numpy(), torch.cat([probs for _, probs in rows]).numpy()
    )
