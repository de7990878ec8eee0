import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_image
from PIL import Image

from fastp2p.commands.translate import translate
from fastp2p.errors import InputError
from fastp2p.models.checkpoint import save_generator
from fastp2p.models.generate import generate
from fastp2p.models.pix2pix.generator import UnetGeneratorSpec
from fastp2p.nn.init import init_weights
from fastp2p.train.recorder import to_image


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    spec = UnetGeneratorSpec(levels=5, ngf=4, dropout="paper")
    netG = spec.build()
    init_weights(netG, 0.2)
    save_generator(tmp_path / "netG.safetensors", netG.state_dict(), spec)
    return tmp_path / "netG.safetensors"


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (3, 50), (101, 67)])
def test_output_has_the_input_s_size(model: Path, tmp_path: Path, size: tuple[int, int]):
    random_image(*size).save(tmp_path / "x.png")
    [written] = translate(model, [tmp_path / "x.png"], tmp_path / "out")
    assert written == tmp_path / "out" / "x.png"
    assert Image.open(written).size == size


def test_is_the_generator_on_the_normalised_image(model: Path, tmp_path: Path):
    from fastp2p.models.checkpoint import load_generator

    image = random_image(40, 36)
    image.save(tmp_path / "x.png")
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    for options in ({}, {"norm_stats": "running"}):
        [written] = translate(model, [tmp_path / "x.png"], tmp_path / "out", overwrite=True, **options)
        expected = to_image(generate(load_generator(model)[0], x, **options)[0])
        assert np.array_equal(np.asarray(Image.open(written)), np.asarray(expected))


def test_deterministic_unless_dropout_with_another_seed(model: Path, tmp_path: Path):
    random_image(64, 64).save(tmp_path / "x.png")

    def run(**options) -> bytes:
        return translate(model, [tmp_path / "x.png"], tmp_path / "out", overwrite=True, **options)[0].read_bytes()

    assert run() == run()
    assert run(dropout=True) == run(dropout=True)
    assert run(dropout=True) != run(dropout=True, seed=1)
    assert run(dropout=True) != run()


def test_resize_first(model: Path, tmp_path: Path):
    random_image(40, 20).save(tmp_path / "x.png")
    [written] = translate(model, [tmp_path / "x.png"], tmp_path / "out", size=64)
    assert Image.open(written).size == (64, 64)


