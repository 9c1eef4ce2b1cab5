"""Every measurement can be loaded: many are run by hand alone, and would rot unseen."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import treecast.bench

MODULES = [
    module.name
    for module in pkgutil.walk_packages(treecast.bench.__path__, "treecast.bench.")
    if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_module_is_loaded_and_says_what_it_is_for(name: str) -> None:
    assert importlib.import_module(name).__doc__
