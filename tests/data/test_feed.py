import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_image
from PIL import Image

from fastp2p.data import PairFormat, batches_per_epoch, eval_batches, load_split, train_crops
from fastp2p.data import feed as dataset_module
from fastp2p.data.jitter import epoch_order, jitter
from fastp2p.data.splits import TrainData
from fastp2p.errors import InputError, UnreadablePair

FORMAT = PairFormat("AtoB", 36)


def batches(dataset, **changes):
    options = {"seed": 5, "epoch": 2, "batch_size": 2, "crop_size": 32, "flip": True} | changes
    return [crops.cut("cpu") for crops in train_crops(dataset, **options)]


def test_jitter_equals_pil_bit_for_bit(aligned: Path):
    """Upstream's get_transform on each half: PIL bicubic resize, crop, flip, ToTensor, Normalize."""
    dataset = load_split(str(aligned), "train", FORMAT)
    order = epoch_order(5, 2, 6)
    seen = [pair for batch in batches(dataset) for pair in zip(*batch.values(), strict=True)]
    for i, (real_A, real_B) in zip(order, seen, strict=True):
        both = Image.open(aligned / "train" / f"{i}.png")
        top, left, flipped = jitter(5, 2, int(i), span=4, flip=True)
        for x, half in ((real_A, (0, 0, 40, 40)), (real_B, (40, 0, 80, 40))):
            image = both.crop(half).resize((36, 36), Image.Resampling.BICUBIC)
            image = image.crop((left, top, left + 32, top + 32))
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image
            expected = (np.asarray(image).astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
            assert np.array_equal(x.permute(1, 2, 0).numpy(), expected)


def test_streamed_equals_resident(aligned: Path):
    resident = load_split(str(aligned), "train", FORMAT, stream="never")
    streamed = load_split(str(aligned), "train", FORMAT, stream="always")
    assert resident.resident is not None
    assert streamed.resident is None
    for one, other in zip(batches(resident), batches(streamed), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one.values(), other.values(), strict=True))


def test_what_does_not_fit_is_streamed(aligned: Path, monkeypatch: pytest.MonkeyPatch):
    size = 6 * 36 * 36 * 6
    monkeypatch.setattr(dataset_module, "DECODING_BYTES_PER_PIXEL", 0)
    monkeypatch.setattr(dataset_module, "memory_bytes", lambda device: 2 * size)
    assert load_split(str(aligned), "train", FORMAT).resident is not None
    monkeypatch.setattr(dataset_module, "memory_bytes", lambda device: 2 * size - 2)
    assert load_split(str(aligned), "train", FORMAT).resident is None


@pytest.mark.parametrize("stream", ["always", "never"])
def test_sizes_beyond_the_memory_are_told(aligned: Path, stream: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"6 pairs at 1000000x1000000 px take .* GiB, .*; choose a smaller size"):
        load_split(str(aligned), "train", replace(FORMAT, load_size=10**6), stream=stream)

    def no_memory(*args: object) -> None:
        raise MemoryError

    dataset = load_split(str(aligned), "train", FORMAT, stream="always")
    monkeypatch.setattr(Image.Image, "resize", no_memory)
    with pytest.raises(InputError, match="data: there is not enough memory to resize pairs to 36x36 px"):
        load_split(str(aligned), "train", FORMAT, stream=stream, skip_bad=True)
    with pytest.raises(InputError, match="data: there is not enough memory to resize pairs to 36x36 px"):
        batches(dataset)


@pytest.mark.parametrize("stream", ["always", "never"])
def test_an_epoch_can_be_entered_anywhere(aligned: Path, stream: str):
    dataset = load_split(str(aligned), "train", FORMAT, stream=stream)
    whole = batches(dataset)
    for first in range(len(whole) + 1):
        rest = batches(dataset, first=first)
        assert len(rest) == len(whole) - first
        assert all(torch.equal(a["A"], b["A"]) for a, b in zip(rest, whole[first:], strict=True))


def test_last_batch_is_smaller(aligned: Path):
    dataset = load_split(str(aligned), "train", FORMAT)
    assert [len(batch["A"]) for batch in batches(dataset, batch_size=4)] == [4, 2]
    assert batches_per_epoch(dataset, 4) == 2


def test_direction_swaps_input_and_target(aligned: Path):
    forward = list(eval_batches(load_split(str(aligned), "val", FORMAT)))
    backward = list(eval_batches(load_split(str(aligned), "val", replace(FORMAT, direction="BtoA"))))
    assert torch.equal(forward[0]["A"], backward[0]["B"])
    assert torch.equal(forward[0]["B"], backward[0]["A"])