def test_folders_kinds_and_names(model: Path, tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    random_image(20, 20).save(folder / "a.jpg")
    random_image(20, 20).convert("RGBA").save(folder / "a.png")
    random_image(20, 20).convert("L").save(folder / "b.tif")
    random_image(20, 20).convert("P").save(folder / "c.bmp")
    (folder / "notes.txt").touch()
    written = translate(model, [folder], tmp_path / "out")
    assert [path.name for path in written] == ["a.jpg.png", "a.png.png", "b.png", "c.png"]


def test_more_than_50_images(model: Path, tmp_path: Path):
    (tmp_path / "many").mkdir()
    for i in range(60):
        random_image(8, 8, seed=i).save(tmp_path / "many" / f"{i}.png")
    assert len(translate(model, [tmp_path / "many"], tmp_path / "out", say=lambda line: None)) == 60


def test_bad_files_do_not_stop_the_others(model: Path, tmp_path: Path):
    random_image(20, 20).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    files = [tmp_path / "bad.png", tmp_path / "good.png"]
    with pytest.raises(InputError, match=r"(?s)1 of 2 cannot be used.*bad\.png: the file is empty.*other 1 were") as _:
        translate(model, files, tmp_path / "out")
    assert (tmp_path / "out" / "good.png").exists()


def test_inputs_are_never_overwritten(model: Path, tmp_path: Path):
    random_image(20, 20).save(tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()
    with pytest.raises(InputError, match="would overwrite an input"):
        translate(model, [tmp_path / "x.png"], tmp_path)
    assert (tmp_path / "x.png").read_bytes() == before
    (tmp_path / "other").mkdir()
    random_image(20, 20).save(tmp_path / "other" / "x.png")
    with pytest.raises(InputError, match=r"two inputs are named x\.png"):
        translate(model, [tmp_path / "x.png", tmp_path / "other"], tmp_path / "out")


def test_what_is_there_is_kept(model: Path, tmp_path: Path):
    random_image(20, 20).save(tmp_path / "cat.jpg")
    (tmp_path / "cat.png").write_text("precious")
    with pytest.raises(InputError, match=r"cat\.png exists \(1 of 1 results do\); add --overwrite"):
        translate(model, [tmp_path / "cat.jpg"], tmp_path)
    assert (tmp_path / "cat.png").read_text() == "precious"
    translate(model, [tmp_path / "cat.jpg"], tmp_path, overwrite=True)
    assert Image.open(tmp_path / "cat.png").size == (20, 20)


def test_conversions_and_missing_dropout_are_said(model: Path, tmp_path: Path):
    random_image(20, 20).convert("P").save(tmp_path / "x.png")
    said: list[str] = []
    translate(model, [tmp_path / "x.png"], tmp_path / "out", say=said.append)
    assert said[0].endswith("(converted: palette)")
    spec = UnetGeneratorSpec(levels=3, ngf=4, dropout="upstream")
    save_generator(tmp_path / "shallow.safetensors", spec.build().state_dict(), spec)
    translate(tmp_path / "shallow.safetensors", [tmp_path / "x.png"], tmp_path / "o", dropout=True, say=said.append)
    assert "--dropout changes nothing: this generator has none" in said


def test_sizes_that_cannot_be_are_told(model: Path, tmp_path: Path):
    random_image(20, 20).save(tmp_path / "x.png")
    with pytest.raises(InputError, match="size: got 0, expected 1 px or more"):
        translate(model, [tmp_path / "x.png"], tmp_path / "out", size=0)
    with pytest.raises(InputError, match=r"1000000x1000000 px take \d+ GiB at least"):
        translate(model, [tmp_path / "x.png"], tmp_path / "out", size=10**6)
    with pytest.raises(InputError, match="got no images"):
        translate(model, [], tmp_path / "out")
    with pytest.raises(InputError, match=r"out: .*x\.png cannot be made"):
        translate(model, [tmp_path / "x.png"], tmp_path / "x.png")


def test_missing_and_empty_inputs_are_told(model: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no such file or folder"):
        translate(model, [tmp_path / "nothing.png"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        translate(model, [tmp_path / "empty"], tmp_path / "out")


def test_what_is_passed_over_in_a_folder_is_said(model: Path, tmp_path: Path):
    folder = tmp_path / "photos"
    (folder / "city").mkdir(parents=True)
    random_image(20, 20).save(folder / "a.png")
    for name in ("city/b.png", "city/c.jpg", "d.gif", "e.heic", ".f.png"):
        (folder / name).touch()
    said: list[str] = []
    assert len(translate(model, [folder], tmp_path / "out", say=said.append)) == 1
    assert said[-1].startswith("passed over 3 entries (sub-folders are not searched")
    assert said[-1].endswith(f"{folder}/city/ (2 images), {folder}/d.gif, {folder}/e.heic")
    (folder / "a.png").unlink()
    with pytest.raises(InputError, match=r"holds no images; passed over 3 entries.*city/ \(2 images\)"):
        translate(model, [folder], tmp_path / "out")


def test_links_to_nowhere_are_bad_files(model: Path, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    random_image(20, 20).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.png").symlink_to("/not/mounted/b.png")
    with pytest.raises(InputError, match=r"1 of 2 cannot.*\n.*b\.png: is a link to /not/mounted/b\.png, which is not"):
        translate(model, [tmp_path / "photos"], tmp_path / "out")
    assert (tmp_path / "out" / "a.png").exists()
    with pytest.raises(InputError, match="is a link to /not/mounted"):
        translate(model, [tmp_path / "photos" / "b.png"], tmp_path / "out")


@pytest.mark.parametrize("special", ["/dev/zero", "fifo.png"])
def test_pipes_and_devices_are_refused(model: Path, tmp_path: Path, special: str):
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(InputError, match="is a named pipe, a socket or a device"):
        translate(model, [tmp_path / special], tmp_path / "out")


def test_a_file_that_is_given_twice_is_translated_once(model: Path, tmp_path: Path):
    random_image(20, 20).save(tmp_path / "x.png")
    (tmp_path / "x2.png").symlink_to("x.png")
    inputs = [tmp_path / "x.png", tmp_path, tmp_path / "." / "x.png"]
    written = translate(model, inputs, tmp_path / "out")
    assert [path.name for path in written] == ["x.png", "x2.png"]


def test_results_do_not_go_among_the_inputs(model: Path, tmp_path: Path):
    random_image(20, 20).save(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="holds the inputs, so its results would be inputs the next time"):
        translate(model, [tmp_path], tmp_path / ".")


def test_names_move_no_cursor_and_break_no_line(model: Path, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    random_image(20, 20).save(tmp_path / "photos" / "a\x1b[31m\nb.png")
    (tmp_path / "photos" / "c\u202e.gif").touch()
    (tmp_path / "photos" / "d\r.png").touch()
    said: list[str] = []
    with pytest.raises(InputError) as error:
        translate(model, [tmp_path / "photos"], tmp_path / "out", say=said.append)
    assert r"a\x1b[31m\nb.png -> " in said[0]
    assert r"c\u202e.gif" in said[1]
    assert r"d\r.png: the file is empty" in str(error.value)
    assert (tmp_path / "out" / "a\x1b[31m\nb.png").exists()


def test_pillows_own_warnings_are_not_printed(model: Path, tmp_path: Path, fastp2p: Callable[..., Any]):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    random_image(20, 20).save(tmp_path / "x.jpg", exif=exif.tobytes()[:-6])
    result = fastp2p("translate", model, tmp_path / "x.jpg", "--out", tmp_path / "out")
    assert result.returncode == 0
    assert result.stderr == ""


@pytest.mark.parametrize("name", ["日本", "caf\udce9"])
def test_a_terminal_of_few_letters(
    model: Path, tmp_path: Path, fastp2p: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    (tmp_path / "photos").mkdir()
    for file in (f"{name}.png", "z.png"):
        random_image(20, 20).save(io := BytesIO(), "PNG")
        (tmp_path / "photos" / file).write_bytes(io.getvalue())
    result = fastp2p("translate", model, tmp_path / "photos", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert ascii(name)[1:-1] in result.stdout


def test_results_that_cannot_be_written_do_not_stop_the_others(model: Path, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for name in ("x" * 251 + ".jpg", "x" * 251 + ".png", "y.png"):  # two of one stem: their results keep the suffix
        random_image(20, 20).save(tmp_path / "photos" / name)
    with pytest.raises(InputError, match=r"2 of 3 cannot be used.*\n(.*File name too long.*\n)+The other 1 were"):
        translate(model, [tmp_path / "photos"], tmp_path / "out")
    assert (tmp_path / "out" / "y.png").exists()


def test_an_out_that_is_a_link_to_itself(model: Path, tmp_path: Path):
    random_image(20, 20).save(tmp_path / "x.png")
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(InputError, match="cannot be made"):
        translate(model, [tmp_path / "x.png"], tmp_path / "out")


def test_names_that_are_too_long_are_told(model: Path, tmp_path: Path):
    with pytest.raises(InputError, match="File name too long"):
        translate(model, [tmp_path / ("x" * 300)], tmp_path / "out")
