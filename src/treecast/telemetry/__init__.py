"""Logs and metrics. Prompts and tokens are never logged above DEBUG."""