def test_channel_counts_follow_the_direction(aligned: Path):
    format = PairFormat("BtoA", 36, input_nc=1, output_nc=3)
    real_A, real_B = next(eval_batches(load_split(str(aligned), "val", format))).values()
    assert real_A.shape[1] == 1
    assert real_B.shape[1] == 3
    colour = next(eval_batches(load_split(str(aligned), "val", replace(format, input_nc=3))))["A"]
    luma = (colour * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    assert (luma - real_A).abs().max() < 3 / 127.5  # each is rounded to 8 bits, before and after resizing


def test_odd_width_splits_as_upstream(tmp_path: Path):
    (tmp_path / "val").mkdir()
    random_image(81, 40).save(tmp_path / "val" / "x.png")
    A, B = next(eval_batches(load_split(str(tmp_path), "val", FORMAT))).values()
    both = Image.open(tmp_path / "val" / "x.png")
    for x, half in ((A, (0, 0, 40, 40)), (B, (40, 0, 81, 40))):
        expected = both.crop(half).resize((36, 36), Image.Resampling.BICUBIC)
        assert np.array_equal(((x[0] + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.fixture
def damaged(two_folders: Path) -> Path:
    """Ten good pairs of which six go bad, each in its own way, and one file without a partner."""
    train = two_folders / "train"
    for i in range(4, 10):
        random_image(40, 40).save(train / "A" / f"{i}.jpg")
        random_image(40, 40).save(train / "B" / f"{i}.png")
    (train / "A" / "4.jpg").write_bytes(b"")
    (train / "B" / "5.png").write_bytes((train / "B" / "5.png").read_bytes()[:-60])
    (train / "A" / "6.jpg").write_text("no image")
    random_image(8, 8).save(train / "B" / "7.png")
    random_image(40, 60).save(train / "B" / "8.png")
    (train / "B" / "9.png").unlink()
    return two_folders


def test_one_error_names_all_that_is_wrong(damaged: Path):
    with pytest.raises(InputError) as error:
        load_split(str(damaged), "train", replace(FORMAT, min_side=16))
    text = str(error.value)
    for part in (
        "6 of 10 cannot be used",
        "train/4: the file is empty",
        "train/5: cannot be decoded",
        "train/6: cannot be decoded: no JPEG, PNG",
        "train/7: B is too small: 8x8 px, expected at least 16 a side",
        "train/8: A is 40x40 and B 40x60 px: not the same frame",
        "train/A/9.jpg: has no partner 9.* in train/B",
        "add --skip-bad to go on with the other 4",
    ):
        assert part in text, text


@pytest.mark.parametrize("stream", ["always", "never"])
def test_skip_bad_trains_on_the_rest(damaged: Path, stream: str):
    dataset = load_split(str(damaged), "train", replace(FORMAT, min_side=16), skip_bad=True, stream=stream)
    assert [pair.name for pair in dataset.pairs] == [f"train/{i}" for i in range(4)]
    assert len(dataset.skipped) == 6
    clean = [batch["A"] for batch in eval_batches(dataset, batch_size=1)]
    for i, A in enumerate(clean):
        image = Image.open(damaged / "train" / "A" / f"{i}.jpg").resize((36, 36), Image.Resampling.BICUBIC)
        assert np.array_equal(((A[0] + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_streamed_pair_that_vanishes_is_named(aligned: Path):
    dataset = load_split(str(aligned), "train", FORMAT, stream="always")
    (aligned / "train" / "3.png").unlink()
    for read in (lambda: batches(dataset), lambda: list(eval_batches(dataset))):
        with pytest.raises(UnreadablePair, match=r"data: train/3\.png: cannot be read: No such file.*Bring it back"):
            read()


def test_a_streamed_pair_of_two_files_that_vanishes_is_named(two_folders: Path):
    dataset = load_split(str(two_folders), "train", FORMAT, stream="always")
    (two_folders / "train" / "B" / "1.png").write_bytes(b"")
    with pytest.raises(UnreadablePair, match=r"train/1: the file is empty \(zero bytes\) \(B/1\.png\)"):
        batches(dataset)


def test_another_pair_stands_in_for_a_vanished_one(aligned: Path):
    said: list[str] = []
    dataset = load_split(str(aligned), "train", FORMAT, stream="always", skip_bad=True, say=said.append)
    whole, order = batches(dataset, batch_size=1), epoch_order(5, 2, 6).tolist()
    for i in (3, 4):
        (aligned / "train" / f"{i}.png").unlink()
    for _ in range(2):
        rest = batches(dataset, batch_size=1)
        assert len(rest) == 6
        for i, before, after in zip(order, whole, rest, strict=True):
            assert torch.equal(before["A"], after["A"]) == (i not in (3, 4))
    assert sorted(said) == [f"skipped train/{i}.png: cannot be read: No such file or directory" for i in (3, 4)]
    assert [pair.name for pair in dataset.pairs if pair.name in dataset.skipped] == ["train/3.png", "train/4.png"]

    image = Image.open(aligned / "train" / "5.png").crop((0, 0, 40, 40)).resize((36, 36), Image.Resampling.BICUBIC)
    [stand_in] = dataset.assemble([3], dataset.read([3]), replace=True)
    assert np.array_equal(stand_in[:, :, :3].numpy(), np.asarray(image))


def test_scores_do_without_a_vanished_pair(aligned: Path):
    dataset = load_split(str(aligned), "train", FORMAT, stream="always", skip_bad=True)
    whole = [batch["A"] for batch in eval_batches(dataset, batch_size=1)]
    for i in (0, 1, 3):
        (aligned / "train" / f"{i}.png").unlink()
    rest = [batch["A"] for batch in eval_batches(dataset, batch_size=2)]
    assert [len(A) for A in rest] == [1, 2]  # none of 0 and 1 is left
    assert torch.equal(torch.cat(rest), torch.cat([whole[i] for i in (2, 4, 5)]))


def test_a_share_that_is_gone_ends_the_run_even_when_skipping(aligned: Path):
    dataset = load_split(str(aligned), "train", FORMAT, stream="always", skip_bad=True)
    (aligned / "train").rename(aligned / "gone")
    for read in (lambda: batches(dataset), lambda: list(eval_batches(dataset))):
        with pytest.raises(UnreadablePair, match="none of the 6 pairs can be read any more"):
            read()


def test_names_move_no_cursor_and_break_no_line(aligned: Path):
    (aligned / "train" / "a\x1b[31m\nb.png").touch()
    with pytest.raises(InputError, match=r"train/a\\x1b\[31m\\nb\.png: the file is empty"):
        load_split(str(aligned), "train", FORMAT)


def test_nothing_left_is_an_error_even_when_skipping(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x.png").touch()
    with pytest.raises(InputError, match="Nothing is left"):
        load_split(str(tmp_path), "train", FORMAT, skip_bad=True)


def test_a_name_that_is_no_utf_8(aligned: Path):
    (aligned / "train" / "0.png").rename(aligned / "train" / os.fsdecode(b"caf\xe9.png"))
    data = TrainData(load_split(str(aligned), "train", FORMAT), None, [])
    assert data.fingerprint.startswith("6 pairs ")


def test_zip_with_a_damaged_directory(aligned: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(aligned / "train" / "0.png", "train/0.png")
    content = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(content.replace(b"PK\x01\x02", b"\0K\x01\x02"))
    with pytest.raises(InputError, match=r"x\.zip: is a damaged \.zip .*; copy or make it again"):
        load_split(str(tmp_path / "x.zip"), "train", FORMAT)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_with_a_damaged_member(aligned: Path, tmp_path: Path, method: int):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for file in (aligned / "train").iterdir():
            archive.write(file, f"train/{file.name}")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[60:240] = bytes(x ^ 0x5A for x in content[60:240])  # within the first member's data
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"1 of 6 cannot be used.*\n.*png: cannot be read"):
        load_split(str(tmp_path / "x.zip"), "train", FORMAT)
    assert len(load_split(str(tmp_path / "x.zip"), "train", FORMAT, skip_bad=True)) == 5


def test_single_photos_among_aligned_pairs_are_said(tmp_path: Path):
    (tmp_path / "train").mkdir()
    random_image(40, 40).save(tmp_path / "train" / "x.png")
    dataset = load_split(str(tmp_path), "train", FORMAT)
    assert dataset.notes == {"no wider than tall: is B really beside A?": 1}


def test_conversions_are_counted(two_folders: Path):
    file = two_folders / "train" / "B" / "0.png"
    Image.open(file).convert("P").save(file)
    assert load_split(str(two_folders), "train", FORMAT).notes == {"converted: B palette": 1}


@pytest.mark.parametrize(
    "levels", [range(17), range(19), [*range(19), 255], [0, 1], [0, 1, 255], [0, *range(128, 141)], [7]]
)
def test_pictures_that_use_little_of_the_range_are_warned_of(two_folders: Path, levels: list[int]):
    """The first ones are 12 bits in files of 16, the second ones class numbers without and with "ignore"."""
    for i in range(4):
        values = np.random.default_rng(i).choice(np.array(levels, np.uint8), (40, 40))
        Image.fromarray(values).save(two_folders / "train" / "B" / f"{i}.png")
    [warning] = load_split(str(two_folders), "train", FORMAT).warnings
    assert f"of B together use {len(levels)} of 256 levels, {levels[0]} to {levels[-1]}" in warning


def test_12_bits_in_files_of_16_are_warned_of(two_folders: Path):
    for i in range(4):
        values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
        (two_folders / "train" / "A" / f"{i}.jpg").unlink()
        Image.fromarray(values).save(two_folders / "train" / "A" / f"{i}.png")
    [warning] = load_split(str(two_folders), "train", FORMAT).warnings
    assert "of A together use 17 of 256 levels, 0 to 16, 6% of the range" in warning
    assert "times 16" in warning


@pytest.mark.parametrize(
    "levels", [[0, 255], [0, 128, 255], [0, 254, 255], [0, 64, 128, 192], range(0, 256, 8), range(90, 155)]
)
def test_masks_colours_and_dull_pictures_are_not_warned_of(two_folders: Path, levels: list[int]):
    for i in range(4):
        values = np.random.default_rng(i).choice(np.array(levels, np.uint8), (40, 40))
        Image.fromarray(values).save(two_folders / "train" / "B" / f"{i}.png")
    assert load_split(str(two_folders), "train", FORMAT).warnings == []


def test_a_long_list_of_bad_files_is_cut(two_folders: Path):
    for i in range(100, 140):
        random_image(8, 8).save(two_folders / "train" / "A" / f"{i}.png")
        (two_folders / "train" / f"{'AB'[i % 2]}" / f"empty {i}.png").touch()
    for i in range(3):
        (two_folders / "train" / "B" / f"{i}.png").write_bytes(b"")
    with pytest.raises(InputError) as error:
        load_split(str(two_folders), "train", FORMAT)
    lines = str(error.value).splitlines()
    assert lines[0] == "data: 83 of 84 cannot be used:"
    assert sum("has no partner" in line for line in lines) == 10
    assert "  and 70 more of the same kind" in lines
    assert sum("the file is empty" in line for line in lines) == 3
    assert len(lines) == 16


def test_fingerprint_sees_a_changed_picture(aligned: Path):
    def fingerprint() -> tuple[str, str]:
        names, _, pictures = TrainData(load_split(str(aligned), "train", FORMAT), None, []).fingerprint.partition(", ")
        return names, pictures

    before = fingerprint()
    assert fingerprint() == before
    random_image(80, 40, seed=99).save(aligned / "train" / "3.png")
    assert fingerprint()[0] == before[0]
    assert fingerprint()[1] != before[1]


def test_builtin_set():
    for split, count in (("train", 600), ("val", 60), ("test", 60)):
        dataset = load_split("builtin:emoji", split, PairFormat("AtoB", 128))
        assert len(dataset) == count
        assert not dataset.skipped
        assert not dataset.notes
    names = {
        split: {pair.name.split("/")[1].split("-")[0] for pair in load_split("builtin:emoji", split, FORMAT).pairs}
        for split in ("train", "val", "test")
    }
    assert not names["train"] & names["val"]
    assert not names["train"] & names["test"]
    assert not names["val"] & names["test"]


def test_facades(facades: Path):
    dataset = load_split(str(facades), "val", PairFormat("BtoA", 256))
    assert len(dataset) == 68
    labels = next(eval_batches(dataset))["A"][0]
    assert labels[2].max() > labels[0].median()  # the label image is mostly blue


def test_camvid_palettes_show_as_colours(camvid: Path):
    dataset = load_split(str(camvid), "val", PairFormat("AtoB", 256))
    assert dataset.notes == {"converted: B palette": 101}
    labels = dataset.resident[0, :, :, 3:].reshape(-1, 3)
    sky, road = torch.tensor([128, 128, 128]), torch.tensor([128, 64, 128])
    assert (labels == sky).all(1).sum() > 100
    assert (labels == road).all(1).sum() > 100
