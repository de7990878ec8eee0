"""Make emoji.zip, the built-in set: flat drawing (A) -> 3D render (B) of Microsoft's Fluent Emoji.

    pip install resvg_py
    python fastp2p/data/builtin/make_emoji.py        # needs npm; rewrites emoji.zip beside this file

Source: the npm packages named below, which repackage github.com/microsoft/fluentui-emoji (MIT, see LICENSE-emoji.txt).
One pair per first code point, so that variants of one emoji (skin tone, gender) never straddle two splits. The flat
and the 3D artist did not always draw the same pose, so the 720 pairs whose silhouettes agree best are kept.
"""

import hashlib
import io
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

PACKAGES = {"flat": "@lobehub/fluent-emoji-flat@1.1.0", "3d": "@lobehub/fluent-emoji-3d@1.1.0"}
SIDE = 128  # px
SPLITS = {"val": 60, "test": 60, "train": 600}
FLAT_COLOURS = 48  # a flat drawing has few colours: a palette, stored without loss, keeps its edges sharp
RENDER_QUALITY = 88  # WebP quality of the 3D renders


def download(package: str, folder: Path) -> dict[str, bytes]:
    """The files under assets/ of an npm package, by stem (hyphenated code points)."""
    name = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
    with tarfile.open(folder / name.stdout.strip()) as tar:
        files = [m for m in tar.getmembers() if m.isfile() and "/assets/" in m.name]
        return {Path(m.name).stem: tar.extractfile(m).read() for m in files}  # type: ignore[union-attr]


def on_white(image: Image.Image) -> Image.Image:
    """RGBA on a white ground, SIDE x SIDE."""
    image = image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB")


def silhouette_iou(a: Image.Image, b: Image.Image) -> float:
    """Intersection over union of the two images' pixels that are not white."""
    mask_a, mask_b = (np.asarray(image).min(-1) < 240 for image in (a, b))
    return float((mask_a & mask_b).sum() / max(1, (mask_a | mask_b).sum()))


def make_pairs() -> dict[str, tuple[Image.Image, Image.Image]]:
    """The pairs with the best silhouette agreement, one per first code point."""
    with tempfile.TemporaryDirectory() as folder:
        flat, render = (download(package, Path(folder)) for package in PACKAGES.values())
    names: dict[str, str] = {}  # first code point -> its plainest emoji: the shortest name
    for name in sorted(flat.keys() & render.keys(), key=lambda name: (len(name), name)):
        names.setdefault(name.split("-")[0], name)

    pairs, agreement = {}, {}
    for name in names.values():
        svg = resvg_py.svg_to_bytes(svg_string=flat[name].decode(), width=4 * SIDE, height=4 * SIDE)
        pair = on_white(Image.open(io.BytesIO(svg))), on_white(Image.open(io.BytesIO(render[name])))
        pairs[name], agreement[name] = pair, silhouette_iou(*pair)
    best = sorted(pairs, key=lambda name: -agreement[name])[: sum(SPLITS.values())]
    print(f"{len(best)} of {len(pairs)} pairs kept, silhouette IoU >= {agreement[best[-1]]:.3f}")
    return {name: pairs[name] for name in best}


def webp(image: Image.Image, **options: object) -> bytes:
    """The image as a WebP file."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=6, **options)
    return buffer.getvalue()


def write_zip(pairs: dict[str, tuple[Image.Image, Image.Image]], path: Path) -> None:
    """Write SPLIT/A/NAME.webp and SPLIT/B/NAME.webp, the same bytes on every run."""
    names = sorted(pairs, key=lambda name: hashlib.sha256(name.encode()).digest())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for split, count in SPLITS.items():
            chosen, names = sorted(names[:count]), names[count:]
            for name in chosen:
                flat, render = pairs[name]
                flat = flat.quantize(FLAT_COLOURS, dither=Image.Dither.NONE).convert("RGB")
                files = {"A": webp(flat, lossless=True), "B": webp(render, quality=RENDER_QUALITY)}
                for side, content in files.items():
                    archive.writestr(zipfile.ZipInfo(f"{split}/{side}/{name}.webp"), content)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    write_zip(make_pairs(), Path(__file__).with_name("emoji.zip"))
