import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_image
from PIL import Image

from fastp2p.data.images import read_image, to_array, to_image, to_tensor
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
