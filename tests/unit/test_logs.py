"""Python's logging: silent unless asked for, with the rank in each record."""

import logging

from hpctrain.world import logs


def test_records_have_the_rank_of_the_moment(caplog, monkeypatch):
    monkeypatch.setattr(logs, "_place", list(logs._place))
    log = logs.logger("hpctrain.example")
    place = [0, 1]
    logs.follow(lambda: tuple(place))
    with caplog.at_level(logging.INFO, logger="hpctrain"):
        log.info("first %d", 1)
        place[:] = [2, 3]
        log.info("second", extra={"more": 5})
        log.debug("not asked for")
    first, second = caplog.records
    assert (first.getMessage(), first.rank, first.world_size) == ("first 1", 0, 1)
    assert (second.rank, second.world_size, second.more) == (2, 3, 5)


def test_a_format_may_name_the_rank():
    record = logging.makeLogRecord({"msg": "said", **logs.logger("x").process("", {})[1]["extra"]})
    assert logging.Formatter("rank %(rank)s: %(message)s").format(record) == "rank 0: said"
