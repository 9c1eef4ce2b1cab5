"""How a model's layers are run over a packed pass; attention is the pass's own."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Protocol

import structlog
import torch
from torch import Tensor, nn

from treecast.engine.bridge import TreePass
from treecast.engine.kv_tensors import LayerShape
from treecast.engine.linears import RowLayers, plain_layers
from treecast.engine.llama import LlamaRunner, is_llama_like, make_anew
from treecast.engine.residency import ALL_RESIDENT, Residency
from treecast.errors import ModelError
from treecast.kernels.fast import FastAttention
from treecast.kernels.plan import SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule

_NUM_CHECKED = 16
_TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Rounding in bfloat16 gives about 0.02, another block about 1."""

_log = structlog.get_logger()


class Runner(Protocol):
    """A loaded model. Called under `torch.inference_mode`, by one thread."""

    def __call__(
        self,
        tokens: Tensor,  # [rows] int64
        positions: Tensor,  # [rows] int64
        wanted: Tensor,  # [wanted] int64, rows whose logits are needed
        tree: TreePass,
    ) -> Tensor:  # [wanted, vocab]
        ...


class ModuleRunner:
    """Any causal LM of transformers, by its own modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._picks_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, tokens: Tensor, positions: Tensor, wanted: Tensor, tree: TreePass) -> Tensor:
        keep: dict[str, Any] = {"logits_to_keep": wanted} if self._picks_rows else {}
        logits: Tensor = self._model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, tree=tree, **keep
        ).logits[0]
        return logits if self._picks_rows else logits[wanted]


def choose_runner(model: Any, layers: RowLayers, residency: Residency = ALL_RESIDENT) -> Runner:
    """The quickest runner that computes what a model's own modules do.

    The model is changed (its linears are replaced) or no longer needed: layer by layer its weights
    give way to those packed. The fused stack is tried with the weights as they are, so that rounded
    ones need no tolerance of their own.

    Args:
        residency: where the layers' weights are to be.
    """
    modules = ModuleRunner(model)
    if is_llama_like(model, layers):
        device = next(model.parameters()).device
        rules = _record(modules, device).rules
        if residency.drops:
            trial = LlamaRunner(model, plain_layers(), rules, make_anew)
        else:
            trial = LlamaRunner(model, layers, rules, residency.keep)
        error = relative_error(trial, modules, *_some_text(model))
        if error < _TOLERANCE[next(model.parameters()).dtype]:
            return LlamaRunner(model, layers, rules, residency.keep) if residency.drops else trial
        _log.info("model.only_looks_like_llama", model=type(model).__name__, error=error)
    residency.keep_modules(model, layers)
    return modules


def _some_text(model: Any) -> tuple[Tensor, Tensor]:
    """Tokens and positions: a beginning, and the end of the context.

    Ordinary tokens: at the special ones, first in a vocabulary, rounding shows more.
    """
    config = model.config.get_text_config()
    rows = torch.arange(_NUM_CHECKED, device=next(model.parameters()).device)
    skipped: int = max(0, config.max_position_embeddings - _NUM_CHECKED)
    positions = torch.where(rows < _NUM_CHECKED // 2, rows, rows + skipped)
    return (1000 + 37 * rows) % config.vocab_size, positions


def relative_error(runner: Runner, oracle: Runner, tokens: Tensor, positions: Tensor) -> float:
    """How far two runners' logits are apart over a text, by the norm of the oracle's.

    The median over each half's rows, and of the halves the worse: rounding alone may move single
    rows far. Tokens at -inf under both, outside a cut head, are left out.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    with torch.inference_mode():
        found, expected = (
            one(tokens, positions, rows, _CausalPass()).float() for one in (runner, oracle)
        )
        apart = (found - expected).masked_fill(found == expected, 0.0)
        errors = apart.norm(dim=-1) / expected.masked_fill(expected == -torch.inf, 0.0).norm(dim=-1)
        return max(float(half.median()) for half in errors.chunk(2))


class _CausalPass:
    """Attention of one plain text, without a pool."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rule: ScoreRule = PLAIN,
    ) -> Tensor:
        rows = query.shape[2]
        text = SegmentLayout(0, rows, 0, range(-1, rows - 1), 0, range(rows))
        kernel = FastAttention([text], value.dtype, value.device)
        out = value.new_empty((1, rows, query.shape[1], value.shape[-1]))
        pool = torch.empty_like(key[0], dtype=value.dtype), torch.empty_like(value[0])
        kernel(query[0], key[0], value[0], *pool, scaling, out[0], rule)
        return out


def layer_shapes(runner: Runner, layers: range, device: torch.device) -> list[LayerShape]:
    """Run two tokens through a model to learn what its layers keep.

    Args:
        layers: those that are computed here; any before them keep nothing.

    Returns:
        By layer, as far as the last of `layers`.

    Raises:
        ModelError: some layer has no attention of ours, so its state would be lost.
    """
    recorder = _record(runner, device)
    missing = [layer for layer in layers if layer not in recorder.shapes]
    if missing:
        raise ModelError(
            f"{len(missing)} of the model's {len(layers)} layers (first {missing[0]}) do not reach "
            "the attention interface; every layer of a served model must"
        )
    nothing = replace(recorder.shapes[layers[0]], kv_heads=0)
    return [recorder.shapes.get(layer, nothing) for layer in range(layers.stop)]


def _record(runner: Runner, device: torch.device | None = None) -> _RecordingPass:
    recorder = _RecordingPass()
    rows = torch.arange(2, device=device)
    with torch.inference_mode():
        runner(torch.zeros_like(rows), rows, rows, recorder)
    return recorder


class _RecordingPass:
    """A pass that only learns what each layer keeps of a position, and its rule for scores."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.rules: dict[int, ScoreRule] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rule: ScoreRule = PLAIN,
    ) -> Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        self.shapes[layer] = LayerShape(kv_heads, key.shape[-1], value.shape[-1], heads // kv_heads)
        self.rules[layer] = rule
        return value.new_zeros((1, query.shape[2], query.shape[1], value.shape[-1]))
