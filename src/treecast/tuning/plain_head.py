"""Whether a model's logits are its hidden states times its head's rows, as tuning takes them."""

from typing import Any

import torch

from treecast.errors import ModelError

NUM_TOKENS = 16
"""Of the text that is looked at."""
_MOST_ERROR = 0.01  # of the logits' norm; bfloat16 gives .002, a bias, scale or cap more


@torch.no_grad()
def check_plain_head(model: Any, **inputs: Any) -> None:
    """Hold a model's own logits against those that tuning would compute, over one short text.

    Args:
        inputs: what the model's passes take beside the token ids.

    Raises:
        ModelError: they differ, as where a family adds a bias, scales its logits or caps them.
    """
    ids = torch.arange(NUM_TOKENS)[None] % model.config.vocab_size
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[0].float()
    hidden = model.base_model(input_ids=ids, use_cache=False, **inputs)[0][0]
    ours = (hidden @ model.get_output_embeddings().weight.T).float()
    if not (ours - logits).norm() <= _MOST_ERROR * logits.norm():
        raise ModelError(
            f"{type(model).__name__} has a bias, a scale or a cap on its logits; "
            "drafts are tuned only for models that have none"
        )
