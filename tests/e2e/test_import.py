"""Importing with several ranks, and importing that is killed: the files are always the same."""

import io
import signal
import subprocess
import tarfile

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.processes import started
from tests.waiting import SECONDS, wait_until

IMAGES = 3000


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise of 64 x 64, so that there are some 36 shards of a MiB."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / ("test" if number % 5 == 0 else "train") / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:05d}.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def wanted(pictures, tmp_path_factory):
    """What one process makes of them, undisturbed."""
    from hpctrain.data.importers import ImportOptions, import_data
    from hpctrain.world.launcher import ALONE

    folder = tmp_path_factory.mktemp("wanted") / "shards"
    import_data(pictures, folder, ImportOptions(shard_bytes=2**20), ALONE)
    return contents(folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("ranks", [0, 2, 3])
def test_any_number_of_ranks_makes_the_same_files(hpctrain, pictures, wanted, ranks):
    result = hpctrain("data", "import", pictures, "shards", "--shard-mib", 1, ranks=ranks)
    assert result.returncode == 0, result.stdout
    assert contents(hpctrain.folder / "shards") == wanted
    assert result.stdout.count("2400 samples") == 1


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_any_number_of_ranks_reads_a_compressed_tar(hpctrain, compression):
    """Without splits of its own, so that the two splits' samples alternate."""
    with tarfile.open(hpctrain.folder / "x.tar.gz", "w:gz") as archive:
        for number in range(600):
            content = io.BytesIO()
            Image.new("RGB", (64, 64), (number % 256, number // 256, 7)).save(content, "PNG")
            member = tarfile.TarInfo(f"x/class{number % 7}/{number}.png")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
    made = []
    for ranks in (0, 2, 3):
        folder = f"shards{ranks}"
        options = ("--shard-mib", 1, "--compression", compression)
        result = hpctrain("data", "import", "x.tar.gz", folder, *options, ranks=ranks)
        assert result.returncode == 0, result.stdout
        made.append(contents(hpctrain.folder / folder))
    assert made[0] == made[1] == made[2] and len(made[0]) > 4


@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_and_given_again(hpctrain, pictures, wanted, ranks):
    shards = hpctrain.folder / "shards"
    command = ["hpctrain", "data", "import", str(pictures), "shards", "--shard-mib", "1"]
    options = {"cwd": hpctrain.folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with started([*hpctrain.prefix(ranks), *command], **options) as process:
        wait_until(
            lambda: len(list(shards.glob(".import/*.h5.json"))) >= 3, "three shards",
            running=process,
        )  # fmt: skip
        victims = [process] if ranks == 0 else ranks_of(process)[-1:]
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        assert process.wait(SECONDS) != 0
    made = {path: path.stat().st_mtime_ns for path in shards.glob("*.h5")}
    assert 3 <= len(made) < len(wanted) - 1 and not (shards / "hpctrain-index.json").exists()
    recorded = [shards / path.name.removesuffix(".json") for path in shards.glob(".import/*.json")]
    result = hpctrain(*command[1:], ranks=3 if ranks else 0)
    assert result.returncode == 0, result.stdout
    assert contents(shards) == wanted
    kept = [path for path in recorded if path in made and path.stat().st_mtime_ns == made[path]]
    assert len(kept) >= 3


def ranks_of(process):
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "import" in child.cmdline() and "mpirun" not in child.cmdline()[0]
    ]


def test_one_bad_image_ends_all_ranks_with_one_line(hpctrain, tmp_path):
    place = tmp_path / "pictures" / "a"
    place.mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{number:02d}.png")
    (place / "39.png").write_bytes(b"broken")
    result = hpctrain("data", "import", "pictures", "shards", ranks=2)
    assert result.returncode not in (0, 124), result.stdout
    assert "a/39.png is not a readable image" in result.stdout
    assert "Traceback" not in result.stdout
    Image.new("RGB", (8, 8)).save(place / "39.png")
    result = hpctrain("data", "import", "pictures", "shards", ranks=2)
    assert result.returncode == 0, result.stdout


def test_a_source_that_is_missing(hpctrain):
    result = hpctrain("data", "import", "none.tar", "shards", ranks=2)
    assert result.returncode == 2, result.stdout
    assert "none.tar does not exist" in result.stdout
