"""Decodes images of any mode and orientation to RGB, within a limit on pixels.

- Encoded bytes, base64 (bare or as a data: URI), paths, or a mapping with one of them.
- The size is read from the header before a pixel is decoded. Large JPEGs are decoded at a half, quarter or eighth.
- Independent of rows and prompts; the caller's folder reads paths.
"""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.data.errors import BadRow, first_line, printable

MAX_PIXELS = 200_000_000
"""Default for the largest image."""

ENOUGH_PIXELS = 16_000_000
"""JPEGs are downscaled while decoding as long as at least this many pixels remain: more than any processor keeps."""

_SUPPORTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
Image.init()
FORMATS = tuple(name for name in _SUPPORTED if name in Image.OPEN)
"""Formats that are decoded; Pillow knows more, but some of them run other programs (EPS) or have no use here."""

_FOREIGN = (
    (re.compile(rb"\s*%PDF"), "a PDF; render its pages to PNG or JPEG"),
    (re.compile(rb"\s*<(svg|[?!].{0,2000}?<svg)", re.S), "an SVG drawing; render it to PNG"),
    (re.compile(rb".{4}ftyp(hei[cfmsx]|hev[cmsx]|mif1|msf1)", re.S), "an HEIC photo; convert it to JPEG"),
    (re.compile(rb".{4}ftyp(isom|iso2|mp4|M4V|qt )", re.S), "a video; take images out of it"),
    (re.compile(rb"\s*<(!doctype html|html|head)", re.I), "a web page (a download that failed?)"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
)  # fmt: skip
"""Contents of image columns that are not supported images, and the remedy."""

_WEB = re.compile(r"(https?|ftp)://", re.I)
_DATA = re.compile(r"data:[^,]{0,200},")
_BASE64 = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0AK)[^.]*\Z")
"""Beginnings of common image formats in base64; no path matches unless it has no ending."""
_NO_PATH = 1000
"""Longer texts without a dot are taken for base64."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Transposition that brings an image upright, by EXIF orientation."""


class Folder(Protocol):
    """Reads files by path."""

    def read(self, name: str) -> bytes:
        """Returns a file's bytes; raises BadRow."""


def load_image(item: Any, folder: Folder, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns an item of an image column as an RGB image; raises BadRow with the reason."""
    if isinstance(item, Mapping):
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if isinstance(item, str):
        item = _bytes_of(item, folder)
    if not isinstance(item, bytes):
        raise BadRow("an image must be encoded bytes, a path, or a mapping with one of them")
    return decode(item, max_pixels=max_pixels)


def _bytes_of(text: str, folder: Folder) -> bytes:
    if _WEB.match(text):
        raise BadRow(
            f"image {printable(text, 100)!r} is a web address; download the images, nothing is fetched from the web"
        )
    if prefix := _DATA.match(text):
        if not prefix[0].endswith(";base64,"):
            raise BadRow("an image is a data: URI without base64")
        try:
            return base64.b64decode(text[prefix.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRow(f"an image is a data: URI with broken base64: {error}") from None
    if _BASE64.match(text) or (len(text) > _NO_PATH and "." not in text):
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRow(f"an image is neither a path nor valid base64: {error}") from None
    return folder.read(text)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the first frame or page of an image to upright RGB; raises BadRow with the reason.

    Transparency becomes white, since charts, documents and formulas without background are made for white paper.
    16-bit images are scaled by their full range, 32-bit and float images by their own minimum and maximum.
    """
    if not data:
        raise BadRow("an image of 0 bytes")
    if what := next((what for pattern, what in _FOREIGN if pattern.match(data)), None):
        raise BadRow(f"an image is {what}")
    # Pillow's own limit also holds for images inside images (icons). Its default is below our largest scans; it is never
    # lowered, since it is the whole process's.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files would fill the logs of every reader
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadRow(f"an image of {width} x {height} pixels; data.max_pixels allows {max_pixels:,}")
                shrink = _shrink(width * height)
                if image.format in ("JPEG", "MPO") and shrink > 1:
                    image.draft(None, (width // shrink, height // shrink))
                image.load()
                return _upright(image, _rgb(image))
    except BadRow:
        raise
    except Image.DecompressionBombError as error:
        raise BadRow(f"an image is larger than data.max_pixels allows ({max_pixels:,}): {first_line(error)}") from None
    except UnidentifiedImageError:
        raise BadRow(f"an image cannot be decoded: it is none of {', '.join(FORMATS)}, or cut") from None
    except Exception as error:  # noqa: BLE001 - decoders raise anything on broken data (IndexError, struct.error, ...)
        raise BadRow(f"an image cannot be decoded: {first_line(error)}") from None


def _shrink(pixels: int) -> int:
    """Returns the divisor (1, 2, 4 or 8) of both sides that leaves enough pixels."""
    return next((by for by in (8, 4, 2) if pixels >= ENOUGH_PIXELS * by * by), 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_stretched(np.asarray(image, dtype=np.float64)))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image.convert("RGB"), mask=alpha)
    return paper


def _stretched(values_HW: np.ndarray) -> np.ndarray:
    """Returns values scaled to bytes, from the least (0) to the greatest (255); values that are not finite become 0."""
    finite = np.isfinite(values_HW)
    if not finite.any():
        return np.zeros(values_HW.shape, np.uint8)
    least, greatest = values_HW[finite].min(), values_HW[finite].max()
    scaled = (np.where(finite, values_HW, least) - least) * (255 / max(greatest - least, np.finfo(np.float64).tiny))
    return scaled.astype(np.uint8)


def _upright(image: Image.Image, pixels: Image.Image) -> Image.Image:
    """Turns `pixels` as the EXIF data of `image` say, where they can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - broken EXIF data do not affect the pixels
        return pixels
    turn = _TURNS.get(orientation)
    return pixels if turn is None else pixels.transpose(turn)
