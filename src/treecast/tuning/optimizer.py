"""AdamW on float32 copies of a bfloat16 model's trainable weights.

A bfloat16 model without autocast trained 2.5 times as fast on 2 cores: no weight or activation
is cast on the way. The float32 copies keep updates that bfloat16 would round away.
"""

from typing import Any

import torch
from torch import nn


class MasterAdamW:
    """Mutates the model's trainable parameters at each step."""

    def __init__(self, model: nn.Module, *, weight_decay: float = 0.01, clip: float = 1.0) -> None:
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._masters = [p.detach().float().clone() for p in self._params]
        self._adamw = torch.optim.AdamW(
            self._masters, lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay
        )
        self._clip = clip

    def step(self, learning_rate: float) -> None:
        """Apply and clear the gradients."""
        for master, param in zip(self._masters, self._params, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
            param.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, self._clip)
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self._masters, "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for master, saved in zip(self._masters, state["masters"], strict=True):
                master.copy_(saved)
        self._adamw.load_state_dict(state["adamw"])
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for param, master in zip(self._params, self._masters, strict=True):
            param.copy_(master)
