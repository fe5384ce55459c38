"""Names of strategies and the like, and where their classes come from."""

import sys
from importlib import metadata

import pytest

from hpctrain.errors import Error
from hpctrain.registry import Registry

NUMBERS = Registry("number", "tests.numbers", {"ratio": "fractions:Fraction"})


def test_own_names_are_found_without_importing_others():
    registry = Registry("number", "tests.numbers", {"ratio": "fractions:Fraction", "no": "no:No"})
    assert registry.names() == ["ratio", "no"]
    assert registry.get("ratio").__name__ == "Fraction"


def test_a_place_is_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine_of_tests.py").write_text("class Number:\n    class Inner: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert NUMBERS.get("mine_of_tests:Number").__module__ == "mine_of_tests"
    assert NUMBERS.get("mine_of_tests:Number.Inner").__qualname__ == "Number.Inner"
    with pytest.raises(Error, match=r"number 'mine_of_tests:Numbr'.*did you mean 'Number'"):
        NUMBERS.get("mine_of_tests:Numbr")


def test_installed_packages_add_theirs(monkeypatch):
    point = metadata.EntryPoint("third", "decimal:Decimal", "tests.numbers")

    def points(**selected):
        return [point] if selected.get("name", "third") == "third" else []

    monkeypatch.setattr(metadata, "entry_points", points)
    assert NUMBERS.names() == ["ratio", "third"]
    assert NUMBERS.get("third").__name__ == "Decimal"


def test_what_is_not_there_is_named_in_a_line():
    with pytest.raises(Error, match=r"there is no number 'ratoi'. HINT: did you mean 'ratio'"):
        NUMBERS.get("ratoi")
    with pytest.raises(Error, match=r"number 'nowhere_at_all:A' cannot be imported"):
        NUMBERS.get("nowhere_at_all:A")
