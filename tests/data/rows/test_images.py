"""Images of every mode, shape and kind of damage."""

import base64
import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.errors import BadRow
from pipeline.data.rows import images
from pipeline.data.rows.images import decode, load_image

RED = (255, 0, 0)
WHITE = (255, 255, 255)


class Nowhere:
    """A folder without files."""

    def read(self, name: str) -> bytes:
        raise BadRow(f"asked for {name}")


def encoded(image: Image.Image | None = None, image_format: str = "PNG", **settings) -> bytes:
    stream = io.BytesIO()
    (image or Image.new("RGB", (8, 6), "red")).save(stream, image_format, **settings)
    return stream.getvalue()


def corner(data: bytes) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def reason(item, **settings) -> str:
    with pytest.raises(BadRow) as error:
        load_image(item, Nowhere(), **settings)
    return str(error.value)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats(image_format):
    image = decode(encoded(image_format=image_format))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(image, int) - RED).max() < 4


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), WHITE),
        (Image.new("L", (4, 4), 9), (9, 9, 9)),
        (Image.new("LA", (4, 4), (0, 0)), WHITE),
        (Image.new("LA", (4, 4), (7, 255)), (7, 7, 7)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), RED),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("P", (4, 4)), (0, 0, 0)),
    ],
    ids=["bilevel", "grey", "grey on nothing", "grey opaque", "nothing", "opaque", "translucent", "palette"],
)
def test_transparency_is_white_paper(image, expected):
    assert corner(encoded(image)) == expected


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert corner(encoded(image)) == RED
    assert corner(encoded(image, transparency=1)) == WHITE
    assert corner(encoded(image, "GIF", transparency=1)) == WHITE


def test_a_transparent_colour_of_an_image_without_alpha():
    assert corner(encoded(Image.new("RGB", (4, 4), "red"), transparency=RED)) == WHITE


def test_printers_colours():
    assert np.abs(np.array(corner(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))) - RED).max() < 4


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(image_format):
    values = np.array([[0, 0x1234, 0x8000, 0xFFFF]], np.uint16)
    image = decode(encoded(Image.fromarray(values), image_format))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


def test_values_without_a_range_are_stretched():
    values = np.array([[-2.0, 0.0, 2.0, np.nan, np.inf]], np.float32)
    assert np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 127, 255, 0, 0]
    assert corner(encoded(Image.fromarray(np.full((2, 2), 5, np.int32)), "TIFF")) == (0, 0, 0)
    assert corner(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")) == (0, 0, 0)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_or_page_is_taken(image_format):
    others = [Image.new("RGB", (8, 6), color) for color in ("green", "blue")]
    pixel = corner(encoded(Image.new("RGB", (8, 6), "red"), image_format, save_all=True, append_images=others))
    assert np.abs(np.array(pixel) - RED).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation):
    """The red corner is where EXIF says: the stored image is what a viewer would turn to the upright one."""
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = RED
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    turn = images._TURNS.get(undo)
    stored = Image.fromarray(upright) if turn is None else Image.fromarray(upright).transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(encoded(stored, exif=exif))), upright)


def test_broken_exif_data_do_not_cost_the_image():
    assert corner(encoded(Image.new("RGB", (8, 8), "red"), exif=b"Exif\x00\x00MM\x00\x2anonsense")) == RED
    assert corner(encoded(Image.new("RGB", (8, 8), "red"), "PNG", exif=b"nonsense")) == RED


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(size):
    assert decode(encoded(Image.new("RGB", size))).size == size


def test_large_scans_are_decoded_at_what_is_enough(monkeypatch):
    monkeypatch.setattr(images, "ENOUGH_PIXELS", 100)
    half, full = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (20, 19), "red")
    assert decode(encoded(half, "JPEG")).size == (15, 10)
    assert decode(encoded(full, "JPEG")).size == (20, 19)
    assert decode(encoded(half)).size == (60, 40)


