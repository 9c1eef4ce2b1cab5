"""TLS on every hop: who gets in, who does not, and certificates replaced under running streams."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest

from treecast import AsyncClient
from treecast.client import RetryPolicy
from treecast.errors import PeerMismatch, PermissionDenied, SettingsError, Unavailable
from treecast.services.local.certificates import Authority, make_certificates
from treecast.services.router.keys import entry_of
from treecast.v1 import speculator_pb2_grpc, verifier_pb2, verifier_pb2_grpc
from treecast.wire.channel import open_channel
from treecast.wire.dialer import Dialer
from treecast.wire.frames import Heartbeat, Hello, Role
from treecast.wire.hop import SPECULATE
from treecast.wire.status import from_rpc_error
from treecast.wire.tls import Tls, TlsFiles

from .pair_rig import VERIFIER, Recorder, problem_of
from .toy_mesh import GREEDY, PROMPT, Mesh, toy_mesh

ONCE = RetryPolicy(attempts_to_start=1)
SLOW = {"toy_step_s": 0.01}


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, TlsFiles]:
    return make_certificates(tmp_path / "certificates")


@pytest.fixture
async def mesh(certificates: dict[str, TlsFiles]) -> AsyncIterator[Mesh]:
    async with toy_mesh(certificates) as mesh:
        yield mesh


async def ask(client: AsyncClient) -> tuple[int, ...]:
    async with client:
        return (await client.generate(PROMPT, GREEDY).result()).token_ids


async def test_mesh_serves_over_tls_with_trees(mesh: Mesh) -> None:
    async with mesh.client() as client:
        result = await client.generate([1, 2, 3] * 8, GREEDY).result()
        assert result.usage.drafted > 0
        assert (await client.status()).verifiers[0].speculators
    async with toy_mesh() as plain:
        assert await ask(plain.client()) == await ask(mesh.client())


async def test_client_is_not_answered_when_its_authority_is_another(
    mesh: Mesh, tmp_path: Path
) -> None:
    others = make_certificates(tmp_path / "others")
    with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await ask(mesh.client(tls=others["client"], retry=ONCE))
    ours = mesh.certificates["client"]
    mixed = TlsFiles(others["client"].cert, others["client"].key, ours.ca)
    with pytest.raises(Unavailable):
        await ask(mesh.client(tls=mixed, retry=ONCE))


async def test_client_is_not_answered_without_a_certificate(mesh: Mesh) -> None:
    for tls in (TlsFiles(ca=mesh.certificates["client"].ca), None):
        with pytest.raises(Unavailable):
            await ask(AsyncClient(mesh.address, ONCE, tls=tls))


async def test_clients_need_no_certificate_where_any_may_call(
    certificates: dict[str, TlsFiles],
) -> None:
    keys = entry_of("tc_key", "acme", {})
    async with toy_mesh(certificates, tls_clients="any", api_keys=keys) as mesh:
        tls = TlsFiles(ca=certificates["client"].ca)
        assert await ask(AsyncClient(mesh.address, ONCE, tls=tls, api_key="tc_key"))


async def test_worker_cannot_pass_for_a_router(mesh: Mesh) -> None:
    """A client sends its prompt and key to nobody whose certificate has not the router's name."""
    ours = mesh.certificates["client"]
    for address in (mesh.verifiers[0].address, mesh.speculators[0]):
        with pytest.raises(Unavailable, match="Hostname Verification Check failed"):
            await ask(AsyncClient(address, ONCE, tls=ours))


WORKER_CALLS = {
    "treecast.v1.VerifierService": "router",
    "treecast.v1.SpeculatorService": "verifier",
}


async def reach_workers(mesh: Mesh, tls: Tls | None) -> list[str]:
    """What becomes of calls for a worker's RPCs: the error, or nothing."""
    verifier = open_channel(mesh.verifiers[0].address, tls=tls, peer_role="verifier")
    speculator = open_channel(mesh.speculators[0], tls=tls, peer_role="speculator")
    async with verifier, speculator:
        stub: Any = verifier_pb2_grpc.VerifierServiceStub(verifier)
        calls = [
            stub.GetTokenizer(verifier_pb2.GetTokenizerRequest(), timeout=5),
            stub.Drain(verifier_pb2.VerifierServiceDrainRequest(), timeout=5),
            stub.Resume(verifier_pb2.VerifierServiceResumeRequest(), timeout=5),
            first_of(stub.Serve(timeout=5)),
            first_of(speculator_pb2_grpc.SpeculatorServiceStub(speculator).Speculate(timeout=5)),
        ]
        ended = await asyncio.gather(*calls, return_exceptions=True)
    return [
        from_rpc_error(each).message if isinstance(each, grpc.RpcError) else "" for each in ended
    ]


async def first_of(call: Any) -> None:
    """A peer that says nothing is told so after 2 s: then it got in."""
    try:
        await call.read()
    except grpc.aio.AioRpcError as error:
        if "no hello" not in str(error.details()):
            raise


