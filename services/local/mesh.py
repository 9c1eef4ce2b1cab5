"""The mesh: which processes, in which order they start and stop, and when it is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from treecast.checkpoints import DEFAULT_TARGET, default_cache_dir
from treecast.client import Client, RetryPolicy, Status, TlsFiles
from treecast.errors import Unavailable

from .certificates import make_certificates
from .folders import default_folders
from .logs import new_log_dir
from .process import MeshError, ServiceProcess, Spawner, child_environment, service_command
from .settings import (
    Flags,
    MeshSettings,
    router_flags,
    speculator_flags,
    speculator_names,
    verifier_flags,
)
from .valkey import start_valkey

REDIS_VARIABLE = "TREECAST_REDIS_URL"

_POLL_S = 0.05

ProgressFn = Callable[[str, str], None]
"""Called with the name of a process, and what it is doing now."""


class LocalMesh:
    """Valkey, speculators, verifiers and a router as child processes; a context manager.

    Every call blocks. No process outlives ours, however that ends.

    Example:
        with LocalMesh(MeshSettings()) as mesh, Client(mesh.router_address) as client:
            print(client.generate("Once upon a time").result().text)

    Attributes:
        settings: as given; once started, with the folders that "default" stood for.
        processes: by name: "valkey", "ssm", "ngram" ("ssm-0" and so on where there are several),
            "verifier-0" and so on, "router".
        log_dir: where each of them writes <name>.log.
        certificates: of a mesh with TLS, by role; "client" is what a client of it needs.
    """

    def __init__(self, settings: MeshSettings, progress: ProgressFn | None = None) -> None:
        self.settings = settings
        self.processes: dict[str, ServiceProcess] = {}
        self.redis_url = settings.redis_url or ""
        self.log_dir = settings.log_dir or new_log_dir(default_cache_dir() / "logs")
        self.certificates: dict[str, TlsFiles] = {}
        self._report = progress or (lambda name, state: None)
        self._spawner = Spawner()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def router_address(self) -> str:
        return self.processes["router"].address

    @property
    def client_files(self) -> TlsFiles:
        """What a client of it needs, whatever the environment says; none without TLS."""
        return self.certificates.get("client", TlsFiles())

    @property
    def can_serve(self) -> bool:
        """The router and a verifier run; speculators and Valkey only make things better."""
        verifiers = [p for name, p in self.processes.items() if name.startswith("verifier-")]
        return self.processes["router"].running and any(p.running for p in verifiers)

    def start(self) -> None:
        """Start everything and wait until the router sees all of it healthy.

        Raises:
            MeshError: a process ended or took too long; what had started is stopped again.
            ModelError: the default model is neither installed nor to be fetched.
        """
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes, whoever hands work to others first. Safe to call again."""
        for name in sorted(self.processes, key=_stopping_order):
            self._report(name, "stopping")
            self.processes[name].stop(self.settings.stop_grace_s)
            self._report(name, "stopped")
        self._spawner.close()

    def restart(self, name: str) -> None:
        """Start a service that has ended once more, at the same address, and wait until ready."""
        old = self.processes[name]
        bound = {"--listen": old.address, "--http-listen": old.http_address}
        command = [part for part in old.command if part.partition("=")[0] not in bound]
        self._spawn(name, [*command, *(f"{flag}={at}" for flag, at in bound.items() if at)])
        self._wait_ready([name])

    def wait_whole(self, timeout_s: float) -> None:
        """Wait until every verifier is healthy and attached to every speculator.

        Raises:
            MeshError: it did not come to that in time.
        """
        deadline = time.monotonic() + timeout_s
        missing = "the router does not answer"
        retry = RetryPolicy(attempts_to_start=1)
        with Client(self.router_address, retry, tls=self.client_files) as client:
            while time.monotonic() < deadline:
                try:
                    missing = self._missing(client.status())
                except Unavailable as error:
                    missing = error.message
                if not missing:
                    return
                time.sleep(_POLL_S)
        raise MeshError(f"the mesh was not whole within {timeout_s:g} s: {missing}")

    def _start(self) -> None:
        self.settings = settings = self._with_model_folders()
        if settings.tls:
            self.certificates = make_certificates(self.log_dir / "certificates")
        if not self.redis_url:
            self._report("valkey", "starting")
            log = self.log_dir / "valkey.log"
            self.processes["valkey"], self.redis_url = start_valkey(log, self._spawner)
            self._report("valkey", "ready")
        speculators = speculator_names(settings.speculators)
        for name, kind in speculators.items():
            self._launch(name, "speculator", speculator_flags(settings, kind))
        self._wait_ready(list(speculators))
        drafters = [self.processes[name].address for name in speculators]
        names = [f"verifier-{number}" for number in range(settings.num_verifiers)]
        for name in names:
            # One after the other: each measures its step time when it starts.
            self._launch(name, "verifier", verifier_flags(settings, drafters))
            self._wait_ready([name])
        verifiers = [self.processes[name].address for name in names]
        self._launch("router", "router", router_flags(settings, verifiers))
        self._wait_ready(["router"])
        self.wait_whole(settings.ready_timeout_s)

    def _with_model_folders(self) -> MeshSettings:
        """Unpack the defaults once, rather than in every service that needs them."""
        settings = self._with_fitting_draft()
        if settings.engine == "toy":
            return settings
        wanted = ["model"] if settings.model == "default" else []
        if settings.draft == "default" and "ssm" in settings.speculators:
            wanted.append("draft")
        made = default_folders(wanted, self.log_dir / "models.log", self._report) if wanted else {}
        return replace(
            settings,
            model=str(made.get("model", settings.model)),
            draft=str(made.get("draft", settings.draft)),
        )

    def _with_fitting_draft(self) -> MeshSettings:
        """Without `ssm` where only the default draft is there, and the model is another."""
        settings = self.settings
        ours = ("default", str(default_cache_dir() / DEFAULT_TARGET))
        if settings.engine == "toy" or settings.draft != "default" or settings.model in ours:
            return settings
        self._report("ssm", "left out, since the default draft does not fit another model")
        return replace(settings, speculators=tuple(s for s in settings.speculators if s != "ssm"))

    def _launch(self, name: str, role: str, flags: Flags) -> None:
        files = self.certificates.get(role, TlsFiles())
        tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}
        self._spawn(name, service_command(role, {**tls, **flags}))

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        self._report(name, "starting")
        # Not by a flag, which everybody on the machine could read: it may hold a password.
        environment = child_environment({REDIS_VARIABLE: self.redis_url})
        log = self.log_dir / f"{name}.log"
        self.processes[name] = ServiceProcess(name, command, environment, log, self._spawner)

    def _wait_ready(self, names: Sequence[str]) -> None:
        for name in names:
            self.processes[name].wait_ready(self.settings.ready_timeout_s)
            self._report(name, "ready")

    def _missing(self, status: Status) -> str:
        """What the router does not see yet; empty when all is there."""
        healthy = [verifier for verifier in status.verifiers if verifier.healthy]
        wanted = self.settings.num_verifiers
        if len(healthy) < wanted:
            return f"the router sees {len(healthy)} of {wanted} verifiers healthy"
        drafters = len(self.settings.speculators)
        for verifier in healthy:
            if (seen := len(verifier.speculators)) < drafters:
                return f"verifier {verifier.address} sees {seen} of {drafters} speculators"
        return ""


def _stopping_order(name: str) -> tuple[int, str]:
    """Router, verifiers, speculators, Valkey."""
    role = name.partition("-")[0]
    return {"router": 0, "verifier": 1, "valkey": 3}.get(role, 2), name
