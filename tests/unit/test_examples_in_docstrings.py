"""Examples in docstrings run, and give what they say."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import hpctrain

SKIPPED = {"hpctrain.elastic.selftest", "hpctrain.launch.worker_slot"}  # programs


def with_examples():
    for found in pkgutil.walk_packages(hpctrain.__path__, "hpctrain."):
        if found.name not in SKIPPED:
            path = importlib.util.find_spec(found.name).origin
            if ">>> " in Path(path).read_text():
                yield found.name


@pytest.mark.parametrize("name", with_examples())
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
