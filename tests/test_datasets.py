import itertools
import json
import math
import os
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import TINY, open_folder, save_jpeg, save_mask, write_lines
from PIL import Image

import batches
import checks
import datasets
import evaluate
import prepare
import readers
import run_folder
import train_teacher
from common import UserError


def test_shapes_are_drawn_from_their_name_alone():
    first, second = datasets.Shapes(), datasets.Shapes()
    for name in ("train-0003", "val-0000"):
        assert np.array_equal(first.image(name), second.image(name))
        assert np.array_equal(first.mask(name), second.mask(name))
    assert first.image("train-0000").shape == (64, 64, 3) and first.image("train-0000").dtype == np.uint8
    assert not np.array_equal(first.image("train-0000"), first.image("train-0001"))
    seen = set().union(*(np.unique(first.mask(name)).tolist() for name in first.train[:50]))
    assert seen == set(range(6))
    assert not set(first.train) & set(first.val)


@pytest.mark.parametrize("part,k", [("1", 1), ("1/1", 1), ("1/2", 2), ("1/8", 8), ("1/16", 16), ("1/30", 30)])
def test_partition_counts(part, k):
    dataset = datasets.Shapes(train=367)
    split = datasets.partition(dataset, part)
    assert len(split.labeled) == math.ceil(367 / k)
    assert sorted(split.labeled + split.unlabeled) == dataset.train


def test_partitions_are_nested_and_stay_as_they_are():
    dataset = datasets.Shapes()
    splits = [datasets.partition(dataset, f"1/{k}") for k in (16, 8, 4, 2)]
    for small, large in itertools.pairwise(splits):
        assert set(small.labeled) < set(large.labeled)
    assert len({split.hash for split in splits}) == 4
    assert splits[0] == datasets.partition(datasets.Shapes(), "1/16")


@pytest.mark.parametrize("part", ["0", "2/8", "1/0", "1/", "1/08", "1/x", "half", "1/-8", ""])
def test_partition_refuses_other_fractions(part):
    with pytest.raises(UserError, match="--part"):
        datasets.partition(datasets.Shapes(), part)


def test_folder_labels_only_images_with_masks(folder):
    (folder / "unlabeled.txt").write_text("im08\n")  # also in train.txt
    dataset = datasets.Folder(folder)
    split = datasets.partition(dataset, "1/2")
    assert len(split.labeled) == 5 and {"im08", "im09"} <= set(split.unlabeled) and len(split.unlabeled) == 5
    assert len(datasets.partition(dataset, "1").labeled) == 8  # all that have a mask
    assert dataset.classes == ["road", "tree", "car"]
    (folder / "classes.txt").unlink()
    assert datasets.Folder(folder).classes == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("names", [True, False], ids=["classes.txt", "no classes.txt"])
def test_masks_of_unlabeled_images_are_never_opened(folder, names):
    if not names:
        (folder / "classes.txt").unlink()
    split = datasets.partition(datasets.Folder(folder), "1/4")
    masks = [path for path in (folder / "masks").iterdir() if path.stem in split.unlabeled]
    assert masks
    for path in masks:
        path.write_bytes(b"junk")
    dataset, again = open_folder(folder, "1/4")
    assert again.labeled == split.labeled and len(dataset.classes) == 3
    image, mask = batches.TrainSet(dataset, split.unlabeled, (48, 48), [1.0], labeled=False)[0, 7].values()
    assert image.shape == (3, 48, 48) and set(mask.unique().tolist()) == {0, 255}  # 40x56 is padded to a height of 48
    for path in masks:
        path.unlink()
    assert datasets.partition(datasets.Folder(folder), "1/4") == split


def break_missing_root(root):
    shutil.rmtree(root)
    return "mine: no such folder"


def break_missing_masks(root):
    shutil.rmtree(root / "masks")
    return "masks: no such folder"


def break_missing_list(root):
    (root / "train.txt").unlink()
    return "train.txt: no such file"


def break_empty_list(root):
    (root / "val.txt").write_text("\n")
    return "val.txt: names no image"


def break_listed_image(root):
    (root / "images" / "im03.png").unlink()
    return "train.txt, entry 4: 'im03' is no image"


