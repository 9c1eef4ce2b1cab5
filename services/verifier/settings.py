"""Settings of a verifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_settings import NoDecode

from treecast.adapter import MAX_ADAPTERS, NAME_FORM, is_adapter_name
from treecast.engine.sharding.shape import GroupShape
from treecast.sampling.params import Law
from treecast.settings import POOL_TOKENS, KVDType, ModelSettings, Numerics, split_commas
from treecast.wire.registry import Addresses


def _check_adapters(given: tuple[str, ...]) -> tuple[str, ...]:
    names = [text.partition("=")[0] for text in given]
    for name, text in zip(names, given, strict=True):
        if not is_adapter_name(name) or not text.partition("=")[2]:
            raise ValueError(f"{text!r} is not NAME=FOLDER; a name has {NAME_FORM}")
        if names.count(name) > 1:
            raise ValueError(f"adapter {name!r} is given {names.count(name)} times")
    return given


def _leaves_rows_for_prompts(max_rows: int, given: ValidationInfo) -> int:
    max_running = given.data.get("max_running")
    if max_running is not None and max_rows <= max_running:
        raise ValueError(f"it must exceed --max-running, {max_running}, or no prompt has its turn")
    return max_rows


AdapterFolders = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(split_commas),
    AfterValidator(_check_adapters),
    Field(max_length=MAX_ADAPTERS),
]


class VerifierSettings(ModelSettings):
    """Hold the LLM and verify token trees against it."""

    model: str = Field(
        "default",
        description="model folder, or a GGUF file, which is converted into the cache once; "
        "'default' is SmolLM2-135M-Instruct",
    )
    adapters: AdapterFolders = Field(
        (),
        description="LoRA adapters in peft's folders, as NAME=FOLDER, at most 32 of rank 256 or "
        "less; a request names one, and rows of all of them are computed in one step. They stay in "
        "memory: rank x (inputs + outputs) of each layer that they change",
    )
    numerics: Numerics = Field(
        "exact", description="exact: bits do not depend on tree or batch; fast: free to reorder"
    )
    torch_threads: int = Field(
        2, ge=1, description="threads of the forward pass, of all ranks on this host together"
    )
    tp: int = Field(
        1, ge=1, description="ranks that divide each layer; must divide the model's KV heads"
    )
    pp: int = Field(1, ge=1, description="stages that divide the layers, of --tp ranks each")
    rendezvous: str = Field(
        "env://",
        description="where the ranks of a group meet, as torch's init_method; only with RANK and "
        "WORLD_SIZE in the environment: without them the ranks are started here",
    )
    rank_timeout_s: float = Field(
        10, gt=0, description="a rank that does not answer for so long ends its group"
    )
    pool_tokens: Annotated[int, Field(ge=256)] | Literal["auto"] = Field(
        POOL_TOKENS,
        description="KV pool size in tokens; auto: what fits into the memory that weights leave, "
        "of a GPU nine tenths of it, of the host half",
    )
    swap_gib: float = Field(
        1,
        ge=0,
        description="host memory for the KV of paused requests, in GiB, of all ranks of a group "
        "together; what does not fit is dropped and computed again. 0: none",
    )
    swap_dtype: Literal["same", "int8"] = Field(
        "same",
        description="what that KV is kept as; int8 takes half or a quarter of the room and is "
        "LOSSY: a request that was swapped out may go on with another text. Needs --numerics fast",
    )
    kv_dtype: KVDType = Field(
        "auto",
        description="what keys and values are kept in; auto: what attention computes in; int8 (a "
        "scale per position and head) and fp8 (e4m3) lose bits, of every text alike: trees change "
        "no token under them; others than auto with --device cpu only",
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        "none",
        description="where the layers are kept that --device-memory has no room for; they are "
        "moved to the device for each pass, which costs the same for one row or a whole tree; "
        "cpu: in the host's memory, for a GPU; disk: in a scratch file",
    )
    device_memory: float | None = Field(
        None,
        gt=0,
        description="with --offload: GiB of the device (with --device cpu, of the host's memory) "
        "that weights may take, buffers included; unset: what is free and the KV pool leaves",
    )
    offload_folder: Path | None = Field(
        None,
        description="where --offload disk makes its scratch file, which is as large as the layers "
        "and gone with the process; unset: the folder of model caches",
    )

    speculators: Addresses = Field((), description="addresses of speculators, or dns:///name:port")
    speculators_per_session: int = Field(2, ge=0, le=4, description="how many draft one session")
    trusted_speculators: Addresses = Field(
        (),
        description="addresses, as dialled, of speculators whose draws are believed, or all; law "
        "mss is served with these, and not at all without",
    )
    policy: Literal["tree", "spin", "vote"] = Field(
        "tree",
        description="tree: verify the union of all drafts; spin: each request's best speculator "
        "alone drafts it; vote: a weighted majority makes one chain of all drafts",
    )
    reassign_steps: int = Field(
        16, ge=1, description="spin: steps between two decisions about who drafts which request"
    )
    planner: Literal["goodput", "full"] = Field(
        "goodput",
        description="goodput: wait for trees and verify their nodes while that pays in tokens per "
        "second; full: always, which saves most passes of the LLM",
    )
    max_running: int = Field(32, ge=1, description="requests in one step at most")
    max_waiting: int = Field(256, ge=0, description="requests waiting or paused at most")
    schedule: Literal["fcfs", "length"] = Field(
        "fcfs",
        description="whose turn it is. fcfs: in order of arrival; who runs is paused only when KV "
        "pages run out, the youngest first. length: higher priority, then the shortest expected "
        "rest goes first, and takes the slot of a running one that needs at least twice as long",
    )
    aging_s: float = Field(
        30,
        gt=0,
        description="length: a request that has not run for so long in all goes before those that "
        "have, until it ends",
    )
    max_nodes: int = Field(24, ge=0, le=256, description="tree nodes of one request in one step")
    max_rows: Annotated[int, AfterValidator(_leaves_rows_for_prompts)] = Field(
        128,
        ge=2,
        validate_default=True,
        description="rows of one step: prefill chunks and trees; more than --max-running, since "
        "each running request needs one",
    )
    grammar_s: float = Field(
        10,
        gt=0,
        description="a request whose grammar is not compiled by then is refused; it is compiled "
        "beside the steps, one at a time, and the latest 64 are kept",
    )
    session_ttl_s: float = Field(600, gt=0, description="idle sessions keep their KV this long")
    drain_s: float = Field(30, ge=0, description="time to finish running requests when stopping")

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """Of the adapters, by name."""
        pairs = (text.partition("=") for text in self.adapters)
        return {name: Path(folder) for name, _, folder in pairs}

    @property
    def group(self) -> GroupShape:
        """How the model is divided."""
        return GroupShape(self.tp, self.pp)

    @property
    def capacity(self) -> int:
        """Requests that one router sends at most: by length twice what runs, to choose from."""
        further = min(self.max_running, self.max_waiting) if self.schedule == "length" else 0
        return self.max_running + further

    @property
    def laws(self) -> tuple[Law, ...]:
        """Laws served; `mss` only where somebody's draws are trusted."""
        return tuple(Law) if self.trusted_speculators else (Law.REPLAY,)