@pytest.mark.parametrize("role", ["client", "speculator"])
async def test_worker_rpcs_are_refused_by_name_when_a_stranger_calls(mesh: Mesh, role: str) -> None:
    def refusal(service: str) -> str:
        wanted = WORKER_CALLS[f"treecast.v1.{service}"]
        theirs = f"the caller's certificate is of role {role}"
        return f"treecast.v1.{service} is for role {wanted}; {theirs}"

    ended = await reach_workers(mesh, Tls(mesh.certificates[role]))
    assert ended == [refusal("VerifierService")] * 4 + [refusal("SpeculatorService")]


async def test_worker_rpcs_are_open_without_certificates() -> None:
    """The negative control: it is the certificates that keep strangers out."""
    async with toy_mesh() as mesh:
        assert await reach_workers(mesh, None) == [""] * 5


async def test_workers_do_not_call_the_router(mesh: Mesh) -> None:
    with pytest.raises(PermissionDenied, match=r"RouterService is for role client; the caller's"):
        await ask(mesh.client(tls=mesh.certificates["speculator"]))


async def test_speculator_is_refused_by_name_under_another_roles_certificate(
    mesh: Mesh, certificates: dict[str, TlsFiles]
) -> None:
    """What a process says in its hello does not count where its certificate says otherwise."""
    tls = Tls(certificates["verifier"])
    impostor = mesh.verifiers[0].address
    dialer: Dialer[Any, Any] = Dialer(
        impostor, SPECULATE, lambda: VERIFIER, Heartbeat, Recorder(), tls=tls
    )
    dialer.start()
    try:
        problem = await problem_of(dialer)
    finally:
        await dialer.close()
    assert isinstance(problem, PeerMismatch)
    assert problem.message == (
        f"certificate of {impostor} is no speculator's; expected speculator.treecast"
    )


async def test_verifier_is_refused_under_a_clients_certificate(
    mesh: Mesh, certificates: dict[str, TlsFiles]
) -> None:
    tls, hello = Tls(certificates["client"]), Hello("v", Role.VERIFIER)
    recorder = Recorder()
    dialer: Dialer[Any, Any] = Dialer(
        mesh.speculators[0], SPECULATE, lambda: hello, Heartbeat, recorder, tls=tls
    )
    dialer.start()
    try:
        problem = await problem_of(dialer)
    finally:
        await dialer.close()
    assert isinstance(problem, PermissionDenied)
    assert recorder.events == []


# --- rotation -----------------------------------------------------------------------------------


async def shown_by(address: str, files: TlsFiles) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(str(files.cert), files.key)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return bytes(shown)


def der(path: Path | None) -> bytes:
    assert path is not None
    return ssl.PEM_cert_to_DER_cert(path.read_text())


async def test_streams_go_on_and_new_connections_change_when_certificates_rotate(
    tmp_path: Path,
) -> None:
    folder, authority = tmp_path, Authority.make()

    def issue_all() -> dict[str, TlsFiles]:
        roles = ("router", "verifier", "speculator", "client")
        return {role: authority.issue(folder, role) for role in roles}

    files = issue_all()
    async with toy_mesh(files, verifiers=SLOW) as mesh, mesh.client() as client:
        [link] = [verifier.link for verifier in mesh.router.fleet.verifiers]
        places = {"router": mesh.address, "verifier": mesh.verifiers[0].address}
        places["speculator"] = mesh.speculators[0]
        before = {role: der(files[role].cert) for role in places}
        stream = client.generate(PROMPT, GREEDY, max_nodes=0)
        chunks = [await anext(stream) for _ in range(3)]
        issue_all()
        for role, address in places.items():
            shown = await shown_by(address, files["client"])
            assert shown == der(files[role].cert) != before[role]
        assert await ask(mesh.client())  # by a client that read the new files
        chunks += [chunk async for chunk in stream]
        result = await stream.result()
        assert (result.resumes, result.samples[0].placements) == (0, 1)
        assert [token for chunk in chunks for token in chunk.token_ids] == list(result.token_ids)
        assert mesh.router.fleet.verifiers[0].link is link
        assert link is not None
        assert link.alive


async def test_open_client_takes_up_a_new_certificate_for_its_next_call(tmp_path: Path) -> None:
    """Old certificates expire: a client that lives long must come to show the new ones."""
    authority = Authority.make()
    files = {role: authority.issue(tmp_path, role) for role in ("router", "verifier", "client")}
    files["speculator"] = authority.issue(tmp_path, "speculator")
    async with toy_mesh(files) as mesh, mesh.client() as client:
        first = client._routers.channel(mesh.address)
        assert await client.status()
        assert client._routers.channel(mesh.address) is first
        authority.issue(tmp_path, "client")
        assert await client.status()
        assert client._routers.channel(mesh.address) is not first


