"""Cross-entropy through a frozen output head, a few hundred rows at a time.

The head's vocabulary is most of a small draft's training cost. Here the gradient is worked out
while the probabilities are at hand, so logits are computed once and never kept; softmax runs in
the head's dtype (`logsumexp` in float32 took five times the matmul on CPU).
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK_ROWS = 256
_SMALLEST = torch.finfo(torch.float32).tiny


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, label_ids: Tensor, label_weights: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(hidden), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            ids, weights = label_ids[rows], label_weights[rows]
            probs = torch.softmax(hidden[rows] @ head.T, dim=-1)
            label_probs = probs.gather(1, ids).float().clamp_min(_SMALLEST)
            total -= (label_probs.log() * weights).sum()
            pulled = (head[ids].float() * weights.unsqueeze(-1)).sum(dim=1)
            gradient[rows] = probs @ head - pulled.to(head.dtype)
        ctx.save_for_backward(gradient)
        return (total / len(hidden)).float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = grad_output / len(gradient)
        return (gradient * scale).to(gradient.dtype), None, None, None


def frozen_head_loss(
    hidden: Tensor,  # [num_targets, hidden_size]
    head: Tensor,  # [vocab, hidden_size], gets no gradient
    label_ids: Tensor,  # [num_targets, num_labels]
    label_weights: Tensor,  # [num_targets, num_labels] float32, each row sums to 1
) -> Tensor:
    """Mean cross-entropy between the weighted labels and softmax(hidden @ head.T).

    Gradients flow into `hidden` alone. The rows of `label_weights` must sum to 1.
    """
    loss: Tensor = _FrozenHeadLoss.apply(hidden, head, label_ids, label_weights)  # type: ignore[no-untyped-call]
    return loss
