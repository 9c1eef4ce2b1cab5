"""Pipeline parallelism: a stage has some of a model's layers, and passes on what they make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treecast.engine.bridge import TreePass
from treecast.engine.sharding.world import World
from treecast.errors import ModelError


class StageRunner:
    """One stage by its own modules; see `engine.runner.Runner`.

    Logits come from the last stage and are known there and to rank 0; other ranks get no rows.
    """

    def __init__(self, model: Any, world: World) -> None:
        """Take over a model of which transformers has loaded our stage.

        Raises:
            ModelError: the model changes embeddings outside its layers.
        """
        del model.forward  # transformers' own, which sends logits to all ranks
        self._model = model
        self._world = world
        self._stage, self._last = world.place.stage, world.place.shape.pp - 1
        config = model.config.get_text_config()
        self._hidden, self._vocab = config.hidden_size, config.vocab_size
        self._dtype = next(model.parameters()).dtype
        check_passes_on(model, torch.ones((1, 2, self._hidden), dtype=self._dtype))

    def __call__(self, tokens: Tensor, positions: Tensor, wanted: Tensor, tree: TreePass) -> Tensor:
        inputs = self._inputs(tokens) | {
            "position_ids": positions[None],
            "use_cache": False,
            "tree": tree,
        }
        if self._stage == self._last:
            logits: Tensor = self._model(**inputs, logits_to_keep=wanted).logits[0]
            if len(wanted):
                self._world.send_home(logits)
            return logits
        hidden = self._model.base_model(**inputs).last_hidden_state[0]
        self._world.send_on(hidden)
        if self._world.place.rank == 0 and len(wanted):
            return self._world.receive_home(self._empty(len(wanted), self._vocab))
        return self._empty(0, self._vocab)

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        if self._stage == 0:
            return {"input_ids": tokens[None]}
        hidden = self._world.receive_on(self._empty(len(tokens), self._hidden))
        return {"inputs_embeds": hidden[None]}

    def _empty(self, rows: int, columns: int) -> Tensor:
        device = next(self._model.parameters()).device
        return torch.empty((rows, columns), dtype=self._dtype, device=device)


def own_layers(num_layers: int, world: World) -> range:
    """The layers of our stage, as transformers divides them: the last stage has what is left."""
    stage, stages = world.place.stage, world.place.shape.pp
    each = num_layers // stages
    return range(stage * each, num_layers if stage == stages - 1 else (stage + 1) * each)


def check_passes_on(model: Any, hidden: Tensor) -> None:
    """See that a model does nothing to activations outside its layers.

    A stage is given them in place of embeddings; a factor on those would be applied once more.

    Args:
        hidden: [1, rows, hidden size] any activations.

    Raises:
        ModelError: it does.
    """
    base = model.base_model
    layers, norm = base.layers, base.norm
    base.layers, base.norm = nn.ModuleList(), nn.Identity()
    try:
        with torch.inference_mode():
            passed = base(inputs_embeds=hidden, use_cache=False).last_hidden_state
    finally:
        base.layers, base.norm = layers, norm
    if not torch.equal(passed, hidden):
        raise ModelError(
            f"{type(model).__name__} changes embeddings before its first layer; "
            "it cannot be divided into stages"
        )
