"""train.txt and val.txt of a folder that has none."""

import re
import shutil

import numpy as np
import pytest
from conftest import errors, save_mask, write_lines
from PIL import Image

import datasets
import prepare


def make(root, masked, bare=(), label=lambda name: 1):
    """A data set without lists: each mask shows class 0 and `label(name)`."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for name in [*masked, *bare]:
        Image.new("RGB", (4, 4)).save(root / "images" / f"{name}.png")
    for name in masked:
        save_mask(root / "masks" / f"{name}.png", np.eye(4) * label(name))
    write_lines(root / "classes.txt", ["road", "tree", "car"])
    return root


def split(script, root, *flags):
    """(train, val, what was printed)"""
    code, out, err = script(prepare, "split", "--data", root, *flags)
    assert code == 0, err
    return *((root / f"{name}.txt").read_text().split() for name in ("train", "val")), out


NAMES = [f"{'abcde'[i % 5]}{i}x" for i in range(20)]
FRAMES = [f"{video}_{i:03d}" for video, count in (("v1", 10), ("v2", 10), ("v3", 3), ("v4", 7)) for i in range(count)]


def test_every_image_is_in_one_list_and_val_has_masks_alone(script, tmp_path):
    bare = ["u1x", "u2x"]
    train, val, out = split(script, make(tmp_path / "d", NAMES, bare))
    assert sorted(train + val) == sorted(NAMES + bare) and {*val} < {*NAMES} and len(val) == 4
    assert "train.txt: 16 images with masks and 2 without" in out and "val.txt: 4 images (20.0% of" in out
    assert "next: python prepare.py check" in out and "warning" not in out
    dataset = datasets.Folder(tmp_path / "d")
    assert dataset.val == val and dataset.train == train


@pytest.mark.parametrize("fraction, count", [("0.001", 1), ("0.25", 5), ("0.5", 10), ("0.999", 19)])
def test_val_is_as_large_as_asked_and_neither_list_is_empty(script, tmp_path, fraction, count):
    assert len(split(script, make(tmp_path / "d", NAMES), "--val", fraction)[1]) == count


def test_the_seed_alone_decides(script, tmp_path):
    """Not the order of files, their times or the machine: this choice is pinned by the hash of seed and name."""
    one = split(script, make(tmp_path / "one", NAMES))[:2]
    assert split(script, make(tmp_path / "two", NAMES[::-1]))[:2] == one
    assert one[1] == sorted(sorted(NAMES, key=lambda name: datasets.digest(f"0 {name}"))[:4])
    assert split(script, tmp_path / "one", "--seed", "1", "--overwrite")[1] != one[1]
    assert split(script, tmp_path / "one", "--seed", "0", "--overwrite")[:2] == one


def test_frames_of_one_video_stay_together(script, tmp_path):
    root = make(tmp_path / "d", FRAMES)
    _, val, out = split(script, root)
    assert "warning: names look like frames of 4 videos, first 'v1'; add --by prefix" in out and len(val) == 6
    for flags in (["--by", "prefix"], ["--prefix", "[^_]+"], ["--prefix", "(v.)_"]):
        for seed in range(5):
            train, val, out = split(script, root, *flags, "--overwrite", "--seed", seed)
            assert not {name[:2] for name in val} & {name[:2] for name in train} and val and train
            assert "look like frames" not in out
            assert len(val) in (3, 7, 10)  # of 30; 6 are asked, and no two videos are nearer than one


def test_frames_without_masks_of_a_val_video_are_in_neither_list(script, tmp_path):
    """They would be unlabeled training images that look like those of val."""
    bare = [f"{video}_{i:03d}" for video in ("v1", "v2", "v3", "v4", "v5") for i in (50, 51)]
    root = make(tmp_path / "d", FRAMES, bare)
    for flags in (["--by", "prefix"], ["--prefix", "v[1-4]"]):
        train, val, out = split(script, root, *flags, "--overwrite")
        videos = {name[:2] for name in val}
        left_out = [name for name in bare if name[:2] in videos]
        assert left_out and sorted(train + val) == sorted({*FRAMES, *bare} - {*left_out})
        assert f"{len(left_out)} images without masks have a prefix of {root / 'val.txt'}" in out
    train, val, _ = split(script, root, "--overwrite")
    assert sorted(train + val) == sorted(FRAMES + bare)


@pytest.mark.parametrize("names", [[f"IMG_{i:04d}" for i in range(9)], [f"{i:06d}" for i in range(9)], NAMES])
def test_numbers_alone_are_no_videos(script, tmp_path, names):
    assert "look like frames" not in split(script, make(tmp_path / "d", names))[2]


def test_unlabeled_txt_stays_as_it_is(script, tmp_path):
    root = make(tmp_path / "d", NAMES, ["u1x", "u2x"])
    write_lines(root / "unlabeled.txt", ["u1x", NAMES[0]])
    train, val, _ = split(script, root)
    assert not {"u1x", NAMES[0]} & {*train, *val} and "u2x" in train
    assert datasets.Folder(root).unlabeled == ["u1x", NAMES[0]]


@pytest.mark.parametrize("there", ["train.txt", "val.txt"])
def test_lists_are_kept(script, folder, there):
    (folder / {"train.txt": "val.txt", "val.txt": "train.txt"}[there]).unlink()
    before = (folder / there).read_bytes()
    assert re.search(f"{there}: exists; keep it, or add --overwrite", errors(script, prepare, "split", "--data", folder))
    assert (folder / there).read_bytes() == before and len([*folder.glob("*.txt")]) == 2
    assert len(split(script, folder, "--overwrite")[1]) == 2


def test_a_class_that_one_list_lacks_is_named(script, tmp_path):
    root = make(tmp_path / "d", NAMES, label=lambda name: 2 if name == NAMES[0] else 1)
    first = sorted(NAMES, key=lambda name: datasets.digest(f"0 {name}")).index(NAMES[0])
    here, other = ("train", "val") if first < 4 else ("val", "train")
    out = split(script, root)[2]
    assert f"warning: no image of {here}.txt shows car; try another --seed" in out and f"of {other}.txt" not in out
    (root / "classes.txt").unlink()
    assert "shows class 2;" in split(script, root, "--overwrite")[2]


def test_ignored_pixels_are_no_class(script, tmp_path):
    root = make(tmp_path / "d", NAMES, label=lambda name: 255 if name == NAMES[0] else 1)
    assert "warning" not in split(script, root)[2]


def test_two_images_are_enough(script, tmp_path):
    train, val, _ = split(script, make(tmp_path / "d", ["a", "b"]))
    assert len(train) == len(val) == 1


def no_masks(root):
    shutil.rmtree(root / "masks")
    (root / "masks").mkdir()


@pytest.mark.parametrize(
    "change, flags, expected",
    [
        (lambda root: None, ["--val", "0"], "--val 0: must be above 0 and below 1"),
        (lambda root: None, ["--val", "1"], "--val 1: must be above 0 and below 1"),
        (lambda root: None, ["--val", "nan"], "--val nan: must be above 0 and below 1"),
        (lambda root: None, ["--val", "x"], "argument --val: invalid float value: 'x'"),
        (lambda root: None, ["--prefix", "("], r"--prefix '\(': is no regular expression"),
        (lambda root: None, ["--prefix", "b"], "--prefix 'b': does not match the beginning of 'a0x'"),
        (lambda root: None, ["--prefix", "x*"], "all 20 images with masks have the prefix ''; give --prefix"),
        (no_masks, [], "0 of 20 images have a mask .* two are needed"),
        (lambda root: [path.unlink() for path in sorted((root / "masks").iterdir())[1:]], [], "1 of 20 images have a mask"),
        (lambda root: shutil.rmtree(root / "images"), [], "images: no such folder; --data must hold images/ and masks/"),
        (lambda root: (root / "masks" / "a0x.png").write_bytes(b"junk"), [], "a0x.png: cannot be read as a PNG mask"),
        (lambda root: Image.new("RGB", (4, 4)).save(root / "masks" / "a0x.png"), [], "a0x.png: has the mode RGB"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_one_line(script, tmp_path, change, flags, expected):
    root = make(tmp_path / "d", NAMES)
    change(root)
    assert re.search(expected, errors(script, prepare, "split", "--data", root, *flags))
    assert not (root / "train.txt").exists() and not (root / "val.txt").exists()


def test_frames_of_one_video_alone_are_one_line(script, tmp_path):
    root = make(tmp_path / "d", [f"IMG_{i}" for i in range(5)])
    said = errors(script, prepare, "split", "--data", root, "--by", "prefix")
    assert "all 5 images with masks have the prefix 'IMG'" in said and "or --by name" in said
