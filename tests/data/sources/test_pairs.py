import errno
import os
import shutil
import stat
import zipfile
from pathlib import Path

import pytest

from fastp2p.data.sources.pairs import find_pairs, has_split, open_root
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


def test_two_spellings_of_an_accent_match(two_folders: Path):
    (two_folders / "train" / "A" / "0.jpg").rename(two_folders / "train" / "A" / "caf\u00e9.jpg")
    (two_folders / "train" / "B" / "0.png").rename(two_folders / "train" / "B" / "cafe\u0301.png")
    pairs, bad, _ = find_pairs(two_folders, "train")
    assert (len(pairs), bad) == (4, {})


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


def test_sub_folders_are_named_with_their_images(aligned: Path, two_folders: Path):
    (aligned / "train" / "city" / "inner").mkdir(parents=True)
    for name in ("0.png", "1.JPG", "inner/2.png", ".3.png", "x.gif"):
        (aligned / "train" / "city" / name).touch()
    (aligned / "train" / "x.gif").touch()
    assert find_pairs(aligned, "train")[2] == ["train/city/ (3 images)", "train/x.gif"]
    for file in (two_folders / "train" / "B" / "more" / "x.png", two_folders / "train" / "beside.png"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    pairs, bad, others = find_pairs(two_folders, "train")
    assert (len(pairs), bad, others) == (4, {}, ["train/beside.png", "train/B/more/ (1 image)"])


def test_sub_folders_of_a_zip_are_named_too(aligned: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("train/0.png", "train/city/1.png", "train/city/2.png", "train/x.gif"):
            archive.write(aligned / "train" / "0.png", name)
    assert find_pairs(open_root(str(tmp_path / "x.zip")), "train")[2] == ["train/city/ (2 images)", "train/x.gif"]


def test_links_to_nowhere_are_bad_files(aligned: Path, two_folders: Path):
    (aligned / "train" / "2.png").unlink()
    (aligned / "train" / "2.png").symlink_to("/not/mounted/2.png")
    (aligned / "train" / "itself.png").symlink_to("itself.png")
    pairs, bad, others = find_pairs(aligned, "train")
    assert len(pairs) == 5
    assert bad == {
        "train/2.png": "is a link to /not/mounted/2.png, which is not there",
        "train/itself.png": "is a link to itself.png, which is not there",
    }
    assert not others

    (two_folders / "train" / "A" / "1.jpg").unlink()
    (two_folders / "train" / "A" / "1.jpg").symlink_to("/not/mounted/1.jpg")
    pairs, bad, _ = find_pairs(two_folders, "train")
    assert len(pairs) == 3
    assert bad == {"train/A/1.jpg": "is a link to /not/mounted/1.jpg, which is not there"}


def test_links_to_files_and_folders_are_followed(aligned: Path, tmp_path: Path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(aligned / "train")
    (aligned / "train" / "more.png").symlink_to(aligned / "val" / "0.png")
    assert len(find_pairs(tmp_path / "linked", "train")[0]) == 7


@pytest.mark.parametrize("link", ["train", "val", "train/A"])
def test_folders_that_are_links_to_nowhere(two_folders: Path, link: str):
    folder = two_folders / link
    if folder.exists():
        shutil.rmtree(folder)
    folder.symlink_to("/not/mounted")
    with pytest.raises(InputError, match=f"{link} is a link to /not/mounted, which is not there"):
        find_pairs(two_folders, link.partition("/")[0])
    with pytest.raises(InputError, match="is a link to /not/mounted"):
        has_split(two_folders, link)


def test_a_pipe_is_a_bad_file(aligned: Path):
    os.mkfifo(aligned / "train" / "9.png")
    assert "named pipe" in find_pairs(aligned, "train")[1]["train/9.png"]


def test_links_within_a_zip_are_told(aligned: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(aligned / "train" / "0.png", "train/0.png")
        link = zipfile.ZipInfo("train/1.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "../elsewhere/1.png")
    pairs, bad, _ = find_pairs(open_root(str(tmp_path / "x.zip")), "train")
    assert len(pairs) == 1
    assert "is a link in the .zip" in bad["train/1.png"]


def test_what_may_not_be_read_is_told(aligned: Path, monkeypatch: pytest.MonkeyPatch):
    """As a user whom the permissions keep out; the tests may run as one whom they do not."""

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        with pytest.raises(InputError, match="Permission denied"):
            find_pairs(aligned, "train")
    monkeypatch.setattr(Path, "stat", refuse)
    for look in (lambda: find_pairs(aligned, "train"), lambda: has_split(aligned, "val"), lambda: open_root("x.zip")):
        with pytest.raises(InputError, match="Permission denied"):
            look()


def test_zip_with_or_without_a_top_folder(aligned: Path, tmp_path: Path):
    for top in ("", "pairs/"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in aligned.rglob("*.png"):
                archive.write(file, top + str(file.relative_to(aligned)))
        root = open_root(str(tmp_path / "x.zip"))
        assert has_split(root, "val")
        assert not has_split(root, "test")
        assert len(find_pairs(root, "train")[0]) == 6


@pytest.mark.parametrize("top", ["ok/", "train/", "val/"])
def test_zip_with_other_things_beside_the_one_folder(aligned: Path, tmp_path: Path, top: str):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("README.txt", "__MACOSX/ok/._0.png", ".DS_Store"):
            archive.writestr(name, "")
        for file in aligned.rglob("*.png"):
            archive.write(file, top + str(file.relative_to(aligned)))
    root = open_root(str(tmp_path / "x.zip"))
    assert has_split(root, "val")
    assert len(find_pairs(root, "train")[0]) == 6


@pytest.mark.parametrize("split", ["val", "test", "train", "holdout"])
def test_zip_of_a_single_split(aligned: Path, two_folders: Path, tmp_path: Path, split: str):
    for set_of_pairs, count in ((aligned, 6), (two_folders, 4)):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in (set_of_pairs / "train").rglob("*.*"):
                archive.write(file, f"{split}/{file.relative_to(set_of_pairs / 'train')}")
        assert len(find_pairs(open_root(str(tmp_path / "x.zip")), split)[0]) == count


def test_an_empty_split_is_none(aligned: Path, two_folders: Path, tmp_path: Path):
    (aligned / "empty").mkdir()
    (aligned / "hidden").mkdir()
    (aligned / "hidden" / ".gitkeep").touch()
    for side in "AB":
        (two_folders / "val" / side).mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("train/0.png", "")
        archive.writestr("val/", "")
    for root, split in ((aligned, "empty"), (aligned, "hidden"), (two_folders, "val"), (tmp_path / "x.zip", "val")):
        assert not has_split(open_root(str(root)), split)
        with pytest.raises(InputError, match=f"{split}/? is empty; expected"):
            find_pairs(open_root(str(root)), split)
    (aligned / "hidden" / "notes.txt").touch()
    assert has_split(aligned, "hidden")


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        ([], "train", "has no folder train/ (it holds nothing)"),
        (["val/x.png"], "train", "has no folder train/ (it holds val/)"),
        (["train/notes.txt"], "train", "holds no images but notes.txt"),
        (["train/a/x.png", "train/b/x.png"], "train", "holds no images but a/ (1 image), b/ (1 image)"),
        (["train/A/c/x.png", "train/B/c/x.png"], "train", "holds no images but A/c/ (1 image), B/c/ (1 image)"),
        (["train/.DS_Store"], "train", "train is empty"),
        (["train/A/x.png"], "train", "B/ is missing"),
    ],
)
def test_wrong_folders_are_told_with_the_layouts(tmp_path: Path, make: list[str], split: str, message: str):
    for name in make:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError) as error:
        find_pairs(tmp_path, split)
    assert message in str(error.value)
    assert "DIR/train/A/NAME.jpg" in str(error.value)


def test_a_zip_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "x.zip").touch()
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=r"x\.zip cannot be read: Permission denied"):
        open_root(str(tmp_path / "x.zip"))


@pytest.mark.parametrize("data", ["nowhere", "builtin:cats", __file__])
def test_no_such_data(data: str):
    with pytest.raises(InputError, match="data: got"):
        open_root(data)
