"""Our side of the transformers process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from treecast.errors import TreecastError
from treecast.services.local import MeshSettings

from .run import Run


class TransformersPeer:
    """A process that runs transformers; a context manager. It computes only while it is asked."""

    def __init__(self, settings: MeshSettings) -> None:
        self._settings = settings
        self.versions: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Start the process and wait until its models are loaded."""
        settings, threads = self._settings, str(self._settings.torch_threads)
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "treecast.bench.transformers_peer"),
                *("--model", settings.model, "--draft", settings.draft),
                *("--dtype", settings.dtype, "--device", settings.device),
                *("--threads", threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )
        self.versions = self._read()
        del self.versions["event"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def encode(self, text: str) -> list[int]:
        """Token ids of a chat with one user turn."""
        return list(self._ask({"encode": text})["prompt_ids"])

    def answer(self, mode: str, prompt_ids: Sequence[int], max_tokens: int) -> dict[str, Any]:
        request = {"mode": mode, "prompt_ids": list(prompt_ids), "max_tokens": max_tokens}
        return self._ask(request)

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
        return TreecastError(f"the transformers process ended with status {status}:\n{ending}")


class PeerContender:
    """`generate` or `assisted` of the transformers process."""

    def __init__(self, name: str, peer: TransformersPeer, mode: str) -> None:
        self.name = name
        self._peer = peer
        self._mode = mode

    def answer(self, prompt_id: str, prompt_ids: Sequence[int], max_tokens: int) -> Run:
        said = self._peer.answer(self._mode, prompt_ids, max_tokens)
        return Run(
            self.name,
            prompt_id,
            tuple(said["token_ids"]),
            said["steps"],
            said["seconds"],
            said["first_s"],
        )
