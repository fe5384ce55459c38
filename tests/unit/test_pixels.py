"""What becomes of an image's pixels, beside Pillow and numpy on the same file."""

import io
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpctrain.data.importers import ImportOptions, import_data
from hpctrain.data.importers.pixels import decode
from hpctrain.errors import Error
from hpctrain.world.launcher import ALONE


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed, *shape, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


MODES = {"1": "PNG", "L": "PNG", "LA": "PNG", "P": "PNG", "RGB": "WEBP", "RGBA": "PNG"}
MODES |= {"CMYK": "TIFF", "YCbCr": "JPEG"}


@settings(max_examples=40)
@given(st.sampled_from(sorted(MODES)), st.integers(0, 99), st.integers(1, 9), st.integers(1, 9))
def test_eight_bits_are_as_pillow_converts_them(mode, seed, height, width):
    image = Image.fromarray(noise(seed, height, width, 3)).convert(mode)
    data = saved(image, MODES[mode], **({"lossless": True} if MODES[mode] == "WEBP" else {}))
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(decode(data, "it", "rgb", None), np.asarray(opened.convert("RGB")))
    assert np.array_equal(decode(data, "it", "gray", None)[..., 0], np.asarray(opened.convert("L")))
    kept = decode(data, "it", "keep", None)
    if mode in ("L", "LA", "RGB", "RGBA"):
        assert np.array_equal(kept.squeeze(), np.asarray(opened).squeeze())
    assert kept.dtype == np.uint8 and kept.shape[:2] == (height, width)


@settings(max_examples=40)
@given(st.integers(0, 99), st.sampled_from(["PNG", "TIFF"]))
def test_sixteen_bits_are_not_clipped(seed, kind):
    pixels = noise(seed, 5, 7, dtype=np.uint16)
    data = saved(Image.fromarray(pixels), kind)
    assert np.array_equal(decode(data, "it", "keep", None)[..., 0], pixels)
    assert np.array_equal(decode(data, "it", "gray", None)[..., 0], pixels >> 8)
    rgb = decode(data, "it", "rgb", None)
    assert rgb.dtype == np.uint8 and np.array_equal(rgb, np.repeat(pixels[..., None] >> 8, 3, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("pixels", ["rgb", "gray", "keep"])
def test_numbers_without_a_range_stay_what_they_are(dtype, pixels):
    values = (np.arange(35).reshape(5, 7) * 1000.5 - 9000).astype(dtype)
    data = saved(Image.fromarray(values), "TIFF")
    found = decode(data, "it", pixels, None)
    assert found.dtype == dtype and np.array_equal(found[..., 0], values)
    assert decode(data, "it", pixels, 3).shape == (3, 3, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_images_stand_upright(kind):
    image = Image.fromarray(np.kron(noise(0, 2, 3, 3), np.ones((16, 16, 1), np.uint8)))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decode(saved(image, kind, exif=exif), "it", "rgb", None)
        turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
        wanted = image if turned is None else image.transpose(Image.Transpose(turned))
        assert found.shape[:2] == wanted.size[::-1]
        assert np.abs(found.astype(int) - np.asarray(wanted).astype(int)).mean() < 8


def test_the_first_frame_counts():
    frames = [Image.fromarray(noise(seed, 4, 6, 3)) for seed in range(3)]
    data = saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(data, "it", "rgb", None), np.asarray(frames[0]))


def test_no_other_program_is_started_for_an_image(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(Error, match=r"it is not a readable image: it is none of JPEG, PNG"):
        decode(eps, "it", "rgb", None)


def test_an_image_that_would_fill_memory_is_refused():
    data = bytearray(saved(Image.new("L", (8, 8))))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    with pytest.raises(Error, match="it is not a readable image"):
        decode(bytes(data), "it", "rgb", None)


@settings(max_examples=40)
@given(st.integers(0, 5), st.data())
def test_damaged_images_are_refused_in_one_line(kind, data):
    name = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"][kind]
    content = bytearray(saved(Image.fromarray(noise(kind, 9, 9, 3)), name))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(content), "it", "rgb", None)
    except Error as error:
        assert "it is not a readable image" in str(error)
    else:
        assert found.ndim == 3


def test_kinds_that_cannot_stand_side_by_side(tmp_path):
    for label, image in (("a", noise(0, 4, 4, 3)), ("b", noise(0, 4, 4))):
        (tmp_path / "in" / label).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "in" / label / "0.png")
    with pytest.raises(Error, match=r"b/0.png has 1 channels of uint8, others have 3 .*--pixels"):
        import_data(tmp_path / "in", tmp_path / "s", ImportOptions(pixels="keep"), ALONE)
    said = []
    options = ImportOptions(validation_fraction=0)
    import_data(tmp_path / "in", tmp_path / "t", options, ALONE, said.append)
    assert "classes   2: a 1, b 1" in said and any("1 RGB, 1 grey" in line for line in said)
