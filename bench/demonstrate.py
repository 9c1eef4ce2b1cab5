"""The demo: every prompt twice through the same verifier, with trees and plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from treecast.client import Client, Usage
from treecast.sampling.params import SpeculationParams

from .prompts import BenchPrompt, user_turn
from .run import TimedResult, time_answer

PLAIN = SpeculationParams(max_nodes=0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt's two answers."""

    prompt: BenchPrompt
    speculative: TimedResult
    plain: TimedResult

    @property
    def identical(self) -> bool:
        """Same tokens, hence same text."""
        return self.speculative.result.token_ids == self.plain.result.token_ids


def demonstrate(
    client: Client,
    prompts: Sequence[BenchPrompt],
    max_tokens: int,
    on_prompt: Callable[[BenchPrompt], None],
    on_text: Callable[[str], None],
) -> Iterator[Comparison]:
    """Answer each prompt with speculation, shown live, then again without."""
    for prompt in prompts:
        on_prompt(prompt)
        chat = prompt.chat
        speculative = time_answer(client, chat, max_tokens, SpeculationParams(), on_text)
        plain = time_answer(client, chat, max_tokens, PLAIN)
        yield Comparison(prompt, speculative, plain)


def warm_up(client: Client) -> None:
    """Let both ways of decoding run once, so that no prompt pays for first-time work."""
    chat = user_turn("Count to ten.")
    for speculation in (SpeculationParams(), PLAIN):
        time_answer(client, chat, 16, speculation)


def tokens_per_step(answers: Sequence[TimedResult]) -> float:
    tokens = sum(len(answer.result.token_ids) for answer in answers)
    return tokens / max(1, sum(answer.result.usage.steps for answer in answers))


def tokens_per_s(answers: Sequence[TimedResult]) -> float:
    tokens = sum(len(answer.result.token_ids) for answer in answers)
    return tokens / sum(answer.seconds for answer in answers)


def acceptance_by_depth(usages: Sequence[Usage]) -> list[float]:
    """Element d: of the trees that reached depth d + 1, the share accepted that far."""
    deepest = max((len(usage.offered_by_depth) for usage in usages), default=0)
    shares = []
    for depth in range(deepest):
        reached = [usage for usage in usages if depth < len(usage.offered_by_depth)]
        offered = sum(usage.offered_by_depth[depth] for usage in reached)
        accepted = sum(usage.accepted_by_depth[depth] for usage in reached)
        shares.append(accepted / offered if offered else 0.0)
    return shares
