"""Decode image files: which are opened, how, and what becomes of every kind of pixel."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hpctrain.data.importers.import_plan import Pixels
from hpctrain.data.importers.jpeg import decode_jpeg
from hpctrain.errors import Error

SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm", "pbm"}
)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Whatever a file is called. Others of Pillow's formats start programs (EPS: Ghostscript), or have
had less looking after."""
SAID = {
    "rgb": "8-bit RGB: grey three times, palettes as colours, 16 bits as their upper 8",
    "gray": "8-bit grey: colours by their luma, 16 bits as their upper 8",
    "keep": "bits and channels as they are, but palettes, CMYK and the like as RGB",
}
"""What becomes of pixels; floats and 32-bit integers, which have no range, stay what they are."""


def decode(data: bytes, where: str, pixels: Pixels, resize: int | None) -> NDArray[Any]:
    """Decode an image to pixels, upright by its EXIF orientation; of several frames the first.

    Args:
        data: Of the file.
        where: What to call it in an error.
        pixels: What they become; :data:`SAID` says it.
        resize: Height and width to scale to, by bicubic interpolation.

    Returns:
        Shape (height, width, channels): uint8; with ``keep`` uint16 where it has 16 bits; int32
        or float32 of one channel where that is what it holds.

    Raises:
        Error: It is not a readable image, or too large to be taken for an honest one.
    """
    try:
        image = decode_jpeg(data)
        if image is None:
            image = open_image(data)
            if pixels == "keep" and _is_deep_colour(image):
                raise ValueError("Pillow reads 8 of its 16 bits a channel; --pixels rgb allows it")
            deep = _is_deep(image)
            ImageOps.exif_transpose(image, in_place=True)
            if deep or image.mode in ("I", "F"):
                return _deep(image, deep, pixels, resize)
        mode = "RGB" if pixels == "rgb" else "L" if pixels == "gray" else _kept(image)
        if image.mode != mode:
            image = image.convert(mode)
        if resize is not None:
            image = image.resize((resize, resize), Image.Resampling.BICUBIC)
        array = np.asarray(image)
        return array if array.ndim == 3 else array[..., None]
    except Exception as error:  # what a plug-in of Pillow's raises is anyone's guess
        raise unreadable(where, error) from error


def open_image(data: bytes) -> Image.Image:
    """Look at an image's head.

    Raises:
        Exception: It is none, or has more pixels than Pillow takes for an honest picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=FORMATS)


def unreadable(where: str, error: Exception) -> Error:
    """Return the error to raise where an image cannot be read.

    Args:
        where: What to call it.
        error: What the decoder raised.
    """
    # Pillow's own words for this one end in an address in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    why = f"it is none of {', '.join(FORMATS)}" if unknown else error or type(error).__name__
    return Error(f"{where} is not a readable image: {why}.", hint="mend it, or remove it.")


def bits(image: Image.Image) -> str:
    """Name the kind of an opened image's pixels, in words that a person knows."""
    if _is_deep(image):
        return "16-bit grey"
    if _is_deep_colour(image):
        return f"16-bit {image.mode}"
    names = {"1": "1-bit", "L": "grey", "P": "palette", "I": "32-bit integer", "F": "float"}
    return names.get(image.mode, image.mode)


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _is_deep_colour(image: Image.Image) -> bool:
    return not _is_deep(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _deep(image: Image.Image, deep: bool, pixels: Pixels, resize: int | None) -> NDArray[Any]:
    """Pixels of more than 8 bits; Pillow's own conversion would clip all that is above 255."""
    array = np.asarray(image)[..., None]
    if deep:
        array = array.astype(np.uint16)
    if resize is not None:
        array = _resized(array, resize)
    if not deep or pixels == "keep":
        return array
    array = (array >> 8).astype(np.uint8)
    return np.repeat(array, 3, axis=2) if pixels == "rgb" else array


def _resized(array: NDArray[Any], size: int) -> NDArray[Any]:
    # float32 holds 16 bits exactly; of 32-bit integers it has the upper 24.
    image = Image.fromarray(array[..., 0].astype(np.float32))
    scaled = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))[..., None]
    if array.dtype.kind == "f":
        return scaled
    limits = np.iinfo(array.dtype)
    return np.clip(np.rint(scaled.astype(np.float64)), limits.min, limits.max).astype(array.dtype)


def _kept(image: Image.Image) -> str:
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image.mode
    if image.mode == "1":
        return "L"
    return "RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB"
