"""Decode ordinary JPEGs by Pillow, without its parsing every marker in Python first.

That parsing takes longer than decoding a small image. Pillow's decoder needs the size alone, which
is a few bytes in. https://www.w3.org/Graphics/JPEG/itu-t81.pdf, B.2.2.
"""

from __future__ import annotations

from PIL import Image

_ORIENTATION = (b"\x01\x12", b"\x12\x01")
"""The number of EXIF's orientation tag, in either byte order."""

# Start-of-frame markers of baseline, extended sequential and progressive JPEGs.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
# Tables, restart interval, application data, comment: what may come before, and says its length.
_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})


def decode_jpeg(data: bytes) -> Image.Image | None:
    """Decode a JPEG as ``Image.open`` does; None where that has to look, or to say what is wrong.

    Args:
        data: Of a file of any kind.
    """
    size = _colour_size(data)
    if size is None or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    try:
        return Image.frombytes("RGB", size, data, "jpeg", "RGB", "")
    except (ValueError, OSError):
        return None


def _colour_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG of three colours that stands upright; None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    place = 2
    while data[place : place + 1] == b"\xff":
        head = data[place : place + 10]
        if len(head) < 10:
            return None
        if head[1] in _FRAMES:
            height, width = head[5] << 8 | head[6], head[7] << 8 | head[8]
            return (width, height) if head[4] == 8 and head[9] == 3 and width and height else None
        if head[1] not in _SEGMENTS:
            return None
        length = head[2] << 8 | head[3]
        if head[1] == 0xE1 and any(tag in data[place : place + length] for tag in _ORIENTATION):
            return None  # it may have to be turned
        place += 2 + length
    return None
