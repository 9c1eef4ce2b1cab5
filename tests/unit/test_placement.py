"""Where requests go, over snapshots made by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from treecast.errors import InvalidRequest, NotServed
from treecast.sampling.params import Law
from treecast.services.router.placement import (
    Candidate,
    PlacedBy,
    Placement,
    Wanted,
    choose_model,
    keep_free,
    place,
    serves,
)
from treecast.wire.frames import Heartbeat, Hello, Role

WANTED = Wanted(model="m", revision="r1", spread="request")


def hello(name: str, **changes: object) -> Hello:
    base = Hello(name, Role.VERIFIER, capacity=4, model="m", model_revision="r1")
    return replace(base, **changes)  # type: ignore[arg-type]


def verifier(name: str, running: int = 0, seated: int = 0, **changes: object) -> Candidate:
    beat = Heartbeat(running=running)
    return Candidate(hello(name, **changes), beat, seated=seated, seated_at_beat=seated)


def chosen(candidates: list[Candidate], wanted: Wanted = WANTED) -> Placement:
    placement = place(candidates, wanted)
    assert placement is not None
    return placement


def test_least_loaded_is_chosen_when_there_is_no_session() -> None:
    placement = chosen([verifier("a", running=3), verifier("b", running=1)])
    assert placement == Placement("b", PlacedBy.LOAD)


def test_requests_since_the_heartbeat_count_when_load_is_compared() -> None:
    # a: 1 running at its heartbeat, of which 1 is ours, and 2 sent since: 3. b: 2.
    a = Candidate(hello("a"), Heartbeat(running=1), seated=3, seated_at_beat=1)
    b = Candidate(hello("b"), Heartbeat(running=1, waiting=1), seated=0, seated_at_beat=0)
    assert (a.load, b.load) == (3, 2)
    assert chosen([a, b]).instance_id == "b"


@pytest.mark.parametrize(("tight", "roomy"), [("a", "b"), ("b", "a")])
def test_freer_kv_pool_is_chosen_when_loads_are_equal(tight: str, roomy: str) -> None:
    # 10 free of 20 is a smaller part in use than 20 free of 100.
    one = Candidate(hello(tight), Heartbeat(kv_pages_free=20, kv_pages_total=100))
    two = Candidate(hello(roomy), Heartbeat(kv_pages_free=10, kv_pages_total=20))
    assert chosen([one, two]).instance_id == roomy


def test_requests_spread_when_verifiers_are_alike() -> None:
    alike = [verifier(name) for name in "abcd"]
    names = [f"request {number}" for number in range(400)]
    homes = Counter(chosen(alike, replace(WANTED, spread=name)).instance_id for name in names)
    assert sorted(homes) == list("abcd")
    assert min(homes.values()) > 60  # of 100 expected; 60 is 4.6 standard deviations below


def test_holder_is_chosen_when_it_is_busier_than_others() -> None:
    wanted = replace(WANTED, holder="a")
    placement = chosen([verifier("a", running=3), verifier("b")], wanted)
    assert placement == Placement("a", PlacedBy.AFFINITY)


@pytest.mark.parametrize(
    "holder",
    [
        verifier("a", seated=4),
        Candidate(hello("a"), Heartbeat(draining=True)),
        verifier("a", model_revision="r2"),
    ],
    ids=["full", "draining", "of another revision"],
)
def test_another_is_chosen_when_the_holder_cannot_serve(holder: Candidate) -> None:
    placement = chosen([holder, verifier("b", running=3)], replace(WANTED, holder="a"))
    assert placement == Placement("b", PlacedBy.LOAD)


def test_another_is_chosen_when_the_holder_is_gone() -> None:
    placement = chosen([verifier("b")], replace(WANTED, holder="a"))
    assert placement == Placement("b", PlacedBy.LOAD)


def test_hash_decides_and_not_load_when_redis_is_lost() -> None:
    wanted = replace(WANTED, rendezvous="session 1")
    idle = [verifier(name) for name in "abc"]
    home = chosen(idle, wanted)
    assert home.by is PlacedBy.RENDEZVOUS
    busy = [verifier(one, running=3 if one == home.instance_id else 0) for one in "cab"]
    assert chosen(busy, wanted) == home


def test_only_its_own_sessions_move_when_a_verifier_goes() -> None:
    names = [f"session {number}" for number in range(100)]

    def homes(verifiers: str) -> dict[str, str]:
        candidates = [verifier(one) for one in verifiers]
        return {
            name: chosen(candidates, replace(WANTED, rendezvous=name)).instance_id for name in names
        }

    before, after = homes("abc"), homes("ab")
    moved = {name for name in names if before[name] != after[name]}
    assert moved == {name for name in names if before[name] == "c"}
    assert moved


def test_equal_numerics_are_preferred_when_a_text_goes_on() -> None:
    same = verifier("a", running=3, fingerprint="avx512")
    other = verifier("b", fingerprint="amx")
    wanted = replace(WANTED, fingerprint="avx512")
    assert chosen([same, other], wanted).instance_id == "a"
    assert chosen([other], wanted).instance_id == "b"
    assert chosen([same, other]).instance_id == "b"


@pytest.mark.parametrize(
    "unfit",
    [
        verifier("a", model="other"),
        verifier("a", model_revision="r2"),
        verifier("a", capacity=0),
        Candidate(hello("a"), Heartbeat(draining=True)),
        Candidate(hello("a"), stream=7),
    ],
    ids=["model", "revision", "no capacity", "draining", "avoided"],
)
def test_verifier_is_not_chosen_when_it_would_not_do(unfit: Candidate) -> None:
    wanted = replace(WANTED, avoid=frozenset({7}))
    assert not serves(unfit, wanted)
    assert place([unfit], wanted) is None


def test_verifier_is_not_chosen_when_it_lacks_the_law() -> None:
    wanted = replace(WANTED, law=Law.MSS)
    assert place([verifier("a")], wanted) is None
    assert chosen([verifier("b", laws=(Law.REPLAY, Law.MSS))], wanted).instance_id == "b"


def test_nothing_is_chosen_when_every_verifier_is_full() -> None:
    full = verifier("a", seated=4)
    assert place([full], WANTED) is None
    assert serves(full, WANTED)


def test_samples_go_together_when_they_need_room() -> None:
    wanted = replace(WANTED, slots=3)
    assert place([verifier("a", seated=2)], wanted) is None
    assert chosen([verifier("a", seated=1)], wanted).instance_id == "a"


def test_the_verifier_with_fewest_places_missing_is_kept_free() -> None:
    wanted = replace(WANTED, slots=4)
    b = Candidate(hello("b"), stream=7, seated=1)
    crowd = [verifier("a", seated=3), b, verifier("c", seated=4)]
    assert keep_free(crowd, wanted) == "b"
    assert keep_free(crowd, replace(wanted, avoid=frozenset({7}))) == "a"
    assert keep_free(crowd, replace(wanted, model="other")) is None


def test_more_samples_than_a_verifier_takes_go_to_an_empty_one() -> None:
    wanted = replace(WANTED, slots=16)
    assert place([verifier("a", seated=1)], wanted) is None
    assert chosen([verifier("a")], wanted).instance_id == "a"


def test_only_model_is_meant_when_none_is_named() -> None:
    assert choose_model(None, None, [hello("a"), hello("b")], ()) == hello("a")


def test_model_must_be_named_when_several_are_served() -> None:
    served = [hello("a", model="y"), hello("b", model="x")]
    with pytest.raises(InvalidRequest, match=r"^model is not set and 2 are served: x, y$"):
        choose_model(None, None, served, ())
    assert choose_model("x", None, served, ()) == served[1]


def test_unknown_model_is_refused_when_others_are_served() -> None:
    with pytest.raises(NotServed, match=r"^model 'z' is not served; served: m$"):
        choose_model("z", None, [hello("a")], ())


def test_model_is_waited_for_when_it_was_served_before() -> None:
    assert choose_model("z", None, [hello("a")], {"m", "z"}) is None


def test_model_is_waited_for_when_nothing_is_served() -> None:
    assert choose_model("z", None, [], ()) is None
    assert choose_model(None, None, [], ()) is None


def test_commonest_revision_is_meant_when_a_roll_out_is_under_way() -> None:
    old, new = "r1", "r2"
    served = [
        hello("a", model_revision=old),
        hello("b", model_revision=new),
        hello("c", model_revision=new),
    ]
    assert choose_model("m", None, served, ()) == served[1]
    assert choose_model("m", old, served, ()) == served[0]


def test_resume_is_refused_when_its_revision_is_gone() -> None:
    with pytest.raises(
        NotServed, match=r"^revision 'r0' of model 'm' is not served any more; served: r1$"
    ):
        choose_model("m", "r0", [hello("a")], ())


# --- the beginning of a prompt ------------------------------------------------------------------


def test_longest_beginning_is_chosen_when_its_holder_is_hardly_busier() -> None:
    pool = [verifier("a"), verifier("b", running=1), verifier("c", running=1)]
    wanted = replace(WANTED, prefix_holders=("gone", "b", "c"))
    assert chosen(pool, wanted) == Placement("b", PlacedBy.PREFIX)


def test_next_beginning_is_chosen_when_the_longest_ones_holder_is_busy() -> None:
    # Average load 2, so the bound is 1.25 * 2 + 1 = 3.5.
    pool = [verifier("a", running=2), verifier("b", running=4), verifier("c", running=0)]
    assert chosen(pool, replace(WANTED, prefix_holders=("b", "a"))).instance_id == "a"
    assert chosen(pool, replace(WANTED, prefix_holders=("b",))) == Placement("c", PlacedBy.LOAD)


def test_session_comes_before_beginnings_and_hashes_behind() -> None:
    pool = [verifier("a"), verifier("b")]
    wanted = replace(WANTED, holder="a", prefix_holders=("b",), rendezvous="s")
    assert chosen(pool, wanted) == Placement("a", PlacedBy.AFFINITY)
    assert chosen(pool, replace(wanted, holder="")).by == PlacedBy.PREFIX
