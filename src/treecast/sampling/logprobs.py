"""Log-probabilities as they are reported: of the untransformed softmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one output position; `top` holds the likeliest tokens, best first."""

    chosen: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


def token_logprobs(
    logits: NDArray[np.float32],  # [vocab]
    token: int,
    num_top: int,
) -> TokenLogprobs:
    """Log-softmax of `logits` at `token` and at the `num_top` likeliest; ties to the lowest id."""
    wide = logits.astype(np.float64)
    peak = wide.max()
    logprobs = wide - (peak + np.log(np.exp(wide - peak).sum()))
    top_ids = np.argsort(-logprobs, kind="stable")[:num_top]
    return TokenLogprobs(
        chosen=float(logprobs[token]),
        top_ids=tuple(int(i) for i in top_ids),
        top=tuple(float(logprobs[i]) for i in top_ids),
    )
