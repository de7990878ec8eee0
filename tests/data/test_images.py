import io
import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_image
from PIL import Image, TiffImagePlugin, TiffTags

from fastp2p.data import images
from fastp2p.data.images import halves, read_image, to_array, to_image, to_tensor
from fastp2p.data.sources.folders import has_image_name
from fastp2p.errors import InputError


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "bmp", "JPEG", "TIFF"])
def test_formats(tmp_path: Path, extension: str):
    file = tmp_path / f"x.{extension}"
    image = random_image(60, 40)
    image.save(file)
    read, note = read_image(file, 3)
    assert read.size == (60, 40)
    assert note == ""
    difference = np.abs(np.asarray(read).astype(int) - np.asarray(image)).mean()
    lossy = extension in ("jpg", "JPEG", "webp")  # at Pillow's default quality, on strong colours
    assert difference < 12 if lossy else difference == 0


@pytest.mark.parametrize("kind", ["EPS", "GIF", "PPM", "PCX", "TGA", "ICO"])
def test_other_formats_under_these_names_are_not_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """For PostScript Pillow would start gs: an outside program on an unknown file."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    random_image(16, 16).save(tmp_path / "x.png", kind)
    with pytest.raises(InputError, match="cannot be decoded: no JPEG, PNG, WEBP, TIFF, BMP image"):
        read_image(tmp_path / "x.png", 3)
    assert not (tmp_path / "started").exists()


def test_grey_tiff_with_premultiplied_alpha(tmp_path: Path):
    """Written by hand, since Pillow writes none."""
    w, h = 128, 64
    pixels = b"".join(bytes((x, 255)) for _ in range(h) for x in range(w))
    tags = [(256, 3, 1, w), (257, 3, 1, h), (258, 3, 2, 8 | 8 << 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 150)]
    tags += [(277, 3, 1, 2), (278, 3, 1, h), (279, 4, 1, len(pixels)), (338, 3, 1, 1)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(head.ljust(150, b"\0") + pixels)
    for channels in (1, 3):
        image, note = read_image(tmp_path / "x.tif", channels)
        assert note == "transparency"
        assert (to_array(image)[0, :, 0] == np.arange(128)).all()


def save(tmp_path: Path, image: Image.Image, **options: object) -> Path:
    image.save(tmp_path / "x.png", **options)
    return tmp_path / "x.png"


@pytest.mark.parametrize(
    ("mode", "channels", "note"),
    [("L", 3, "grey"), ("L", 1, ""), ("1", 3, "black and white"), ("P", 3, "palette"), ("RGB", 1, ""), ("RGB", 3, "")],
)
def test_modes_are_converted_and_said(tmp_path: Path, mode: str, channels: int, note: str):
    image, said = read_image(save(tmp_path, random_image(8, 8).convert(mode)), channels)
    assert said == note
    assert to_array(image).shape == (8, 8, channels)


def test_palette_gives_its_colours(tmp_path: Path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    read, _ = read_image(save(tmp_path, image), 3)
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (200, 100, 50)]


def test_transparency_is_put_on_white(tmp_path: Path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    read, note = read_image(save(tmp_path, image), 3)
    assert note == "transparency"
    assert [read.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (127, 127, 127)]

    palette = Image.new("P", (1, 1))
    palette.putpalette([0, 0, 0])
    read, note = read_image(save(tmp_path, palette, transparency=0), 3)
    assert note == "palette with transparency"
    assert read.getpixel((0, 0)) == (255, 255, 255)

    grey = Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 0)])
    assert read_image(save(tmp_path, grey), 3)[0].getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_is_scaled(tmp_path: Path):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    read, note = read_image(save(tmp_path, Image.fromarray(values)), 1)
    assert note == "16-bit grey"
    assert np.asarray(read).tolist() == [[0, 1, 128, 255]]


def test_float_pixels_are_refused(tmp_path: Path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="no fixed white"):
        read_image(tmp_path / "x.tif", 3)


def test_orientation_tag_is_applied(tmp_path: Path):
    image = random_image(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    read, note = read_image(tmp_path / "x.jpg", 3)
    assert read.size == (10, 20)
    assert note == "orientation tag"


def test_to_image_rounds():
    x = torch.tensor([-1.0, -0.999, 0.0, 0.5, 1.0, 1.7]).view(1, 1, 6)
    assert np.asarray(to_image(x)).tolist() == [[0, 0, 128, 191, 255, 255]]
    every = torch.arange(256).float().view(1, 16, 16) / 255 * 2 - 1
    assert np.array_equal(np.asarray(to_image(every)).flatten(), np.arange(256))
    assert to_image(torch.zeros(3, 4, 5)).size == (5, 4)


def test_to_tensor_is_the_way_back():
    image = random_image(5, 4)
    x = to_tensor(image)
    assert x.shape == (1, 3, 4, 5)
    assert np.array_equal(np.asarray(to_image(x[0])), np.asarray(image))
    assert to_tensor(image.convert("L")).shape == (1, 1, 4, 5)


def test_16_bit_colour_is_said(tmp_path: Path):
    """Pillow keeps the high byte of each channel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    pixel = b"".join(value.to_bytes(2) for value in (0, 0x80FF, 0xFFFF))
    header = (1).to_bytes(4) * 2 + bytes([16, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + pixel))
    (tmp_path / "x.png").write_bytes(png + chunk(b"IEND", b""))
    image, note = read_image(tmp_path / "x.png", 3)
    assert image.getpixel((0, 0)) == (0, 0x80, 255)
    assert note == "16-bit colour"


