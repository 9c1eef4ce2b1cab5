"""The OpenAI-compatible HTTP edge: JSON in and out, over the code that serves `Generate`."""

from .app import http_edge
from .listener import HttpListener

__all__ = ["HttpListener", "http_edge"]
