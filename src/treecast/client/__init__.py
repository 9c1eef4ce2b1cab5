"""The SDK: a blocking and an asyncio client of a mesh's router."""

from treecast.sampling.params import Law, Proposal, SamplingParams
from treecast.sampling.stops import FinishReason
from treecast.wire.frames import Usage
from treecast.wire.rounds import Round, RoundDraft
from treecast.wire.tls import TlsFiles

from .aio import AsyncClient, AsyncStream
from .request import ChatMessage, Prompt
from .results import Chunk, Model, Result, RoundReport, Sample, Status, VerifierStatus
from .retry import RetryPolicy
from .sync import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "Chunk",
    "Client",
    "FinishReason",
    "Law",
    "Model",
    "Prompt",
    "Proposal",
    "Result",
    "RetryPolicy",
    "Round",
    "RoundDraft",
    "RoundReport",
    "Sample",
    "SamplingParams",
    "Status",
    "Stream",
    "TlsFiles",
    "Usage",
    "VerifierStatus",
]
