"""Drafters held against recorded answers: what verifying would have taken, without a target.

The law `replay` commits what the target says by itself, whatever the tree; so where the walk would
have stopped follows from the answer alone. Answers are drafted for side by side, as sessions of a
speculator are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from treecast.decoding.local import draft_request
from treecast.drafting.merge import MergedDrafter
from treecast.sampling.params import SpeculationParams
from treecast.services.verifier.calibration import tried
from treecast.tree import MAX_DEPTH, ROOT, TokenTree

from .answers import BATCH, Answer
from .results import NUM_GUESSES, Guesses, Trial

_GUESS_NODES = 64
"""Enough for five of a lookup's root children; a draft model is asked for just those."""

Observe = Callable[[int, TokenTree, Sequence[int]], None]
"""Told of each step: the answer's place, the tree verified and the tokens committed."""


def _unobserved(place: int, tree: TokenTree, tokens: Sequence[int]) -> None: ...


def replay(
    drafter: MergedDrafter,
    answers: Sequence[Answer],
    speculation: SpeculationParams,
    max_nodes: int,
    setting: str,
    observe: Observe = _unobserved,
) -> list[Trial]:
    """Verify the drafter's trees against what the target is known to say. Blocks."""
    lengths: list[Counter[int]] = [Counter() for _ in answers]
    nodes = [0] * len(answers)

    def verify(place: int, tree: TokenTree, rest: Sequence[int]) -> int:
        tree = tree.limit(max_nodes, min(len(rest) - 1, MAX_DEPTH))
        accepted = sum(tried(tree, rest[:-1]).values())  # the last token ends the text: a bonus
        lengths[place][accepted] += 1
        nodes[place] += len(tree)
        observe(place, tree, rest[: accepted + 1])
        return accepted + 1

    _drive(drafter, answers, speculation, max_nodes, verify)
    return [
        Trial(
            setting,
            answer.decoding.name,
            answer.question.id,
            answer.question.category,
            num_nodes,
            tuple(counts[length] for length in range(max(counts) + 1)),
        )
        for answer, counts, num_nodes in zip(answers, lengths, nodes, strict=True)
    ]


FirstGuesses = list[list[list[int]]]
"""By answer and token: the first guesses at it, likeliest first, given the true text before it."""


def first_guesses(
    drafter: MergedDrafter, answers: Sequence[Answer], speculation: SpeculationParams
) -> FirstGuesses:
    """What a drafter would have put below the root at every token of the answers. Blocks."""
    found: FirstGuesses = [[] for _ in answers]

    def note(place: int, tree: TokenTree, rest: Sequence[int]) -> int:
        tops = [node for node, parent in enumerate(tree.parents) if parent == ROOT]
        tops.sort(key=lambda node: -tree.confidence[node])
        found[place].append([tree.tokens[node] for node in tops[:NUM_GUESSES]])
        return 1

    _drive(drafter, answers, speculation, _GUESS_NODES, note)
    return found


def count_hits(
    sources: Sequence[FirstGuesses], answers: Sequence[Answer], setting: str, proposer: str
) -> list[Guesses]:
    """Tokens found within the first 1 to 5 guesses of at least one source."""
    rows = []
    for place, answer in enumerate(answers):
        hits, sizes = [0] * NUM_GUESSES, [0] * NUM_GUESSES
        for position, token in enumerate(answer.tokens):
            for count in range(1, NUM_GUESSES + 1):
                union = {guess for source in sources for guess in source[place][position][:count]}
                hits[count - 1] += token in union
                sizes[count - 1] += len(union)
        question = answer.question
        rows.append(
            Guesses(
                setting,
                proposer,
                question.id,
                question.category,
                len(answer.tokens),
                tuple(hits),
                tuple(sizes),
            )
        )
    return rows


def _drive(
    drafter: MergedDrafter,
    answers: Sequence[Answer],
    speculation: SpeculationParams,
    max_nodes: int,
    verify: Callable[[int, TokenTree, Sequence[int]], int],
) -> None:
    """Draft along the answers; `verify` says how many of the tokens left a step commits."""
    for places in _batches(len(answers)):
        rest = {place: answers[place].tokens for place in places}
        for place in places:
            answer = answers[place]
            asked = draft_request(
                answer.question.token_ids, answer.sampling, answer.noise_key, speculation
            )
            drafter.open(place, asked)
        while rest:
            trees = drafter.draft(dict.fromkeys(rest, max_nodes))
            for failure in drafter.take_lost().values():
                raise failure
            for place, tree in trees.items():
                if drafter.is_behind(place):
                    continue  # its prompt is still being read
                count = verify(place, tree, rest[place])
                drafter.commit(place, rest[place][:count])
                rest[place] = rest[place][count:]
                if not rest[place]:
                    drafter.close(place)
                    del rest[place]


def _batches(count: int) -> Iterator[list[int]]:
    places = iter(range(count))
    while batch := list(islice(places, BATCH)):
        yield batch