def header_only(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds nothing."""

    def chunk(chunk_type: bytes, data: bytes = b"") -> bytes:
        return struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", zlib.crc32(chunk_type + data))

    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT") + chunk(b"IEND")


@pytest.mark.parametrize("size", [(101, 100), (150, 100), (100_000, 100_000), (1 << 30, 1 << 30)])
def test_bombs_are_refused_from_their_header_in_silence(size):
    with warnings.catch_warnings(record=True) as remarks:
        message = reason(header_only(*size), max_pixels=10_000)
    assert "data.max_pixels allows 10,000" in message or "larger than data.max_pixels allows (10,000)" in message
    assert remarks == []


def test_an_image_as_large_as_allowed_is_read(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert load_image(encoded(Image.new("1", (100, 100))), Nowhere(), max_pixels=10_000).size == (100, 100)


def test_a_small_limit_is_not_left_to_others():
    reason(encoded(Image.new("1", (100, 100))), max_pixels=10)
    assert Image.open(io.BytesIO(encoded(Image.new("1", (100, 100))))).size == (100, 100)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an image of 0 bytes"),
        (b"no image", "an image cannot be decoded: it is none of JPEG, PNG"),
        (b"GIF89a nonsense", "an image cannot be decoded"),
        (b"%PDF-1.7 ...", "an image is a PDF; render its pages"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an image is an SVG drawing; render it to PNG"),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg/>', "an image is an SVG drawing"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "an image is an HEIC photo; convert it to JPEG"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00", "an image is a video"),
        (b"<!DOCTYPE html><html>404</html>", "an image is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "an image is a Git LFS pointer; fetch"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of"),
        (encoded(image_format="JPEG")[:200], "an image cannot be decoded"),
        (encoded(Image.effect_noise((16, 16), 50))[:90], "an image cannot be decoded"),
    ],
)
def test_what_is_no_image_says_what_it_is(data, message):
    assert message in reason(data)


def test_broken_images_of_any_kind_are_bad_rows():
    random = np.random.default_rng(0)
    for image_format in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "ICO", "JPEG2000"):
        intact = np.frombuffer(encoded(Image.effect_noise((16, 16), 50), image_format), np.uint8)
        for _ in range(60):
            broken = intact.copy()[: random.integers(1, len(intact))]
            broken[random.integers(len(broken), size=3)] = random.integers(256, size=3)
            with contextlib.suppress(BadRow):  # some survive
                assert load_image(broken.tobytes(), Nowhere(), max_pixels=10_000).mode == "RGB"


def test_bytes_come_in_texts_too():
    for image_format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        text = base64.b64encode(encoded(image_format=image_format)).decode()
        for form in (
            text,
            text[:76] + "\n" + text[76:],
            f"data:image/png;base64,{text}",
            {"bytes": None, "path": text},
        ):
            assert load_image(form, Nowhere()).size == (8, 6)
    text = base64.b64encode(encoded(Image.effect_noise((40, 40), 50), "PPM")).decode()
    assert load_image(text, Nowhere()).size == (40, 40)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (5, "an image must be encoded bytes, a path, or a mapping with one of them"),
        ({}, "an image must be encoded bytes"),
        ({"bytes": None, "path": None}, "an image must be encoded bytes"),
        ({"bytes": b"", "path": "red.png"}, "an image of 0 bytes"),
        ("https://example.org/a.png", "'https://example.org/a.png' is a web address; download the images"),
        ("data:image/png,abc", "an image is a data: URI without base64"),
        ("data:image/png;base64,####", "an image is a data: URI with broken base64"),
        ("data:image/png;base64,aGVsbG8=", "an image cannot be decoded"),
        ("A" * 1001, "neither a path nor valid base64"),
        ("red.png", "asked for red.png"),
        ("Qk/red.png", "asked for Qk/red.png"),
        ("folder/without/ending", "asked for folder"),
    ],
)
def test_what_stands_for_no_image_says_why(item, message):
    assert message in reason(item)
