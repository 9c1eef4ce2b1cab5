"""Markdown and plots of what a folder holds; can be repeated without measuring anything."""

from __future__ import annotations

from pathlib import Path

from .folder import Folder
from .plots import draw
from .tables import markdown


def render(folder: Folder) -> Path:
    """Write `report.md` and its plots of all sections that were measured; returns the page."""
    findings = folder.read()
    return folder.write("report.md", markdown(findings, draw(findings, folder.path)))