def test_cmyk(tmp_path: Path):
    random_image(8, 8).convert("CMYK").save(tmp_path / "x.jpg")
    read, note = read_image(tmp_path / "x.jpg", 3)
    assert (read.mode, note) == ("RGB", "CMYK")


def test_empty_file(tmp_path: Path):
    (tmp_path / "x.png").touch()
    with pytest.raises(InputError, match=r"empty \(zero bytes\)"):
        read_image(tmp_path / "x.png", 3)


def test_text_that_claims_to_be_an_image(tmp_path: Path):
    (tmp_path / "x.jpg").write_text("hello")
    with pytest.raises(InputError, match="cannot be decoded: no JPEG, PNG"):
        read_image(tmp_path / "x.jpg", 3)


def test_a_folder_or_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path, 3)
    with pytest.raises(InputError, match="No such file"):
        read_image(tmp_path / "nothing.png", 3)


def test_decompression_bomb(tmp_path: Path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    header = (30000).to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(png)
    with pytest.raises(InputError, match="too large to be real"):
        read_image(tmp_path / "x.png", 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged tags before it gives up
def test_damage_anywhere_is_an_input_error_or_an_image(tmp_path: Path, format: str):
    """Every truncation is told; flipped bytes either decode or are told. Nothing else ever escapes."""
    buffer = io.BytesIO()
    random_image(40, 30).save(buffer, format)
    whole, file = buffer.getvalue(), tmp_path / "x.img"
    rng = np.random.default_rng(0)
    for length in rng.integers(0, len(whole) * 9 // 10, 60):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_image(file, 3)
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 3):
            damaged[position] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            image, _ = read_image(file, 3)
        except InputError:
            continue
        assert image.mode == "RGB"


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", ["iTXt", "zTXt", "iCCP"])
def test_large_texts_do_not_keep_the_pixels_from_being_read(tmp_path: Path, kind: str, place: str):
    """As 2 MB of XMP, or a bomb that is never unpacked."""
    image = random_image(20, 10)
    content = save(tmp_path, image).read_bytes()
    text = zlib.compress(bytes(2_000_000))
    head = {"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0", "zTXt": b"Comment\0\0", "iCCP": b"profile\0\0"}[kind]
    at = content.index(b"IDAT" if place == "before" or kind == "iCCP" else b"IEND") - 4
    (tmp_path / "x.png").write_bytes(content[:at] + png_chunk(kind.encode(), head + text) + content[at:])
    read, note = read_image(tmp_path / "x.png", 3)
    assert note == ""
    assert np.array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.filterwarnings("error")
def test_large_images_are_read_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Smaller ones stand in for aerial pictures of 15000x15000 px."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    file = save(tmp_path, random_image(200, 100))
    assert read_image(file, 3)[0].size == (200, 100)
    assert halves(read_image(file, 3)[0])[0].size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(images, "memory_bytes", lambda device: 200_000)
    with pytest.raises(InputError, match=r"200x100 px take 0\.0 GiB, and this machine has 0\.0; scale it down"):
        read_image(file, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    at_work, most = [0], [0]
    convert = images._convert

    def watched(*args: Any) -> Any:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        time.sleep(0.01)
        at_work[0] -= 1
        return convert(*args)

    monkeypatch.setattr(images, "LARGE", 100)
    monkeypatch.setattr(images, "_convert", watched)
    file = save(tmp_path, random_image(20, 10))
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda _: read_image(file, 3), range(8)))) == 8
    assert most == [1]
    assert Image.MAX_IMAGE_PIXELS is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_an_aerial_picture(tmp_path: Path):
    read, _ = read_image(save(tmp_path, Image.new("RGB", (15000, 15000), "red")), 3)
    assert read.size == (15000, 15000)


