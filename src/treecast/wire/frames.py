"""The frames of both pair streams in domain terms; `codec` translates them to protobuf."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import Enum

from treecast.adapter import Adapter
from treecast.errors import InvalidFrame, TreecastError
from treecast.sampling.logprobs import TokenLogprobs
from treecast.sampling.params import Law, SamplingParams, SpeculationParams
from treecast.sampling.stops import FinishReason as FinishReason
from treecast.tree import TokenTree
from treecast.wire.rounds import Round

PROTOCOL_VERSION = 1


class Role(Enum):
    ROUTER = 1
    VERIFIER = 2
    SPECULATOR = 3


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a peer is; the first frame of each side."""

    instance_id: str
    role: Role
    vocab_size: int = 0
    tokenizer_hash: str = ""
    laws: tuple[Law, ...] = (Law.REPLAY,)
    capacity: int = 0
    proposers: tuple[str, ...] = ()
    model: str = ""
    model_revision: str = ""
    fingerprint: str = ""
    context_tokens: int = 0
    shares_cores: bool = False
    adapters: tuple[Adapter, ...] = ()
    keeps_grammars: bool = False
    protocol_version: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """How a peer fares, every 250 ms."""

    steps: int = 0
    step_age_ms: int = 0
    step_predicted_ms: int = 0
    free_capacity: int = 0
    running: int = 0
    waiting: int = 0
    kv_pages_free: int = 0
    kv_pages_total: int = 0
    draining: bool = False


# --- verifier to speculator -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attach:
    """Its `tokens_per_s` is what the request commits lately: time may cost a tree no more tokens
    than that. 0: time is free.
    """

    handle: int
    tokens: tuple[int, ...]
    prompt_len: int
    sampling: SamplingParams
    noise_key: int
    node_budget: int
    speculation: SpeculationParams = SpeculationParams()  # noqa: RUF009  frozen
    tokens_per_s: float = 0.0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    handle: int
    from_len: int
    tokens: tuple[int, ...]
    node_budget: int
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Detach:
    handle: int


# --- speculator to verifier -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Draft:
    handle: int
    base_len: int
    tree: TokenTree
    drafting_us: int = 0


@dataclass(frozen=True, slots=True)
class NeedSync:
    handle: int


@dataclass(frozen=True, slots=True)
class Refused:
    handle: int
    why: str
    no_room: bool = False


# --- router to verifier -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionKey:
    tenant: str
    session_id: str
    epoch: int = 0

    @property
    def name(self) -> tuple[str, str]:
        """Without its lease's epoch: tenant and session id."""
        return self.tenant, self.session_id


@dataclass(frozen=True, slots=True)
class Start:
    """`expected_tokens` is a guess of the whole output's length, `committed` included."""

    handle: int
    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    noise_key: int
    committed: tuple[int, ...] = ()
    session: SessionKey | None = None
    speculation: SpeculationParams = SpeculationParams()  # noqa: RUF009  frozen
    deadline_ms: int | None = None
    truncate_prompt: bool = False
    tenant: str = ""
    report_rounds: bool = False
    traceparent: str = ""
    expected_tokens: int | None = None
    priority: int = 0
    adapter: str = ""

    def belongs_to(self, session: SessionKey | None) -> bool:
        """Whether it is of that session, under whatever lease."""
        mine = self.session
        return mine is not None and session is not None and mine.name == session.name


@dataclass(frozen=True, slots=True)
class Cancel:
    handle: int


@dataclass(frozen=True, slots=True)
class Forget:
    session: SessionKey


# --- verifier to router -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """What some tokens took: LLM steps, and tree nodes verified and accepted in them."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.steps + other.steps, self.drafted + other.drafted, self.accepted + other.accepted
        )


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_depth: tuple[int, ...] = ()
    offered_by_depth: tuple[int, ...] = ()

    def with_earlier(self, cost: Cost) -> Usage:
        """Of a request that went on here after verifiers were lost on which it took `cost`."""
        total = Cost(self.steps, self.drafted, self.accepted) + cost
        return replace(self, **asdict(total))


@dataclass(frozen=True, slots=True)
class Progress:
    handle: int
    from_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    cost: Cost = Cost()
    rounds: tuple[Round, ...] = ()


@dataclass(frozen=True, slots=True)
class Completed:
    handle: int
    finish: FinishReason
    usage: Usage = field(default_factory=Usage)
    stop_characters: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    handle: int
    error: TreecastError


VerifierFrame = Attach | Commit | Detach
SpeculatorFrame = Draft | NeedSync | Refused
RouterFrame = Start | Cancel | Forget
ServingFrame = Progress | Completed | Failed


class BadFrame(InvalidFrame):
    """A frame of one session that must not be acted on; the stream and its neighbours go on.

    Attributes:
        handle: the session that it names.
        cause: what is wrong, in its own type: `InvalidTree`, `InvalidRequest`, ...
    """

    def __init__(self, handle: int, cause: TreecastError) -> None:
        super().__init__(cause.message)
        self.handle = handle
        self.cause = cause
