"""Our side of a peer's process: transformers in our own Python, others in one of theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from treecast.checkpoints import DEFAULT_TARGET, default_cache_dir
from treecast.default_target import find_gguf
from treecast.errors import InvalidRequest, TreecastError
from treecast.services.local import MeshSettings

from .run import Answer, Prompts, Run


@dataclass(frozen=True, slots=True)
class PeerKind:
    """Another engine.

    Attributes:
        script: in the folder `peers`; runs in the Python that has its package.
        takes_gguf: whether it reads a GGUF file rather than a folder as transformers does.
        batches: whether it answers several prompts at once.
    """

    script: str
    takes_gguf: bool
    batches: bool


PEERS = {
    "vllm": PeerKind("vllm_peer.py", takes_gguf=False, batches=True),
    "openvino": PeerKind("openvino_genai_peer.py", takes_gguf=True, batches=True),
    "llama_cpp": PeerKind("llama_cpp_peer.py", takes_gguf=True, batches=False),
}


PEER_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class PeerChoice:
    """A peer to run.

    Attributes:
        python: the interpreter that has its package.
        model: its weights; None for those of the mesh's model.
        dtype: its weights and activations; None for the mesh's.
    """

    name: str
    python: str
    model: str | None = None
    dtype: str | None = None

    @classmethod
    def parse(
        cls, peers: Sequence[str], models: Sequence[str], dtypes: Sequence[str] = ()
    ) -> list[PeerChoice]:
        """Of NAME=PYTHON, NAME=MODEL and NAME=DTYPE.

        Raises:
            InvalidRequest: an unknown name, one given twice, another type, or a model or type of
                no peer.
        """
        pythons, paths, types = (
            _by_name(*each)
            for each in (("--peer", peers), ("--peer-model", models), ("--peer-dtype", dtypes))
        )
        for flag, given in (("--peer-model", paths), ("--peer-dtype", types)):
            if idle := [name for name in given if name not in pythons]:
                raise InvalidRequest(f"{flag} names {idle[0]}, which no --peer names")
        for name, dtype in types.items():
            if dtype not in PEER_DTYPES:
                known = " or ".join(PEER_DTYPES)
                raise InvalidRequest(f"--peer-dtype is '{name}={dtype}'; the type is {known}")
        return [
            cls(name, python, paths.get(name), types.get(name)) for name, python in pythons.items()
        ]

    @property
    def batches(self) -> bool:
        """Whether it answers several prompts at once."""
        return PEERS[self.name].batches

    def process(self, settings: MeshSettings, at_once: int = 1) -> PeerProcess:
        """The process that will run it on what the mesh runs on.

        Args:
            at_once: most prompts at once; one that does not batch is only asked one by one.
        Raises:
            InvalidRequest: it reads GGUF files, and none is known for the model.
        """
        kind = PEERS[self.name]
        model = self.model or (gguf_of(settings, self.name) if kind.takes_gguf else settings.model)
        script = Path(__file__).resolve().parent / "peers" / kind.script
        threads = settings.torch_threads
        dtype = self.dtype or settings.dtype
        flags = ["--model", model, "--dtype", dtype, "--threads", str(threads)]
        flags += ["--at-once", str(at_once if kind.batches else 1)]
        return PeerProcess(self.name, [self.python, str(script), *flags], threads)


def gguf_of(settings: MeshSettings, name: str) -> str:
    """The file that the default model was made of.

    Raises:
        InvalidRequest: another model is served.
    """
    if Path(settings.model) != default_cache_dir() / DEFAULT_TARGET:
        raise InvalidRequest(
            f"--peer {name} reads GGUF files; name one with the weights of {settings.model}: "
            f"--peer-model {name}=FILE.gguf"
        )
    return str(find_gguf(default_cache_dir(), lambda text: None))


def _by_name(flag: str, items: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in PEERS or not value or name in found:
            raise InvalidRequest(
                f"{flag} is {item!r}; NAME=PATH, each name once, of {', '.join(PEERS)}"
            )
        found[name] = value
    return found


class PeerProcess:
    """A process that runs another engine; a context manager. It computes only while it is asked."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self._name = name
        self._command = list(command)
        self._threads = threads
        self.versions: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Start the process and wait until its models are loaded.

        Raises:
            TreecastError: it cannot be started, lacks the peer's package, or ended.
        """
        with ExitStack() as opened:
            self._errors = opened.enter_context(tempfile.TemporaryFile())
            self._process = self._start()
            opened.callback(self._end)
            self.versions = self._read()
            if self.versions.pop("event") == "missing":
                raise TreecastError(
                    f"peer {self._name} needs the package {self.versions['package']}, which "
                    f"{self._command[0]} lacks: {self.versions['error']}"
                )
            self._opened = opened.pop_all()
        return self

    def _start(self) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
            )
        except OSError as error:
            raise TreecastError(
                f"peer {self._name} cannot be run by {self._command[0]}: {error.strerror}"
            ) from error

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def encode(self, text: str) -> list[int]:
        """Token ids of a chat with one user turn."""
        return list(self._ask({"encode": text})["prompt_ids"])

    def answer(
        self, mode: str, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> dict[str, Any]:
        """Prompts asked at once: for each its `token_ids` and `steps`; `seconds` and `first_s`."""
        asked = [list(prompt_ids) for prompt_ids in prompts]
        return self._ask({"mode": mode, "prompts": asked, "max_tokens": max_tokens})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        return dict(json.loads(line))

    def _gone(self) -> TreecastError:
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()[-10:]
        ending = "\n".join(said)
        return TreecastError(f"peer {self._name} ended with status {status}:\n{ending}")


def transformers_peer(settings: MeshSettings) -> PeerProcess:
    """That of transformers in our own Python, with the mesh's model and draft."""
    flags = {
        "--model": settings.model,
        "--draft": settings.draft,
        "--dtype": settings.dtype,
        "--device": settings.device,
        "--threads": str(settings.torch_threads),
    }
    command = [sys.executable, "-m", "treecast.bench.transformers_peer"]
    command += [part for flag in flags.items() for part in flag]
    return PeerProcess("transformers", command, settings.torch_threads)


class PeerContender:
    """A peer, or one mode of it: `generate` or `assisted` of transformers."""

    def __init__(
        self, name: str, peer: PeerProcess, mode: str = "generate", batches: bool = True
    ) -> None:
        self.name = name
        self.batches = batches
        self._peer = peer
        self._mode = mode

    def answer(self, prompts: Prompts, max_tokens: int) -> Run:
        said = self._peer.answer(self._mode, list(prompts.values()), max_tokens)
        answers = tuple(
            Answer(prompt_id, tuple(one["token_ids"]), one["steps"])
            for prompt_id, one in zip(prompts, said["answers"], strict=True)
        )
        return Run(self.name, answers, said["seconds"], said["first_s"])