def tiff(bands: int, bits: int) -> bytes:
    """A TIFF of 8x8 px written by hand, since Pillow writes none of so many bands."""
    pixels = bytes(8 * 8 * bands * bits // 8)
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, bands, 300), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 400), (277, 3, 1, bands), (278, 3, 1, 8), (279, 4, 1, len(pixels))]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return head.ljust(300, b"\0") + struct.pack(f"<{bands}H", *[bits] * bands).ljust(100, b"\0") + pixels


@pytest.mark.parametrize(("bands", "bits"), [(4, 16), (5, 8), (5, 16), (13, 16), (3, 32)])
def test_tiffs_of_many_bands_are_told(tmp_path: Path, bands: int, bits: int):
    (tmp_path / "x.tif").write_bytes(tiff(bands, bits))
    with pytest.raises(InputError, match=f"a TIFF of {bands} bands of {bits} bits is not read; expected 1 to 4 of 8"):
        read_image(tmp_path / "x.tif", 3)


@pytest.mark.parametrize("value", [0, 1, 9, 99, "6", b"\6"])
def test_an_orientation_tag_that_turns_nothing_is_not_said(tmp_path: Path, value: object):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    kind = {int: TiffTags.SHORT, str: TiffTags.ASCII, bytes: TiffTags.BYTE}[type(value)]
    tags.tagtype[0x0112] = kind
    tags[0x0112] = value
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags.tobytes(8)
    random_image(20, 10).save(tmp_path / "x.jpg", exif=exif)
    image, note = read_image(tmp_path / "x.jpg", 3)
    assert (image.size, note) == ((20, 10), "")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("value", range(2, 9))
def test_orientation_tags_are_applied(tmp_path: Path, suffix: str, value: int):
    exif = Image.Exif()
    exif[0x0112] = value
    image = random_image(20, 10)
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    read, note = read_image(tmp_path / f"x.{suffix}", 3)
    assert note == "orientation tag"
    assert read.size == ((10, 20) if value > 4 else (20, 10))
    assert np.asarray(read).sum() == np.asarray(image).sum()


def test_want_of_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_memory(*args: object) -> None:
        raise MemoryError

    file = save(tmp_path, random_image(20, 10))
    monkeypatch.setattr(Image.Image, "convert", no_memory)
    with pytest.raises(InputError, match="there is not enough memory"):
        read_image(file, 3)


def test_a_jpeg_named_jfif(tmp_path: Path):
    random_image(8, 8).save(tmp_path / "x.JFIF", "JPEG")
    assert has_image_name("x.JFIF")
    assert read_image(tmp_path / "x.JFIF", 3)[0].size == (8, 8)


def test_a_conversion_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As Pillow's from La to L was."""

    def refuse(image: Image.Image, mode: str) -> None:
        raise ValueError(f"conversion from {image.mode} to {mode} not supported")

    file = save(tmp_path, random_image(20, 10))
    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(InputError, match="cannot be decoded: conversion from RGB to L not supported"):
        read_image(file, 1)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    with open(tmp_path / "x.png", "wb") as stream:
        stream.truncate(2**40)  # a hole, which takes no room on disk
    with pytest.raises(InputError, match=r"is too large: 1024\.0 GiB, expected at most 1"):
        read_image(tmp_path / "x.png", 3)


def test_damaged_tags_do_not_keep_the_pixels_from_being_read(tmp_path: Path):
    image = random_image(20, 10)
    file = save(tmp_path, image, exif=b"Exif\0\0MM;*\0\0\0\x08")
    read, note = read_image(file, 3)
    assert note == "damaged tags"
    assert np.array_equal(np.asarray(read), np.asarray(image))
