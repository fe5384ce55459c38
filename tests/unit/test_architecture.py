"""The rooms and arrows of docs/architecture.md are those of the code, and there is no circle."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import hpctrain

ROOT = Path(hpctrain.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


def modules():
    """By dotted name below hpctrain, the file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    del found["__init__"]  # what everybody may import from, such as the version
    return found


def imports():
    """By module, the modules that it imports anywhere, for types alone too."""
    there = modules()
    found = {}
    for name, path in there.items():
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hpctrain."):
                base = node.module.removeprefix("hpctrain.")
                names = [
                    n if (n := f"{base}.{each.name}") in there else base for each in node.names
                ]
            elif isinstance(node, ast.ImportFrom) and node.module == "hpctrain":
                names = [each.name for each in node.names if each.name in there]
            elif isinstance(node, ast.Import):
                names = [each.name.removeprefix("hpctrain.") for each in node.names]
            used.update(each for each in names if each in there and each != name)
        found[name] = used
    return found


def room(name):
    return name.partition(".")[0]


def test_no_module_imports_itself_by_way_of_others():
    list(TopologicalSorter(imports()).static_order())


def test_arrows_are_those_of_the_page():
    arrows = {}
    for name, used in imports().items():
        arrows.setdefault(room(name), set()).update(map(room, used))
    found = {name: sorted(used - {name}) for name, used in arrows.items() if used - {name}}
    block = PAGE.read_text().split("Imports run one way")[1].split("```")[1]
    lines = (line.partition(" -> ") for line in block.strip().splitlines())
    listed = {name.strip(): sorted(used.split()) for name, _, used in lines}
    assert found == listed
    list(TopologicalSorter(listed).static_order())  # raises CycleError


def test_every_room_and_file_is_on_the_page():
    rooms = PAGE.read_text().split("## The rooms")[1].split("Imports run one way")[0]
    words = set(re.findall(r"[\w/]+(?:\.\w+)?", rooms))
    for name, path in modules().items():
        if path.name == "__init__.py":
            assert "." in name or f"{name}/" in rooms, name
        else:
            assert path.name in words, f"{name} is not in docs/architecture.md"


def test_the_top_is_small():
    assert len(list(ROOT.glob("*.py"))) <= 10


def test_what_submits_needs_no_torch():
    used = imports()
    seen, queue = set(), [name for name in used if room(name) == "slurm"]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += used[name]
    for name in seen:
        text = modules()[name].read_text()
        assert not re.search(r"^(import torch|from torch)\b", text, re.M), name
