"""Every error that a user or a peer can cause. gRPC codes for them live in `wire/status.py`."""

from __future__ import annotations

from typing import ClassVar


class TreecastError(Exception):
    """Base of all errors raised on purpose.

    The message says what happened, the value and the bound. `reason` is the stable name that
    travels in `google.rpc.ErrorInfo`.
    """

    reason: ClassVar[str] = "INTERNAL"

    @property
    def message(self) -> str:
        return str(self)


class SettingsError(TreecastError):
    """A flag or environment variable has a bad or unknown value."""

    reason = "BAD_SETTINGS"


class ModelError(TreecastError):
    """A model folder is missing, is not a causal LM, or does not fit what it is needed for."""

    reason = "BAD_MODEL"


class EngineLost(TreecastError):
    """A process of the engine's group is gone, or does not answer; the others can do nothing."""

    reason = "ENGINE_LOST"


class CorpusError(TreecastError):
    """A tuning corpus cannot be read."""

    reason = "BAD_CORPUS"


class InvalidRequest(TreecastError):
    """A request has a value out of bounds. Retrying it cannot help."""

    reason = "INVALID_REQUEST"


class PromptTooLong(InvalidRequest):
    """Prompt and output together do not fit the model's context."""

    reason = "PROMPT_TOO_LONG"


class InvalidTree(TreecastError):
    """A token tree is malformed or over its caps."""

    reason = "INVALID_TREE"


class InvalidFrame(TreecastError):
    """A frame on a pair stream breaks the protocol."""

    reason = "INVALID_FRAME"


class PeerMismatch(TreecastError):
    """Two peers disagree on protocol, vocabulary, tokenizer or laws."""

    reason = "PEER_MISMATCH"


class StaleLease(TreecastError):
    """Another placement of the session has a newer epoch."""

    reason = "STALE_LEASE"


class NotServed(TreecastError):
    """The model or revision asked for is not served here."""

    reason = "NOT_SERVED"


class Unauthenticated(TreecastError):
    """The caller's API key is missing, unknown or expired."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(TreecastError):
    """The caller is known, and may not do this."""

    reason = "PERMISSION_DENIED"


class DuplicateRequest(TreecastError):
    """A request with this id is running."""

    reason = "DUPLICATE_REQUEST"


class Cancelled(TreecastError):
    """The request was aborted."""

    reason = "CANCELLED"


class DeadlineExceeded(TreecastError):
    """The request's deadline passed before it was finished."""

    reason = "DEADLINE_EXCEEDED"


class RetryableError(TreecastError):
    """Trying again after `retry_after_s` seconds may help."""

    reason = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(RetryableError):
    """A bounded queue or pool is full."""

    reason = "OVERLOADED"


class QuotaExceeded(Overloaded):
    """A tenant has used up what its API key allows for now."""

    reason = "QUOTA_EXCEEDED"


class Unavailable(RetryableError):
    """No worker can serve the request now."""

    reason = "UNAVAILABLE"


class HandedOver(Unavailable):
    """A draining verifier has given a request back, to be placed elsewhere."""

    reason = "HANDED_OVER"
