"""Where a request goes: pure functions over a snapshot of the verifiers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b

from treecast.adapter import Adapter, names_of
from treecast.errors import InvalidRequest, NotServed
from treecast.sampling.params import Law
from treecast.wire.frames import Heartbeat, Hello

BUSIER = 1.25
"""How much more than the average, and one request, a verifier may have to do and still be chosen
for the beginning of a prompt that it has computed."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A healthy verifier: its stream is open and its heartbeats come.

    Attributes:
        stream: number of its stream here; another one once that has been lost.
        seated: requests that this router has there now.
        seated_at_beat: the same when the heartbeat came, which counts them already.
        trusted: False while its breaker is open: it served nothing lately, and takes nothing now.
    """

    hello: Hello
    beat: Heartbeat = Heartbeat()  # noqa: RUF009  frozen
    stream: int = 0
    seated: int = 0
    seated_at_beat: int = 0
    trusted: bool = True

    @property
    def instance_id(self) -> str:
        return self.hello.instance_id

    @property
    def free(self) -> int:
        """Requests that it would still take from this router."""
        return self.hello.capacity - self.seated

    @property
    def load(self) -> int:
        """Requests there, from all routers, as far as we know by now."""
        return self.beat.running + self.beat.waiting + self.seated - self.seated_at_beat

    @property
    def kv_use(self) -> float:
        """Share of its KV pool in use."""
        total = self.beat.kv_pages_total
        return 1 - self.beat.kv_pages_free / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request needs of a verifier.

    Attributes:
        spread: evens out ties between routers and requests; the request id.
        adapter: that the model is to be computed with; None for the model alone.
        grammar: whether the output is to be held to one.
        slots: samples to be placed together.
        holder: instance that has the session's KV cache, empty if unknown.
        prefix_holders: instances that computed a beginning of the prompt, the longest first.
        rendezvous: session to be placed by hashing, when Redis cannot tell its holder.
        fingerprint: numerics of an earlier placement, which keep the text the same; empty for any.
        avoid: streams that have given the request up. A verifier that comes back on a new one may
            have it again.
    """

    model: str
    revision: str
    spread: str
    law: Law = Law.REPLAY
    adapter: Adapter | None = None
    grammar: bool = False
    slots: int = 1
    holder: str = ""
    prefix_holders: tuple[str, ...] = ()
    rendezvous: str = ""
    fingerprint: str = ""
    avoid: frozenset[int] = frozenset()


class PlacedBy(Enum):
    """Why a request went where it went; the values are metric labels."""

    AFFINITY = "affinity"
    PREFIX = "prefix"
    RENDEZVOUS = "rendezvous"
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class Placement:
    instance_id: str
    by: PlacedBy


def place(candidates: Iterable[Candidate], wanted: Wanted) -> Placement | None:
    """Choose a verifier: the session's holder, who has the prompt's beginning, by hash, by load.

    A full holder is passed over, and one of a beginning alone if it is busy too: to compute a
    prefix again costs less than to wait for a place.

    Returns:
        None if every verifier that would do is full, or there is none.
    """
    roomy = [one for one in candidates if serves(one, wanted) and _has_room(one, wanted)]
    if any(one.instance_id == wanted.holder for one in roomy):
        return Placement(wanted.holder, PlacedBy.AFFINITY)
    alike = [one for one in roomy if wanted.fingerprint in ("", one.hello.fingerprint)]
    pool = alike or roomy
    if not pool:
        return None
    near = _near(pool, wanted.prefix_holders)
    if near is not None:
        return Placement(near.instance_id, PlacedBy.PREFIX)
    if wanted.rendezvous:
        best = max(pool, key=lambda one: _weight(wanted.rendezvous, one))
        return Placement(best.instance_id, PlacedBy.RENDEZVOUS)
    return Placement(_least_loaded(pool, wanted.spread).instance_id, PlacedBy.LOAD)


def _least_loaded(pool: Sequence[Candidate], spread: str) -> Candidate:
    """By load, then by the use of its KV pool, then by hash, which only ties are worth."""
    least = min((one.load, one.kv_use) for one in pool)
    ties = (one for one in pool if (one.load, one.kv_use) == least)
    return min(ties, key=lambda one: _weight(spread, one))


def _near(pool: Sequence[Candidate], prefix_holders: Sequence[str]) -> Candidate | None:
    """The first holder that is there and not much busier than the average.

    Source of the bound: Mirrokni et al. 2016, "Consistent hashing with bounded loads"
    (arXiv 1608.01350).
    """
    bound = BUSIER * sum(one.load for one in pool) / len(pool) + 1
    there = {one.instance_id: one for one in pool if one.load <= bound}
    return next((there[name] for name in prefix_holders if name in there), None)


