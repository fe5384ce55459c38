"""An asynchronous run recorded, and repeated bit for bit by other servers."""

from tests.e2e.conftest import result_of


def test_recorded_and_replayed(hpctrain):
    run = ("digits", "--strategy", "ps", "--consistency", "async", "--epochs", "2")
    hpctrain.train(*run, "--servers", "2", "--record-order", "order", "--out", "first", ranks=4)
    # On one server that also works, and without shared memory.
    settings = ("--set", "ps.colocate=true", "--set", "ps.shared_memory=false")
    hpctrain.train(*run, *settings, "--replay", "order", "--out", "second", ranks=2)
    first, second = (result_of(hpctrain.folder / name) for name in ("first", "second"))
    assert first["parameters_sha256"] == second["parameters_sha256"]
    assert first["metrics"]["final"]["val_loss"] == second["metrics"]["final"]["val_loss"]
    refused = hpctrain("train", *run, "--replay", "order", "--out", "third", ranks=4)
    assert refused.returncode == 2
    assert "the recorded run had 2 workers, this one has 3" in refused.stdout