async def test_authority_changes_without_a_gap_when_both_are_trusted_meanwhile(
    tmp_path: Path,
) -> None:
    """As docs/security.md says: trust both, rotate, trust the new one alone."""
    old, new = Authority.make(), Authority.make()
    roles = ("router", "verifier", "speculator", "client")
    files = {role: old.issue(tmp_path, role) for role in roles}
    async with toy_mesh(files, verifiers=SLOW) as mesh, mesh.client() as client:
        stream = client.generate(PROMPT, GREEDY)
        await anext(stream)
        ca = tmp_path / "ca.pem"
        both = ca.read_bytes()
        (tmp_path / "new").mkdir()
        for role in roles:
            new.issue(tmp_path / "new", role)
        both += (tmp_path / "new" / "ca.pem").read_bytes()
        write(ca, both)
        assert await ask(mesh.client())
        for role in roles:
            for end in ("key", "pem"):
                write(tmp_path / f"{role}.{end}", (tmp_path / "new" / f"{role}.{end}").read_bytes())
        assert await ask(mesh.client())
        write(ca, (tmp_path / "new" / "ca.pem").read_bytes())
        assert await ask(mesh.client())
        assert (await stream.result()).samples[0].placements == 1
        (tmp_path / "late").mkdir()
        late = old.issue(tmp_path / "late", "client")
        with pytest.raises(Unavailable):
            await ask(mesh.client(tls=TlsFiles(late.cert, late.key, ca), retry=ONCE))


def write(path: Path, content: bytes) -> None:
    new = path.with_suffix(".tmp")
    new.write_bytes(content)
    os.replace(new, path)


def test_last_good_files_are_used_while_key_and_certificate_do_not_fit(tmp_path: Path) -> None:
    authority = Authority.make()
    files = authority.issue(tmp_path, "router")
    tls = Tls(files)
    first = tls.refreshed()
    assert files.key is not None
    good = files.key.read_bytes()
    write(files.key, b"half a key")
    assert tls.refreshed() is first
    files.key.unlink()
    assert tls.refreshed() is first
    authority.issue(tmp_path, "router")
    assert tls.refreshed().key not in (None, good)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (TlsFiles(ca=Path("/nowhere/ca.pem")), "TLS file cannot be read: .*No such file"),
        (TlsFiles(ca=Path(__file__)), "TLS files None, None and .* do not fit"),
    ],
)
def test_start_is_refused_when_files_are_bad(files: TlsFiles, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Tls(files)


def test_certificate_and_key_are_given_together() -> None:
    with pytest.raises(
        SettingsError, match=re.escape("tls_cert and tls_key must be given together")
    ):
        TlsFiles(cert=Path("a.pem"))


def test_server_is_refused_without_a_certificate(tmp_path: Path) -> None:
    ca = make_certificates(tmp_path)["client"].ca
    with pytest.raises(SettingsError, match="tls_ca is given without tls_cert"):
        Tls(TlsFiles(ca=ca)).server_credentials()


# --- the HTTP edge ------------------------------------------------------------------------------


def http_client(mesh: Mesh, files: TlsFiles) -> httpx2.AsyncClient:
    """A caller that trusts the mesh's authority, and shows a certificate if it has one."""
    context = ssl.create_default_context(cafile=str(files.ca))
    if files.cert is not None:
        context.load_cert_chain(files.cert, files.key)
    address = mesh.router.presence.further["http"]
    return httpx2.AsyncClient(base_url=f"https://{address}", verify=context, timeout=30)


async def test_http_edge_speaks_tls_when_the_services_do(
    certificates: dict[str, TlsFiles], tmp_path: Path
) -> None:
    files = certificates["client"]
    async with toy_mesh(certificates, http_listen="127.0.0.1:0") as mesh:
        async with http_client(mesh, files) as client:
            assert (await client.get("/v1/models")).json()["data"]
        async with http_client(mesh, TlsFiles(ca=files.ca)) as stranger:
            with pytest.raises(httpx2.TransportError):
                await stranger.get("/v1/models")
        address = mesh.router.presence.further["http"]
        async with httpx2.AsyncClient(base_url=f"http://{address}") as in_the_clear:
            with pytest.raises(httpx2.TransportError):
                await in_the_clear.get("/v1/models")


async def test_http_edge_shows_the_new_certificate_when_it_was_rotated(tmp_path: Path) -> None:
    authority = Authority.make()
    roles = ("router", "verifier", "speculator", "client")
    files = {role: authority.issue(tmp_path, role) for role in roles}
    async with toy_mesh(files, http_listen="127.0.0.1:0", tls_clients="any") as mesh:
        address = mesh.router.presence.further["http"]
        before = await shown_by(address, files["client"])
        authority.issue(tmp_path, "router")
        shown = await shown_by(address, files["client"])
        assert shown == der(files["router"].cert) != before