def break_image_bytes(root):
    (root / "images" / "im03.png").write_bytes(b"not a picture")
    return "im03.png.*not a readable image"


def break_mask_size(root):
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(root / "masks" / "im03.png")
    return "im03.png: is 50x40, its image 56x40"


def break_val_mask(root):
    (root / "masks" / "im11.png").unlink()
    return "im11.png: no such mask, but val.txt"


def break_overlap(root):
    (root / "val.txt").write_text("im03\nim11\n")
    return "val.txt: 'im03' is also in train.txt"


def break_every_mask(root):
    for i in range(10):
        (root / "masks" / f"im{i:02d}.png").unlink(missing_ok=True)
    return "--part 1: leaves no labeled image"


def break_classes_encoding(root):
    (root / "classes.txt").write_bytes(b"stra\xdfe\nbaum\n")
    return "classes.txt: cannot be read as UTF-8"


def break_png_header(root):
    path = root / "images" / "im03.png"
    data = bytearray(path.read_bytes())
    data[16:29] = bytes(13)  # the IHDR chunk
    path.write_bytes(data)
    return "im03.png.*not a readable image"


def break_label(root):
    Image.new("L", (56, 40), 7).save(root / "masks" / "im03.png")
    return "im03.png: holds label 7, .* prepare.py masks .* --unknown ignore$"


def break_classes(root):
    (root / "classes.txt").write_text("road\n")
    return "classes.txt: names 1 class"


def break_image_truncated(root):
    array = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    (root / "images" / "im03.png").unlink()
    path = root / "images" / "im03.jpg"
    Image.fromarray(array).save(path)
    path.write_bytes(path.read_bytes()[:700])
    return "im03.jpg: cannot be read as an image"


def break_bare_image_truncated(root):
    path = root / "images" / "im08.png"  # has no mask
    path.write_bytes(path.read_bytes()[:600])
    return "im08.png: cannot be read as an image"


def break_image_empty(root):
    (root / "images" / "im03.png").write_bytes(b"")
    return "im03.png: not a readable image"


def break_mask_empty(root):
    (root / "masks" / "im03.png").write_bytes(b"")
    return "im03.png: cannot be read as a PNG"


def break_mask_truncated(root):
    path = root / "masks" / "im03.png"
    path.write_bytes(path.read_bytes()[:100])
    return "im03.png: cannot be read as a PNG"


def break_mask_254(root):
    Image.new("L", (56, 40), 254).save(root / "masks" / "im03.png")
    return "im03.png: holds label 254"


def break_mask_16_bit(root):
    Image.fromarray(np.full((40, 56), 300, np.uint16)).save(root / "masks" / "im03.png")
    return "im03.png: holds label 300"


def break_mask_colours(root):
    Image.new("RGB", (56, 40), (128, 0, 0)).save(root / "masks" / "im03.png")
    return "im03.png: has the mode RGB, .* prepare.py masks .* --values 128,0,0=CLASS$"


def break_mask_rgba(root):
    Image.new("RGBA", (56, 40)).save(root / "masks" / "im03.png")
    return "im03.png: has the mode RGBA"


def break_mask_of_val(root):
    Image.new("L", (56, 40), 9).save(root / "masks" / "im12.png")
    return "im12.png: holds label 9"


def break_mask_turned(root):
    Image.new("L", (40, 56)).save(root / "masks" / "im03.png")
    return "im03.png: is 40x56, its image 56x40"


def break_mask_jpeg(root):
    Image.new("L", (56, 40)).save(root / "masks" / "im08.jpg")
    return "im08.jpg: is a JPEG, whose .* prepare.py masks .* --values 0=CLASS 255=CLASS --unknown nearest$"


def break_two_images_of_a_name(root):
    Image.new("RGB", (56, 40)).save(root / "images" / "im03.jpg")
    return "im03.png: has the name of im03.jpg"


def break_image_is_a_folder(root):
    (root / "images" / "im03.png").unlink()
    (root / "images" / "im03.png").mkdir()
    return "im03.png: not a readable image"


def break_mask_is_a_folder(root):
    (root / "masks" / "im03.png").unlink()
    (root / "masks" / "im03.png").mkdir()
    return "im03.png: cannot be read as a PNG"


