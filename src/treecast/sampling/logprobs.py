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
    normaliser = peak + np.log(np.exp(wide - peak).sum())
    top_ids = _likeliest(logits, num_top)
    return TokenLogprobs(
        chosen=float(wide[token] - normaliser),
        top_ids=tuple(int(i) for i in top_ids),
        top=tuple(float(wide[i] - normaliser) for i in top_ids),
    )


def _likeliest(logits: NDArray[np.float32], num_top: int) -> NDArray[np.int64]:
    """Sorting a whole vocabulary takes milliseconds; finding the least that matters does not."""
    if num_top == 0:
        return np.empty(0, np.int64)
    num_top = min(num_top, len(logits))
    contenders = np.flatnonzero(logits >= np.partition(logits, -num_top)[-num_top])
    order = np.argsort(-logits[contenders], kind="stable")
    return contenders[order[:num_top]]
