"""The parameter server's files import each other one way, for types too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import hpctrain

PACKAGE = Path(hpctrain.__file__).parent
ROOMS = {  # as docs/architecture.md has them: each imports those named, and itself
    "huge_pages": set(),
    "update_rules": {"huge_pages"},
    "codec": {"huge_pages"},
    "consistency": set(),
    "partition": {"update_rules"},
    "protocol": {"partition", "huge_pages"},
    "client": {"protocol", "partition", "consistency", "update_rules", "codec"},
    "server": {"protocol", "partition", "consistency", "update_rules", "codec", "huge_pages"},
    "endpoint": {"client", "server", "protocol", "partition", "consistency", "update_rules",
                 "huge_pages"},
}  # fmt: skip


def imports():
    """By module of ps/, those of ps/ that it imports, anywhere in it."""
    paths = {}
    for path in (PACKAGE / "ps").rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        paths[".".join(parts).removesuffix(".__init__")] = path
    found = {}
    for module, path in paths.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                within = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name[9:] in paths else node.module for name in within}
        found[module] = {name[9:] for name in names if name[9:] in paths and name[9:] != "ps"}
    return found


def test_there_is_no_circle():
    found = imports()
    assert len(found) > 30 and found["ps.endpoint"]
    list(TopologicalSorter(found).static_order())  # which refuses circles


def test_rooms_import_each_other_one_way():
    for module, others in imports().items():
        if module == "ps":
            continue
        room = module.split(".")[1]
        reached = {other.split(".")[1] for other in others} - {room}
        assert reached <= ROOMS[room], f"{module} imports {reached - ROOMS[room]}"