def break_list_is_a_folder(root):
    (root / "train.txt").unlink()
    (root / "train.txt").mkdir()
    return "train.txt: cannot be read"


def break_list_encoding(root):
    (root / "train.txt").write_bytes(b"im00\nk\xfche\n")
    return "train.txt: cannot be read as UTF-8"


def break_list_in_utf_16(root):
    (root / "train.txt").write_text("im00\nim01\n", encoding="utf-16")
    return "train.txt: cannot be read as UTF-8"


def break_list_binary(root):
    (root / "train.txt").write_bytes(bytes(range(1, 9)))
    return "train.txt, entry 1"


def break_unlabeled_list(root):
    (root / "unlabeled.txt").write_text("im10\n")
    return "val.txt: 'im10' is also in unlabeled.txt"


def break_unlabeled_name(root):
    (root / "unlabeled.txt").write_text("nowhere\n")
    return "unlabeled.txt, entry 1: 'nowhere' is no image"


def break_missing_images(root):
    shutil.rmtree(root / "images")
    return "images: no such folder"


def break_missing_val(root):
    (root / "val.txt").unlink()
    return "val.txt: no such file"


def break_root_is_a_file(root):
    shutil.rmtree(root)
    root.write_text("not a folder")
    return "mine: no such folder"


def break_palette(root):
    (root / "palette.txt").write_text("0 0 0\n1 1 256\n2 2 2\n")
    return "palette.txt: '1 1 256' is not a colour"


def break_palette_length(root):
    (root / "palette.txt").write_text("0 0 0\n1 1 1\n")
    return "palette.txt: holds 2 colours for 3 classes"


def break_too_many_classes(root):
    (root / "classes.txt").write_text("\n".join(map(str, range(300))))
    return "classes.txt: names 300 class"


def break_class_named_twice(root):
    (root / "classes.txt").write_text("road\nball\nball\n")
    return "classes.txt: names 'ball' twice"


def break_binary_masks_without_classes(root):
    (root / "classes.txt").unlink()
    make_binary(root)
    return "labeled masks hold only 0 and 255, .* prepare.py masks .* --values 0=0 255=1$"


def make_binary(root):
    for path in (root / "masks").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)


BROKEN = [value for name, value in globals().items() if name.startswith("break_")]


def odd_windows_line_ends(root):
    for file in ("train.txt", "val.txt", "classes.txt"):
        (root / file).write_bytes((root / file).read_bytes().replace(b"\n", b"\r\n"))
    return 8, 2, 3


def odd_byte_order_mark(root):
    (root / "train.txt").write_bytes(b"\xef\xbb\xbf" + (root / "train.txt").read_bytes())
    return 8, 2, 3


def odd_no_last_line_end_and_blanks(root):
    (root / "train.txt").write_text("  im00\n\n\tim01  \nim08")
    return 2, 1, 3


def odd_duplicate_names(root):
    (root / "train.txt").write_text("im00\nim00\nim08\n")
    return 1, 1, 3


def odd_name_in_train_and_unlabeled(root):
    (root / "unlabeled.txt").write_text("im00\nim08\n")
    return 8, 2, 3


def odd_suffixes_and_folders_in_lists(root):
    (root / "train.txt").write_text("images/im00.png\n/home/me/im01.PNG\nC:\\data\\im08.png\n")
    return 2, 1, 3


def odd_pairs_in_lists(root):
    (root / "train.txt").write_text("images/im00.png masks/im00.png\n/x/im01.png\t/y/im01.png\nim08.png\n")
    return 2, 1, 3


def odd_names(root):
    for i, name in enumerate(["my photo", "v1.2", "straße", "a,b'c"]):
        for kind in ("images", "masks"):
            (root / kind / f"im{i:02d}.png").rename(root / kind / f"{name}.png")
    (root / "train.txt").write_text("my photo\nv1.2\nstraße.png\nimages/a,b'c.png masks/a,b'c.png\nim08\n")
    return 4, 1, 3


