"""The one table between errors and gRPC statuses."""

from __future__ import annotations

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from structlog.testing import capture_logs

from treecast import errors
from treecast.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidFrame,
    InvalidRequest,
    InvalidTree,
    NotServed,
    Overloaded,
    PeerMismatch,
    PermissionDenied,
    PromptTooLong,
    RetryableError,
    TreecastError,
    Unauthenticated,
    Unavailable,
)
from treecast.wire.frames import BadFrame
from treecast.wire.status import abort, code_of, from_rpc_error, from_rpc_status, to_rpc_status

ALL_ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, TreecastError) and kind is not RetryableError
]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_error_keeps_type_and_message_when_it_crosses(kind: type[TreecastError]) -> None:
    status = Status.FromString(to_rpc_status(kind("what, value, bound")).SerializeToString())
    back = from_rpc_status(status)
    assert type(back) is kind
    assert back.message == "what, value, bound"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (PromptTooLong("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotServed("x"), grpc.StatusCode.NOT_FOUND),
        (PeerMismatch("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (Cancelled("x"), grpc.StatusCode.CANCELLED),
        (DeadlineExceeded("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Overloaded("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("x"), grpc.StatusCode.UNAVAILABLE),
        (RetryableError("x"), grpc.StatusCode.UNAVAILABLE),
        (TreecastError("x"), grpc.StatusCode.INTERNAL),
        (InvalidFrame("x"), grpc.StatusCode.INTERNAL),
        (KeyError("x"), grpc.StatusCode.INTERNAL),
        (BadFrame(1, InvalidRequest("x")), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_code_is_the_tables_when_asked(error: BaseException, code: grpc.StatusCode) -> None:
    assert code_of(error) is code
    assert to_rpc_status(error).code == code.value[0]


def test_reasons_are_unique_but_for_one_when_listed() -> None:
    reasons = [kind.reason for kind in ALL_ERRORS]
    assert sorted(reasons) == sorted(set(reasons))


def test_subclass_takes_its_bases_code_when_not_in_the_table() -> None:
    class Odd(InvalidRequest):
        pass

    assert code_of(Odd("x")) is grpc.StatusCode.INVALID_ARGUMENT


def test_details_say_reason_and_delay_when_retrying_helps() -> None:
    status = to_rpc_status(Overloaded("queue has 64 requests; the limit is 64", 1.5))
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.domain, info.reason) == ("treecast", "OVERLOADED")
    assert retry.retry_delay.ToMilliseconds() == 1500
    back = from_rpc_status(status)
    assert isinstance(back, Overloaded)
    assert back.retry_after_s == 1.5


def test_no_delay_is_given_when_retrying_cannot_help() -> None:
    assert len(to_rpc_status(InvalidRequest("x")).details) == 1


def test_nothing_leaks_when_an_error_is_not_ours() -> None:
    status = to_rpc_status(ValueError("password=hunter2"))
    assert status.message == "internal error"
    assert b"hunter2" not in status.SerializeToString()


def test_cause_travels_when_a_frame_was_bad() -> None:
    status = to_rpc_status(BadFrame(7, InvalidTree("tree has 257 nodes; the limit is 256")))
    assert type(from_rpc_status(status)) is InvalidTree


def test_message_is_cut_when_it_would_not_fit_in_metadata() -> None:
    assert to_rpc_status(InvalidRequest("x" * 9000)).message == "x" * 1200
    assert to_rpc_status(InvalidRequest("x" + "é" * 9000)).message == "x" + "é" * 599


class Ended(grpc.RpcError):
    """A call that ended, as grpc presents it."""

    def __init__(self, code: grpc.StatusCode, details: str, *metadata: tuple[str, bytes]) -> None:
        super().__init__()
        self._ended = (code, details, metadata)

    def code(self) -> grpc.StatusCode:
        return self._ended[0]

    def details(self) -> str:
        return self._ended[1]

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._ended[2]


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect", Unavailable),
        (grpc.StatusCode.CANCELLED, "Locally cancelled", Cancelled),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many", Overloaded),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SERVER: Received message larger than max (9 vs. 4)",
            InvalidRequest,
        ),
        (grpc.StatusCode.INVALID_ARGUMENT, "bad", InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, "no such method", NotServed),
        (grpc.StatusCode.PERMISSION_DENIED, "no", PermissionDenied),
        (grpc.StatusCode.UNAUTHENTICATED, "who?", Unauthenticated),
        (grpc.StatusCode.UNKNOWN, "?", TreecastError),
    ],
)
def test_plain_status_maps_by_code_when_it_has_no_details(
    code: grpc.StatusCode, details: str, kind: type[TreecastError]
) -> None:
    error = from_rpc_error(Ended(code, details))
    assert type(error) is kind
    assert error.message == details


def test_code_decides_when_details_are_garbage() -> None:
    key = "grpc-status-details-bin"
    error = from_rpc_error(Ended(grpc.StatusCode.UNAVAILABLE, "gone", (key, b"\xff\xff\xff")))
    assert type(error) is Unavailable


def test_code_decides_when_the_reason_is_anothers() -> None:
    status = Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="no such object")
    status.details.add().Pack(ErrorInfo(reason="OVERLOADED", domain="storage.example"))
    assert type(from_rpc_status(status)) is NotServed


@pytest.mark.parametrize("retry_after_s", [-5.0, 1e9])
def test_delay_is_bounded_when_a_peer_makes_it_absurd(retry_after_s: float) -> None:
    back = from_rpc_status(to_rpc_status(Unavailable("x", retry_after_s)))
    assert isinstance(back, Unavailable)
    assert 0 < back.retry_after_s <= 3600


async def test_nobody_is_told_and_nothing_logged_when_the_call_is_over_already() -> None:
    class GoneCall:
        async def abort(self, *status: object) -> None:
            raise grpc.aio.InternalError("execute_batch failed")

    with capture_logs() as logs, pytest.raises(grpc.aio.AbortError):
        await abort(GoneCall(), Unavailable("peer was silent"))  # type: ignore[arg-type]
    assert logs == []
