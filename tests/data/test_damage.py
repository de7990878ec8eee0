"""Randomly damaged images and archives: each gives a sentence or a right result, and nothing else escapes."""

import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import random_image
from PIL import Image

from fastp2p.data import PairFormat, eval_batches, load_split
from fastp2p.data.images import read_image
from fastp2p.errors import InputError

QUICK, WHOLE = 60, 2000  # damaged files of each kind
METHODS = {
    "stored": zipfile.ZIP_STORED,
    "deflate": zipfile.ZIP_DEFLATED,
    "bzip2": zipfile.ZIP_BZIP2,
    "lzma": zipfile.ZIP_LZMA,
}


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x010F] = "a camera"
    return tags


def images() -> dict[str, bytes]:
    """One small file of each kind, as Pillow writes it."""
    rgb = random_image(80, 40)
    deep = Image.fromarray(np.arange(3200, dtype=np.uint16).reshape(40, 80) * 20)
    made: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "jpeg": (rgb, "JPEG", {}),
        "jpeg with tags": (rgb, "JPEG", {"exif": exif(), "progressive": True, "icc_profile": bytes(300)}),
        "jpeg of CMYK": (rgb.convert("CMYK"), "JPEG", {}),
        "png": (rgb, "PNG", {}),
        "png with tags": (rgb.convert("RGBA"), "PNG", {"exif": exif(), "icc_profile": bytes(300)}),
        "png of a palette": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "png of 16 bits": (deep, "PNG", {}),
        "png of 1 bit": (rgb.convert("1"), "PNG", {}),
        "webp": (rgb, "WEBP", {}),
        "webp, moving": (rgb, "WEBP", {"save_all": True, "append_images": [random_image(80, 40, seed=1)]}),
        "webp with tags": (rgb.convert("RGBA"), "WEBP", {"lossless": True, "exif": exif()}),
        "tiff": (rgb, "TIFF", {"exif": exif()}),
        "tiff by LZW": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "tiff by JPEG": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff of 16 bits": (deep, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "bmp": (rgb, "BMP", {}),
        "bmp of a palette": (rgb.convert("P"), "BMP", {}),
    }
    contents = {}
    for kind, (image, format, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        contents[kind] = buffer.getvalue()
    return contents


IMAGES = images()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One of seven damages, mostly near the start or the end, where the heads and the directories are."""
    data, size = bytearray(content), len(content)
    reach = size if rng.random() < 0.4 else min(size, 200)
    at = int(rng.integers(reach))
    at = size - 1 - at if rng.random() < 0.3 else at
    run = slice(at, at + int(rng.integers(1, 40)))
    match rng.integers(7):
        case 0:
            for position in rng.integers(0, size, 3):
                data[position] = rng.integers(256)
        case 1:
            data[at] ^= 1 << int(rng.integers(8))
        case 2:
            del data[at:]
        case 3:
            data[run] = bytes(len(data[run]))
        case 4:
            del data[run]
        case 5:
            data[at:at] = rng.bytes(8)
        case _:
            data[at : at + 4] = int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 70000])).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture(autouse=True)
def _no_words_of_pillows() -> Iterator[None]:
    """Pillow warns of damaged tags, which is right, and of each pixel too many, which is ours to tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def assert_a_sentence(error: InputError) -> None:
    text = str(error)
    assert len(text) > 15
    assert "Traceback" not in text
    assert "object at 0x" not in text


def check_image(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    for channels in (3, 1):
        try:
            image, _ = read_image(file, channels)
        except InputError as error:
            assert_a_sentence(error)
        else:
            assert image.mode == ("RGB" if channels == 3 else "L")
            np.asarray(image)


def check_set(file: Path, content: bytes) -> None:
    """The damaged image beside two good ones, through the data set: it is a pair, or skipped with a reason."""
    file.write_bytes(content)
    dataset = load_split(str(file.parents[1]), "train", PairFormat("AtoB", 16), skip_bad=True)
    assert len(dataset) + len(dataset.skipped) == 3
    assert sum(len(batch["A"]) for batch in eval_batches(dataset)) == len(dataset) >= 2


def check_zip(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        dataset = load_split(str(file), "train", PairFormat("AtoB", 16), skip_bad=True)
    except InputError as error:
        assert_a_sentence(error)
    else:
        assert sum(len(batch["A"]) for batch in eval_batches(dataset)) == len(dataset) >= 1


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    """Where a third pair goes."""
    (tmp_path / "set" / "train").mkdir(parents=True)
    for i in range(2):
        random_image(80, 40, seed=i).save(tmp_path / "set" / "train" / f"{i}.png")
    return tmp_path / "set" / "train" / "2.png"


def zipped(method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for kind in ("jpeg", "png", "bmp"):
            archive.writestr(f"train/{kind}.png", IMAGES[kind])
    return buffer.getvalue()


def damage(check: Callable[[Path, bytes], None], file: Path, content: bytes, seeds: range) -> None:
    for seed in seeds:
        print("damage of seed", seed)  # the last one is shown when the check fails
        check(file, damaged(content, np.random.default_rng(seed)))


@pytest.mark.parametrize("kind", IMAGES)
def test_damaged_images(tmp_path: Path, kind: str):
    damage(check_image, tmp_path / "x.img", IMAGES[kind], range(QUICK))


@pytest.mark.parametrize("kind", IMAGES)
def test_damaged_images_in_a_set(small_set: Path, kind: str):
    damage(check_set, small_set, IMAGES[kind], range(QUICK // 10))


@pytest.mark.parametrize("method", METHODS)
def test_damaged_archives(tmp_path: Path, method: str):
    damage(check_zip, tmp_path / "x.zip", zipped(METHODS[method]), range(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("kind", IMAGES)
def test_many_damaged_images(tmp_path: Path, small_set: Path, kind: str):
    damage(check_image, tmp_path / "x.img", IMAGES[kind], range(QUICK, WHOLE))
    damage(check_set, small_set, IMAGES[kind], range(QUICK, QUICK + WHOLE // 10))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_many_damaged_archives(tmp_path: Path, method: str):
    damage(check_zip, tmp_path / "x.zip", zipped(METHODS[method]), range(QUICK, WHOLE))
