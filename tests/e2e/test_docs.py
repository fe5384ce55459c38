"""The documents' commands are run as they stand, and their tables are held against the code."""

import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hpctrain.data.shards import ShardSet
from hpctrain.horovod_build.patches import PATCHES
from hpctrain.process import run
from tests.waiting import SECONDS

ROOT = Path(__file__).parents[2]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_tutorial(hpctrain):
    for split, count in (("train", 40), ("test", 10)):
        for label, colour in (("cat", (200, 50, 50)), ("dog", (50, 50, 200))):
            folder = hpctrain.folder / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (32, 32), tuple(c + number for c in colour)).save(buffer, "JPEG")
                (folder / f"{number:03}.jpg").write_bytes(buffer.getvalue())
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    readme = (ROOT / "README.md").read_text()
    (hpctrain.folder / "run.toml").write_text(blocks(tutorial, "toml")[0])
    (hpctrain.folder / "my_task.py").write_text(blocks(readme, "python")[0])
    commands = [
        shlex.split(line)
        for block in blocks(tutorial, "console")
        for line in block.strip().splitlines()
    ]
    assert len(commands) == 14
    for command in commands:
        if command[0] == "mpirun":
            command[:3] = hpctrain.prefix(int(command[2]))
        result = run(command, timeout_seconds=SECONDS, cwd=hpctrain.folder)
        assert result.returncode == 0, result.stdout
    for name in ("first", "second", "third"):
        assert (hpctrain.folder / name / "result.json").exists()


def test_writing_shards_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [SimpleNamespace(counts=np.arange(1000) % n, name=b"n" * n) for n in range(1, 9)]
    writing, _ = blocks((ROOT / "docs" / "shards.md").read_text(), "python")
    exec(writing, {"records": records})
    split = ShardSet("shards").split("train")
    assert [len(sample["name"]) for sample in split] == list(range(1, 9))
    assert split[3]["counts"].max() == 3


def test_every_patch_is_documented():
    text = (ROOT / "docs" / "horovod.md").read_text()
    for patch in PATCHES:
        assert f"`{patch.name}`" in text


@pytest.mark.parametrize(
    "name", ["README.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]]
)
def test_links_lead_somewhere(name):
    file = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
        assert (file.parent / target).exists(), f"{name}: {target}"


def test_tests_named_in_the_guarantees_exist():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    for name in re.findall(r"`(?:tests/\w+/)?(test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(name)), name