def odd_names_that_are_not_utf_8(root):
    stray = os.fsdecode(b"k\xfche.png")  # listed nowhere, and no reason to fail
    (root / "images" / "im07.png").rename(root / "images" / stray)
    (root / "train.txt").write_text("im00\nim08\n")
    return 1, 1, 3


def odd_upper_case_suffixes(root):
    (root / "images" / "im00.png").rename(root / "images" / "im00.PNG")
    return 8, 2, 3


def odd_mask_forms(root):
    mask = Image.open(root / "masks" / "im00.png")
    array = np.asarray(mask)
    palette = Image.fromarray(array)
    palette.putpalette(list(range(256)) * 3)
    palette.save(root / "masks" / "im00.png")
    Image.fromarray(array.astype(np.uint16)).save(root / "masks" / "im01.png")
    Image.fromarray(array == 1).save(root / "masks" / "im02.png")
    return 8, 2, 3


def odd_image_forms(root):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 2**16, (40, 56)).astype(np.uint16)).save(root / "images" / "im00.png")
    Image.fromarray(rng.integers(0, 256, (40, 56), np.uint8)).save(root / "images" / "im01.png")
    Image.fromarray(rng.integers(0, 256, (40, 56, 4), np.uint8)).save(root / "images" / "im02.png")
    return 8, 2, 3


def odd_other_files(root):
    (root / "images" / "Thumbs.db").write_bytes(b"junk")
    (root / "images" / ".DS_Store").write_bytes(b"junk")
    (root / "masks" / "readme.txt").write_text("words")
    return 8, 2, 3


def odd_stray_mask(root):
    Image.new("L", (9, 9), 77).save(root / "masks" / "nowhere.png")
    return 8, 2, 3


ODD = [value for name, value in globals().items() if name.startswith("odd_")]


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__)
def test_broken_folders_are_one_clear_line(folder, break_it):
    expected = break_it(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=expected) as error:
        dataset, split = open_folder(folder)
        for names, labeled in ((split.labeled, True), (split.unlabeled, False)):  # what only training decodes
            train_set = batches.TrainSet(dataset, names, (32, 32), [1.0], labeled=labeled)
            for i in range(len(names)):
                train_set[i, 0]
    assert "\n" not in str(error.value)
    for command in re.findall("python prepare.py .*", str(error.value)):  # can be pasted
        assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("odd", ODD, ids=lambda f: f.__name__)
def test_odd_folders_are_handled(folder, odd):
    expected = odd(folder)
    dataset, split = open_folder(folder)
    assert (len(split.labeled), len(split.unlabeled), len(dataset.val)) == expected
    for name in [*split.labeled, *split.unlabeled, *dataset.val]:
        assert dataset.image(name).dtype == np.uint8 and dataset.image(name).shape[2] == 3


def test_broken_masks_are_named(folder):
    dataset = datasets.Folder(folder)
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(folder / "masks" / "im00.png")
    with pytest.raises(UserError, match=r"im00.png: holds label 7, but the 3 classes are 0 to 2"):
        dataset.mask("im00")
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(folder / "masks" / "im01.png")
    with pytest.raises(UserError, match=r"im01.png: has the mode RGB"):
        dataset.mask("im01")
    path = folder / "images" / "im02.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"im02.png: cannot be read"):
        dataset.image("im02")


# ---- the official layouts ----


