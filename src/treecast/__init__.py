"""Serve large language models with tree-based speculative inference."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treecast.client import AsyncClient, Client, TlsFiles
    from treecast.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "SamplingParams", "TlsFiles", "__version__"]

_HOMES = {
    "AsyncClient": "treecast.client",
    "Client": "treecast.client",
    "SamplingParams": "treecast.sampling.params",
    "TlsFiles": "treecast.client",
}


def __getattr__(name: str) -> object:
    """Import a name when it is asked for: a worker needs no client."""
    if name not in _HOMES:
        raise AttributeError(f"module 'treecast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
