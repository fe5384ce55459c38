"""The rooms of the parameter server import each other one way, as docs/architecture.md says."""

import pytest

from tests.unit.test_architecture import imports

ARROWS = {  # what each room may import of ps/ besides itself
    "huge_pages": set(),
    "consistency": set(),
    "update_rules": {"huge_pages"},
    "codec": {"huge_pages"},
    "partition": {"update_rules"},
    "protocol": {"partition", "huge_pages"},
    "client": {"protocol", "partition", "consistency", "update_rules", "codec"},
    "server": {"protocol", "partition", "consistency", "update_rules", "codec", "huge_pages"},
    "endpoint": {"client", "server", "protocol", "partition", "consistency", "update_rules",
                 "huge_pages"},
}  # fmt: skip


@pytest.mark.slow
def test_arrows_between_the_rooms():
    seen = set()
    for module, used in imports().items():
        if module.startswith("ps."):
            room = module.split(".")[1]
            others = {name.split(".")[1] for name in used if name.startswith("ps.")} - {room}
            assert others <= ARROWS[room], f"{module} imports {others - ARROWS[room]}"
            seen.add(room)
    assert {"client", "server", "protocol", "partition", "consistency"} <= seen
