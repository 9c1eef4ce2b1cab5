"""Settings of a speculator."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from treecast.drafting.growth import FORM, parse_growth
from treecast.errors import InvalidRequest
from treecast.settings import ModelSettings, Numerics, split_commas
from treecast.tree import MAX_PROPOSERS

KINDS = ("ssm", "ngram", "suffix")


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """One drafter to make.

    Attributes:
        name: unique in the pod: the kind, with a number where there are several of one.
        model: its model's folder; empty for the setting `model`, and for lookups.
    """

    kind: str
    name: str
    model: str = ""


def _check_drafter(text: str) -> str:
    kind, given, model = text.partition("=")
    if kind not in KINDS:
        raise ValueError(f"drafter is {kind!r}; it must be one of {', '.join(KINDS)}")
    if given and (kind != "ssm" or not model):
        raise ValueError("a model's folder is given as ssm=FOLDER")
    return text


Drafters = Annotated[
    tuple[Annotated[str, AfterValidator(_check_drafter)], ...],
    NoDecode,
    BeforeValidator(split_commas),
    Field(min_length=1, max_length=MAX_PROPOSERS),
]


class SpeculatorSettings(ModelSettings):
    """Guess token trees for verifiers."""

    model_config = SettingsConfigDict(cli_shortcuts={"drafters": "drafter"})

    drafters: Drafters = Field(
        ("ssm",),
        description="ssm (a draft model; ssm=FOLDER for another than --model), ngram (lookup of "
        "what came lately) and suffix (lookup by counts); any number of them are merged",
    )
    model: str = Field(
        "default", description="draft model's folder; 'default' and 'default-2' ship"
    )
    drafts_root: Path | None = Field(
        None,
        description="offer `treecast reload` to whoever reaches this port (with certificates: to "
        "clients), for drafts below this folder; unset: SIGHUP alone has the drafts' own folders "
        "read again. While one is loaded there are two in memory, each with its KV pool",
    )
    numerics: Numerics = Field(
        "fast", description="of the draft's passes; trees need no exact bits"
    )
    torch_threads: int = Field(2, ge=1, description="threads of the draft's passes")
    pool_tokens: int = Field(65536, ge=256, description="the draft's KV pool size in tokens")
    growth: str = Field(
        "best-first", description=f"best-first, {FORM}, or widths by level such as <1,1,3>"
    )
    draft_threads: Literal["one", "each"] = Field(
        "one",
        description="one: draft models take turns, as on shared cores; each: side by side, for "
        "models with devices of their own",
    )
    suffix_memory: int = Field(
        0,
        ge=0,
        description="tokens of ended outputs that suffix proposes to all sessions; 0: a session's "
        "text is proposed to that session alone",
    )

    capacity: int = Field(32, ge=1, description="sessions that each verifier may attach")
    max_sessions: int = Field(128, ge=1, description="sessions of all verifiers together")
    shares_cores: bool = Field(
        True, description="drafting and verifying take turns on the same cores: no run-ahead"
    )
    ahead_nodes: int = Field(
        64, ge=0, le=256, description="nodes that run-ahead grows a session's tree to"
    )
    drain_s: float = Field(5.0, ge=0, description="time for sessions to end when stopping")

    @field_validator("growth")
    @classmethod
    def _check_growth(cls, text: str) -> str:
        try:
            parse_growth(text)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
        return text

    @property
    def specs(self) -> tuple[DrafterSpec, ...]:
        """The drafters to make, in order, named."""
        pairs = [text.partition("=")[::2] for text in self.drafters]
        kinds = [kind for kind, _ in pairs]
        numbers: dict[str, itertools.count[int]] = {kind: itertools.count() for kind in kinds}
        return tuple(
            DrafterSpec(
                kind, kind if kinds.count(kind) == 1 else f"{kind}-{next(numbers[kind])}", model
            )
            for kind, model in pairs
        )

    @property
    def run_ahead_nodes(self) -> int:
        """Nodes to run ahead to; 0 on shared cores."""
        return 0 if self.shares_cores else self.ahead_nodes
