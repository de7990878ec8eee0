import shutil
import zipfile
from pathlib import Path

import pytest

from fastp2p.data.pairs import find_pairs, has_split, open_root
from fastp2p.errors import InputError


def test_aligned(aligned: Path):
    pairs, bad, others = find_pairs(open_root(str(aligned)), "train")
    assert [pair.name for pair in pairs] == [f"train/{i}.png" for i in range(6)]
    assert pairs[0].B is None
    assert not bad
    assert not others


def test_two_folders_match_by_stem(two_folders: Path):
    pairs, bad, _ = find_pairs(open_root(str(two_folders)), "train")
    assert [(pair.name, pair.A.name, pair.B.name) for pair in pairs] == [
        (f"train/{i}", f"{i}.jpg", f"{i}.png") for i in range(4)
    ]
    assert not bad


def test_unmatched_and_ambiguous_are_listed(two_folders: Path):
    train = two_folders / "train"
    (train / "B" / "1.png").unlink()
    (train / "A" / "2.jpg").unlink()
    shutil.copy(train / "A" / "3.jpg", train / "A" / "3.jpeg")
    pairs, bad, _ = find_pairs(two_folders, "train")
    assert [pair.name for pair in pairs] == ["train/0"]
    assert bad == {
        "train/A/1.jpg": "has no partner 1.* in train/B",
        "train/B/2.png": "has no partner 2.* in train/A",
        "train/3": "is ambiguous: A/3.jpeg, A/3.jpg, B/3.png",
    }


def test_other_files_are_named_and_hidden_ones_passed_over(aligned: Path):
    (aligned / "train" / "notes.txt").touch()
    (aligned / "train" / ".DS_Store").touch()
    (aligned / "train" / "._0.png").touch()
    pairs, _, others = find_pairs(aligned, "train")
    assert len(pairs) == 6
    assert others == ["train/notes.txt"]


def test_zip_with_or_without_a_top_folder(aligned: Path, tmp_path: Path):
    for top in ("", "pairs/"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in aligned.rglob("*.png"):
                archive.write(file, top + str(file.relative_to(aligned)))
        root = open_root(str(tmp_path / "x.zip"))
        assert has_split(root, "val")
        assert not has_split(root, "test")
        assert len(find_pairs(root, "train")[0]) == 6


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        ([], "train", "has no folder train/ (it holds nothing)"),
        (["val/x.png"], "train", "has no folder train/ (it holds val/)"),
        (["train/notes.txt"], "train", "holds no images but notes.txt"),
        (["train/a/x.png", "train/b/x.png"], "train", "holds no images but a/, b/"),
        (["train/A/x.png"], "train", "B/ is missing"),
    ],
)
def test_wrong_folders_are_told_with_the_layouts(tmp_path: Path, make: list[str], split: str, message: str):
    for name in make:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError) as error:
        find_pairs(tmp_path, split)
    assert message in str(error.value)
    assert "DIR/train/A/NAME.jpg" in str(error.value)


@pytest.mark.parametrize("data", ["nowhere", "builtin:cats", __file__])
def test_no_such_data(data: str):
    with pytest.raises(InputError, match="data: got"):
        open_root(data)
