"""Settings of a speculator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from treecast.drafting.growth import parse_growth
from treecast.errors import InvalidRequest
from treecast.settings import ServiceSettings, split_commas

DrafterKinds = Annotated[
    tuple[Literal["ssm", "ngram"], ...],
    NoDecode,
    BeforeValidator(split_commas),
    Field(min_length=1),
]


class SpeculatorSettings(ServiceSettings):
    """Guess token trees for verifiers."""

    model_config = SettingsConfigDict(cli_shortcuts={"drafters": "drafter"})

    drafters: DrafterKinds = Field(
        ("ssm",), description="ssm (a draft model) and ngram (lookup); several are merged"
    )
    engine: Literal["hf", "toy"] = Field("hf", description="hf: a real model; toy: for tests")
    model: str = Field("default", description="draft model's folder; 'default' is the one shipped")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="weights and activations")
    numerics: Literal["exact", "fast", "oracle"] = Field(
        "fast", description="of the draft's passes; trees need no exact bits"
    )
    torch_threads: int = Field(2, ge=1, description="threads of the draft's passes")
    pool_tokens: int = Field(65536, ge=256, description="the draft's KV pool size in tokens")
    growth: str = Field("best-first", description="best-first, or widths by level such as <1,1,3>")

    capacity: int = Field(32, ge=1, description="sessions that each verifier may attach")
    max_sessions: int = Field(128, ge=1, description="sessions of all verifiers together")
    shares_cores: bool = Field(
        True, description="drafting and verifying take turns on the same cores: no run-ahead"
    )
    ahead_nodes: int = Field(
        64, ge=0, le=256, description="nodes that run-ahead grows a session's tree to"
    )
    drain_s: float = Field(5.0, ge=0, description="time for sessions to end when stopping")
    toy_step_s: float = Field(0.0, ge=0, description="toy engine: seconds that one pass takes")

    @field_validator("growth")
    @classmethod
    def _check_growth(cls, text: str) -> str:
        try:
            parse_growth(text)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
        return text

    @property
    def run_ahead_nodes(self) -> int:
        """Nodes to run ahead to; 0 on shared cores."""
        return 0 if self.shares_cores else self.ahead_nodes
