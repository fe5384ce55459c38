"""Strangers at every port of an elastic run, which has few descriptors: it ends as without them."""

from benchmarks.strangers import attacked


def test_strangers_make_no_difference(tmp_path):
    found = attacked(tmp_path, connections=200, descriptors=160, epochs=6)
    assert found["good"], (found, (tmp_path / "among" / "log").read_text())
    assert found["among"]["opened"] > 200 and found["among"]["ports"]