def serves(candidate: Candidate, wanted: Wanted) -> bool:
    """Whether the verifier would do, once it has room."""
    hello = candidate.hello
    return (
        hello.model == wanted.model
        and hello.model_revision == wanted.revision
        and wanted.law in hello.laws
        and (wanted.adapter is None or wanted.adapter in hello.adapters)
        and (hello.keeps_grammars or not wanted.grammar)
        and hello.capacity > 0
        and not candidate.beat.draining
        and candidate.stream not in wanted.avoid
    )


def keep_free(candidates: Iterable[Candidate], wanted: Wanted) -> str | None:
    """The verifier where a request that finds room nowhere waits for it.

    Nobody behind it is placed there meanwhile, so that many samples get their room in the end; only
    there, so that the wait for them leaves no more than one verifier's places empty.

    Returns:
        The instance with the fewest places missing; None if there is none that would do.
    """
    fit = [one for one in candidates if serves(one, wanted) and one.trusted]
    return max(fit, key=lambda one: _spare(one, wanted)).instance_id if fit else None


def _has_room(candidate: Candidate, wanted: Wanted) -> bool:
    return candidate.trusted and _spare(candidate, wanted) >= 0


def _spare(candidate: Candidate, wanted: Wanted) -> int:
    """Places left over once the request is there; below 0 if it has no room."""
    return candidate.free - min(wanted.slots, candidate.hello.capacity)


def _weight(name: str, candidate: Candidate) -> bytes:
    """Rendezvous hashing: every router ranks the same verifiers alike, without asking anyone.

    Source: Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates".
    """
    return blake2b(f"{name}\0{candidate.instance_id}".encode(), digest_size=8).digest()


def adapter_meant(
    name: str | None, adapter: str, hellos: Iterable[Hello]
) -> tuple[str | None, str]:
    """The model and adapter that a request names, where an adapter's name may stand for both.

    OpenAI's clients have one field alone for the two; so vLLM's users name an adapter.

    Returns:
        Names, the model's None for any that has the adapter.
    """
    if adapter or name is None:
        return name, adapter
    hellos = list(hellos)
    is_model = any(hello.model == name for hello in hellos)
    is_adapter = any(one.name == name for hello in hellos for one in hello.adapters)
    return (None, name) if is_adapter and not is_model else (name, "")


def choose_adapter(
    name: str, revision: str | None, hellos: Sequence[Hello], remembered: Collection[str]
) -> Adapter | None:
    """The adapter that a request means, of those that a model's verifiers serve.

    Of several revisions the one with the most verifiers is taken, unless one is asked for.

    Args:
        hellos: of verifiers of one model and revision, at least one.
        remembered: adapters served at some time since the router started.
    Returns:
        None if it is not served now but may be again.
    Raises:
        NotServed: no such adapter, or revision of it; with those that are served.
    """
    served = [one for hello in hellos for one in hello.adapters]
    of_name = [one for one in served if one.name == name]
    if not of_name and name in remembered:
        return None
    if not of_name:
        raise NotServed(
            f"adapter {name!r} is not served with model {hellos[0].model!r}; "
            f"served: {names_of(served)}"
        )
    of_revision = [one for one in of_name if revision in (None, one.revision)]
    if not of_revision:
        raise NotServed(
            f"revision {revision!r} of adapter {name!r} is not served any more; "
            f"served: {', '.join(sorted({one.revision for one in of_name}))}"
        )
    return max(sorted(of_revision, key=lambda one: one.revision), key=of_revision.count)


def choose_model(
    name: str | None, revision: str | None, hellos: Sequence[Hello], remembered: Collection[str]
) -> Hello | None:
    """The model that a request means, as one of its verifiers describes it.

    Of several revisions the one with the most verifiers is taken, unless one is asked for.

    Args:
        hellos: of the verifiers that take new requests.
        remembered: models served at some time since the router started.
    Returns:
        None if it is not served now but may be again.
    Raises:
        InvalidRequest: no name given, and several models are served.
        NotServed: no such model or revision.
    """
    names = sorted({hello.model for hello in hellos})
    if name is None and len(names) > 1:
        raise InvalidRequest(f"model is not set and {len(names)} are served: {', '.join(names)}")
    of_name = [hello for hello in hellos if name in (None, hello.model)]
    if not of_name:
        if name is None or not names or name in remembered:
            return None
        raise NotServed(f"model {name!r} is not served; served: {', '.join(names)}")
    return _choose_revision(revision, of_name)


def _choose_revision(revision: str | None, hellos: Sequence[Hello]) -> Hello:
    revisions = [hello.model_revision for hello in hellos]
    if revision is None:
        revision = max(sorted(set(revisions)), key=revisions.count)
    if revision not in revisions:
        raise NotServed(
            f"revision {revision!r} of model {hellos[0].model!r} is not served any more; "
            f"served: {', '.join(sorted(set(revisions)))}"
        )
    return hellos[revisions.index(revision)]