@pytest.mark.slow
def test_voc_from_preparation_to_evaluation(script, voc, tmp_path):
    options = ["--dataset", "voc", "--data", voc, "--part", "1/4"]
    code, _, err = script(prepare, "check", *options)
    assert code == 2 and "prepare.py voc" in err
    code, out, err = script(prepare, "voc", "--data", voc)
    assert code == 0, err
    assert "8 training and 2 val images here, not 10,582 and 1,449" in out
    augmented = voc / "VOCdevkit" / "VOC2012" / "SegmentationClassAug"
    assert np.unique(np.asarray(Image.open(augmented / "2011_000010.png"))).tolist() == [5]
    own = np.asarray(Image.open(voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000001.png"))
    assert np.array_equal(np.asarray(Image.open(augmented / "2007_000001.png")), own)  # VOC's mask, not SBD's coarser one
    assert not (augmented / "2009_000005.png").exists()  # of val
    before = (augmented / "2011_000010.png").stat().st_mtime_ns
    assert script(prepare, "voc", "--data", voc / "VOCdevkit" / "..")[0] == 0
    assert (augmented / "2011_000010.png").stat().st_mtime_ns == before

    code, out, _ = script(prepare, "check", *options, "--chart", tmp_path / "c.png", "--picture", tmp_path / "p.png")
    assert code == 1 and "2 labeled, 6 unlabeled, 2 val" in out and "1 problem(s)" in out  # the counts
    assert (tmp_path / "c.png").exists() and (tmp_path / "p.png").exists()
    split = datasets.partition(datasets.Voc(voc), "1/4")
    for name in split.unlabeled:  # as someone has them who never had these masks
        (augmented / f"{name}.png").unlink()
        (augmented.parent / "SegmentationClass" / f"{name}.png").unlink(missing_ok=True)
    assert datasets.partition(datasets.Voc(voc), "1/4") == split
    train_and_evaluate(script, tmp_path, options, labeled=2, unlabeled=6, classes=21)


def train_and_evaluate(script, tmp_path, options, labeled, unlabeled, classes):
    run = ["--out", tmp_path / "run", "--backbone", "r18", "--weights", "none", "--window", "48", "--steps", "2", *TINY]
    code, out, err = script(train_teacher, *run, *options, "--sup-only", "0")
    assert code == 0, err
    assert f"{labeled} labeled and {unlabeled} unlabeled" in out
    code, out, err = script(
        evaluate, "--ckpt", tmp_path / "run" / "last.pt", "--json", tmp_path / "r.json", "--confusion", tmp_path / "m.png"
    )
    assert code == 0, err
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert len(row["iou"]) == classes and row["window"] == [48, 48] and (tmp_path / "m.png").exists()
    assert row["miou"] == run_folder.load_checkpoint(tmp_path / "run" / "last.pt")["row"]["miou"]


def test_voc_few_takes_vocs_own_training_images(voc, capsys):
    dataset = datasets.Voc(voc / "VOCdevkit", few=True)
    split = datasets.partition(dataset, "1/4")
    assert len(split.labeled) == 1 and len(split.unlabeled) == 3 and len(dataset.val) == 2
    assert "1464" in dataset.missing().replace(",", "")
    write_lines(voc / "labeled.txt", ["2007_000001", "2007_000002"])
    write_lines(voc / "unlabeled.txt", ["2007_000002", "2008_000003"])
    split = datasets.listed_partition(dataset, voc / "labeled.txt", voc / "unlabeled.txt")
    assert split.labeled == ["2007_000001", "2007_000002"] and split.unlabeled == ["2008_000003"]
    assert "warning" in (err := capsys.readouterr().err) and "'2007_000002'; they stay labeled" in err
    assert len(datasets.listed_partition(dataset, voc / "labeled.txt", None).unlabeled) == 2


@pytest.fixture
def cityscapes(tmp_path):
    """Five training and two val images; the masks of val are labelTrainIds, the others labelIds."""
    rng = np.random.default_rng(0)
    for i in range(7):
        split, city = ("val", "lindau") if i > 4 else ("train", ("aachen", "bremen")[i % 2])
        name = f"{city}_{i:06d}_000019"
        save_jpeg(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", rng)
        ids = rng.choice([0, 7, 26, 33], (40, 56)) if split == "train" else rng.choice([0, 13, 18, 255], (40, 56))
        kind = "labelIds" if split == "train" else "labelTrainIds"
        save_mask(tmp_path / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", ids)
        save_mask(tmp_path / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", ids)
    return tmp_path


@pytest.mark.slow
def test_cityscapes_from_check_to_evaluation(script, cityscapes, tmp_path):
    dataset = datasets.Cityscapes(cityscapes)
    mask = np.asarray(Image.open(cityscapes / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"))
    for value, index in ((0, 255), (7, 0), (26, 13), (33, 18)):  # unlabeled, road, car, bicycle
        assert (dataset.mask("aachen_000000_000019")[mask == value] == index).all()
    assert set(np.unique(dataset.mask("lindau_000005_000019"))) == {0, 13, 18, 255}
    options = ["--dataset", "cityscapes", "--data", cityscapes, "--part", "1/4"]
    code, out, _ = script(prepare, "check", *options)
    assert code == 1 and "2 labeled, 3 unlabeled, 2 val" in out and "not 2,975 and 500" in out
    train_and_evaluate(script, tmp_path, options, labeled=2, unlabeled=3, classes=19)
    save_mask(cityscapes / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png", np.full((40, 56), 40))
    with pytest.raises(UserError, match="holds label 40, but labelIds end at 33"):
        dataset.mask("aachen_000000_000019")
    shutil.rmtree(cityscapes / "gtFine" / "val")
    with pytest.raises(UserError, match="lindau_000005_000019_gtFine_labelIds"):
        datasets.Cityscapes(cityscapes)
    shutil.rmtree(cityscapes / "leftImg8bit")
    with pytest.raises(UserError, match="leftImg8bit and gtFine"):
        datasets.Cityscapes(cityscapes)


def test_palettes_of_cityscapes_are_read_by_label_id(cityscapes):
    dataset = datasets.Cityscapes(cityscapes)
    groups = {"labeled": dataset.train, "val": dataset.val}
    path = dataset.masks["aachen_000000_000019"]
    image, palette = Image.open(path), np.zeros((256, 3), np.uint8)
    palette[datasets.CITYSCAPES_IDS] = datasets.CITYSCAPES_PALETTE
    image.putpalette(palette.ravel().tolist())
    image.save(path)
    checks.refuse_faults(dataset, groups)
    palette[[7, 26]] = palette[[26, 7]]
    image.putpalette(palette.ravel().tolist())
    image.save(path)
    with pytest.raises(UserError, match=r"its palette gives .* but Cityscapes' palette to index"):
        checks.refuse_faults(dataset, groups)


SPLITS = pathlib.Path(os.environ.get("MGD_SPLITS", pathlib.Path(datasets.__file__).parent / "data" / "splits"))
needs_splits = pytest.mark.skipif(not SPLITS.is_dir(), reason="no public lists in data/splits or MGD_SPLITS")


def touch(paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.slow
@needs_splits
def test_the_public_lists_of_voc_load_to_the_papers_counts(tmp_path, capsys):
    root, lists = tmp_path / "VOCdevkit" / "VOC2012", SPLITS / "voc"
    names = {file: readers.read_lines(lists / f"{file}.txt") for file in ("train", "val", "train_aug")}
    touch(root / "JPEGImages" / f"{name}.jpg" for name in names["train_aug"] + names["val"])
    touch(root / "SegmentationClassAug" / f"{name}.png" for name in names["train_aug"] + names["val"])
    for file in ("train", "val"):
        write_lines(root / "ImageSets" / "Segmentation" / f"{file}.txt", names[file])
    dataset, few = datasets.Voc(tmp_path), datasets.Voc(tmp_path, few=True)
    assert sorted(dataset.train) == sorted(names["train_aug"]) and dataset.missing() is None and few.missing() is None
    for k, labeled in ((16, 662), (8, 1323), (4, 2646), (2, 5291)):
        split = datasets.listed_partition(
            dataset, lists / f"train_aug_labeled_1-{k}.txt", lists / f"train_aug_unlabeled_1-{k}.txt"
        )
        assert (len(split.labeled), len(split.unlabeled)) == (labeled, 10582 - labeled)
    assert "warning" not in capsys.readouterr().err
    for k, labeled in ((16, 92), (8, 183), (4, 366), (2, 732)):  # these name one image in both lists
        split = datasets.listed_partition(few, *(lists / f"pseudoseg_{which}_1-{k}.txt" for which in ("labeled", "unlabeled")))
        assert len(split.labeled) == labeled and len(split.labeled) + len(split.unlabeled) == 1464
        assert "they stay labeled" in capsys.readouterr().err


@pytest.mark.slow
@needs_splits
def test_the_public_lists_of_cityscapes_load_to_the_papers_counts(tmp_path):
    lists = SPLITS / "cityscapes"
    for split in ("train", "val"):
        for line in readers.read_lines(lists / f"{split}.txt"):
            name = readers.name_of(line.split()[0])
            city = name.split("_")[0]
            touch(
                [
                    tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png",
                    tmp_path / "gtFine" / split / city / f"{name}_gtFine_labelIds.png",
                ]
            )
    dataset = datasets.Cityscapes(tmp_path)
    assert dataset.missing() is None
    for k, labeled in ((16, 186), (8, 372), (4, 744), (2, 1488)):
        paths = (lists / f"train_aug_{which}_1-{k}.txt" for which in ("labeled", "unlabeled"))
        split = datasets.listed_partition(dataset, *paths)
        assert (len(split.labeled), len(split.unlabeled)) == (labeled, 2975 - labeled)
    held_out = lists / "val.txt"
    with pytest.raises(UserError, match=r"val.txt: names 500 val image"):
        datasets.listed_partition(dataset, held_out, None)


# ---- lists, partitions, cache ----


def test_broken_lists_are_named(folder):
    dataset = datasets.Folder(folder)
    write_lines(folder / "l.txt", ["im00", "im08"])
    with pytest.raises(UserError, match=r"l.txt: 'im08' has no mask"):
        datasets.listed_partition(dataset, folder / "l.txt", None)
    write_lines(folder / "l.txt", ["im00", "im11"])
    with pytest.raises(UserError, match=r"l.txt: names 1 val image\(s\), first 'im11'"):
        datasets.listed_partition(dataset, folder / "l.txt", None)
    write_lines(folder / "l.txt", ["im00"])
    with pytest.raises(UserError, match=r"u.txt: no such file"):
        datasets.listed_partition(dataset, folder / "l.txt", folder / "u.txt")
    with pytest.raises(UserError, match="--unlabeled-list"):
        open_folder(folder, unlabeled_list=folder / "l.txt")
    _, split = open_folder(folder, labeled_list=folder / "l.txt")
    assert split.name == "l" and split.labeled == ["im00"] and len(split.unlabeled) == 9


def test_every_class_is_labeled_and_partitions_stay_nested(folder):
    ranked = datasets.partition(datasets.Folder(folder), "1/2").labeled
    rare = next(f"im{i:02d}" for i in range(8) if f"im{i:02d}" not in ranked)  # would not be labeled
    for path in (folder / "masks").iterdir():
        array = np.asarray(Image.open(path)).copy()
        array[array == 2] = 0
        if path.stem in (rare, "im11"):
            array[1, 1] = 2
        save_mask(path, array)
    splits = [datasets.partition(datasets.Folder(folder), f"1/{k}") for k in (5, 4, 2, 1)]
    assert all(rare in split.labeled for split in splits) and [len(s.labeled) for s in splits] == [2, 3, 5, 8]
    assert all(set(a.labeled) <= set(b.labeled) for a, b in itertools.pairwise(splits))
    for name in set(splits[0].unlabeled):
        (folder / "masks" / f"{name}.png").unlink(missing_ok=True)
    assert datasets.partition(datasets.Folder(folder), "1/5") == splits[0]


def test_cache_gives_the_same_and_notices_changes(folder, tmp_path):
    plain, cached = datasets.Folder(folder), datasets.Folder(folder)
    cached.cache = tmp_path / "cache"
    for _ in range(2):
        assert np.array_equal(plain.image("im00"), cached.image("im00"))
        assert np.array_equal(plain.mask("im00"), cached.mask("im00"))
    assert isinstance(cached.image("im00"), np.memmap) and len(list(cached.cache.iterdir())) == 2
    train_sets = [batches.TrainSet(d, ["im00"], (32, 32), [0.5, 1.5]) for d in (plain, cached)]
    for seed in range(4):
        assert all(torch.equal(a, b) for a, b in zip(*(t[0, seed].values() for t in train_sets), strict=True))
    for entry in cached.cache.iterdir():
        entry.write_bytes(entry.read_bytes()[:100])  # as a full disk leaves them
    assert np.array_equal(plain.image("im00"), cached.image("im00"))
    save_jpeg(folder / "images" / "im00.png", np.random.default_rng(7))
    assert np.array_equal(plain.image("im00"), cached.image("im00"))
    cached.cache = folder / "train.txt"
    with pytest.raises(UserError, match="--cache"):
        cached.image("im01")
