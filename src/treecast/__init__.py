"""Serve large language models with tree-based speculative inference."""

__version__ = "0.1.0"
