"""Images that look unusable and are not, and what stands where an image should."""

import base64

import numpy as np
from PIL import Image

from jobs.benchmark.tools.malformed_corpus.corpus import Corpus, ask, bomb, encoded, noise


def images(corpus: Corpus) -> None:
    """Images that look unusable and are not."""
    red = Image.new("RGB", (16, 12), "red")
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    frames = {"save_all": True, "append_images": [Image.new("RGB", (16, 12), "blue")]}
    for name, data in {
        "printers_colours": encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"),
        "sixteen_bits_png": encoded(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)),
        "sixteen_bits_tiff": encoded(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8), "TIFF"),
        "floats": encoded(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), "TIFF"),
        "bilevel": encoded(Image.new("1", (9, 9), 1)),
        "grey_and_alpha": encoded(Image.new("LA", (8, 8), (9, 99))),
        "transparent": encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))),
        "transparent_palette": encoded(palette, transparency=1),
        "animated_gif": encoded(red, "GIF", **frames),
        "animated_webp": encoded(red, "WEBP", **frames),
        "pages": encoded(red, "TIFF", **frames),
        "turned_photo": encoded(red, "JPEG", exif=turned),
        "broken_exif": encoded(red, "JPEG", exif=b"Exif\x00\x00MM\x00\x2anonsense"),
        "one_pixel": encoded(Image.new("RGB", (1, 1))),
        "thin": encoded(Image.new("RGB", (1, 5000))),
        "flat": encoded(Image.new("RGB", (5000, 1))),
        "large_scan": encoded(Image.new("L", (10_000, 7_000), 250), "JPEG"),
        "large_fax": encoded(Image.new("1", (10_000, 10_000), 1), "TIFF", compression="group4"),
        "wrong_ending": encoded(red, "JPEG"),
    }.items():
        corpus.image(name, data)
    text = base64.b64encode(noise("PNG")).decode()
    corpus.image("data_uri", f"data:image/png;base64,{text}")
    corpus.image("base64", text)
    corpus.image("bytes_and_path", {"bytes": None, "path": "image.png"}, file=noise("JPEG"))
    corpus.image("path_with_dots", "./deep/../image.png", file=noise("JPEG"))


def no_images(corpus: Corpus) -> None:
    """What stands where an image should."""
    for name, data, reason in (
        ("cut_jpeg", noise("JPEG")[:300], "an image cannot be decoded"),
        ("cut_png", noise("PNG")[:300], "an image cannot be decoded"),
        ("header_only", noise("PNG")[:40], "an image cannot be decoded"),
        ("zero_bytes", b"", "an image of 0 bytes"),
        ("text_file", b"no image", "it is none of JPEG, PNG"),
        ("svg", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        ("pdf", b"%PDF-1.7\n%...", "a PDF; render its pages"),
        ("heic", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "an HEIC photo; convert it"),
        ("video", b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2", "a video"),
        ("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of JPEG, PNG"),
        ("web_page", b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        ("lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("bomb", bomb(100_000, 100_000), "larger than data.max_pixels allows"),
        ("small_bomb", bomb(20_000, 15_000), "data.max_pixels allows 200,000,000"),
        ("endless_bomb", bomb(2**31 - 1, 2**31 - 1), "larger than data.max_pixels allows"),
    ):
        corpus.image(name, data, reason)
    for name, image, reason in (
        ("folder", "deep", "is a folder"),
        ("missing_file", "none.png", "does not exist"),
        ("outside", "../../../../../../../etc/passwd", "lies outside of"),
        ("outside_absolute", "/etc/passwd", "lies outside of"),
        ("outside_uri", "file:///etc/passwd", "lies outside of"),
        ("web_address", "https://example.org/a.png", "is a web address"),
        ("other_storage", "s3://bucket/a.png", "lie elsewhere than s3://"),
        ("broken_data_uri", "data:image/png;base64,###", "broken base64"),
        ("broken_base64", "A" * 2001, "neither a path nor valid base64"),
        ("number_as_image", 5, "an image must be encoded bytes"),
        ("empty_mapping", {"bytes": None, "path": None}, "an image must be encoded bytes"),
        ("name_with_nul", "a\x00.png", "cannot be read"),
    ):
        corpus.rows(name, ask(images=[image]), reason=reason, files={"deep/image.png": noise("PNG")})
