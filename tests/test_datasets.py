import argparse
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
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


def test_partitions_are_nested_and_seeded():
    dataset = datasets.Shapes()
    splits = [datasets.partition(dataset, f"1/{k}") for k in (16, 8, 4, 2)]
    for small, large in itertools.pairwise(splits):
        assert set(small.labeled) < set(large.labeled)
    assert len({split.hash for split in splits}) == 4
    assert splits[0] == datasets.partition(datasets.Shapes(), "1/16")
    assert splits[0].hash != datasets.partition(dataset, "1/16", seed=1).hash


@pytest.mark.parametrize("part", ["0", "2/8", "1/0", "1/", "1/08", "1/x", "half", "1/-8", ""])
def test_partition_refuses_what_is_no_share(part):
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
    args = argparse.Namespace(dataset="folder", data=folder, part="1/4")
    dataset, again = datasets.open_training_data(args, unlabeled=True)
    assert again.labeled == split.labeled and len(dataset.classes) == 3
    image, mask = datasets.TrainSet(dataset, split.unlabeled, (48, 48), [1.0], labeled=False)[0, 7]
    assert image.shape == (3, 48, 48) and set(mask.unique().tolist()) == {0, 255}  # 40x56 is padded to a height of 48
    for path in masks:
        path.unlink()
    assert datasets.partition(datasets.Folder(folder), "1/4") == split


def test_own_images_come_as_upright_rgb(folder):
    files = sorted((folder / "images").iterdir())
    array = np.zeros((40, 56, 3), np.uint8)
    array[:20, :28] = (200, 100, 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(array).save(files[0], exif=exif)
    Image.fromarray(array[..., 0]).save(files[1])
    Image.fromarray(array).convert("P").save(files[2])
    Image.fromarray(np.dstack([array, array[..., 0]])).save(files[3])
    dataset = datasets.Folder(folder)
    assert dataset.image("im00").shape == (56, 40, 3) and tuple(dataset.image("im00")[0, -1]) == (200, 100, 50)
    for name in ("im01", "im02", "im03"):
        assert dataset.image(name).shape == (40, 56, 3)
    assert tuple(dataset.image("im01")[0, 0]) == (200, 200, 200)


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
    return "im03.*train.txt lists 'im03'"


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
    return "val.txt: 'im03' is also a training image"


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
    return "im03.png: holds label 7"


def break_classes(root):
    (root / "classes.txt").write_text("road\n")
    return "classes.txt: names 1 class"


BROKEN = [value for name, value in globals().items() if name.startswith("break_")]


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__)
def test_broken_folders_are_one_clear_line(folder, break_it):
    expected = break_it(folder)
    args = argparse.Namespace(dataset="folder", data=folder, part="1")
    with pytest.raises(UserError, match=expected) as error:
        datasets.open_training_data(args, unlabeled=True)
    assert "\n" not in str(error.value)


def test_broken_masks_are_named(folder):
    dataset = datasets.Folder(folder)
    Image.fromarray(np.full((40, 56), 7, np.uint8)).save(folder / "masks" / "im00.png")
    with pytest.raises(UserError, match=r"im00.png: holds label 7, but the 3 classes are 0 to 2"):
        dataset.mask("im00")
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(folder / "masks" / "im01.png")
    with pytest.raises(UserError, match=r"im01.png: is a RGB image"):
        dataset.mask("im01")
    path = folder / "images" / "im02.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"im02.png: cannot be read"):
        dataset.image("im02")


def test_augmentation_is_a_function_of_the_seed(folder):
    train_set = datasets.TrainSet(datasets.Folder(folder), ["im00"], (32, 32), [0.5, 1.0, 2.0])
    state = torch.get_rng_state()
    a, b, c = train_set[0, 1], train_set[0, 1], train_set[0, 2]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a[0], c[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_image_and_mask_are_cropped_alike_and_padding_is_ignored():
    class Painted(datasets.Shapes):
        """The image shows its mask."""

        def image(self, name):
            return np.repeat(self.mask(name)[..., None], 3, 2)

    for seed in range(8):
        image, mask = datasets.TrainSet(Painted(), ["train-0000"], (80, 80), [1.0])[0, seed]
        inside = mask != 255
        assert torch.equal(image[0][inside].long(), mask[inside]) and int(inside.sum()) == 64 * 64
        assert (torch.tensor([round(255 * m) for m in datasets.MEAN]) == image[:, ~inside].T).all()


def test_sampler_is_a_function_of_seed_and_step():
    whole = list(datasets.StepSampler(10, 4, seed=3, start=0, steps=20))
    assert list(datasets.StepSampler(10, 4, seed=3, start=7, steps=20)) == whole[7:]
    assert whole != list(datasets.StepSampler(10, 4, seed=4, start=0, steps=20))
    order = [index for batch in whole for index, _ in batch]
    assert all(sorted(order[i : i + 10]) == list(range(10)) for i in range(0, 80, 10))  # each image once an epoch
    seeds = [seed for batch in whole for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_cutmix_mask_covers_what_three_boxes_may():
    masks = datasets.cutmix_mask(200, (64, 96), seed=0)
    assert masks.shape == (200, 1, 64, 96) and masks.dtype == torch.bool
    shares = masks.float().mean((1, 2, 3))
    # three boxes of a third of 0.25 to 0.5 of the area each; overlaps toggle, so the mean share is below 0.375
    assert 0.2 < shares.mean() < 0.375 and shares.max() < 0.52
    assert torch.equal(masks, datasets.cutmix_mask(200, (64, 96), seed=0))
    assert not torch.equal(masks, datasets.cutmix_mask(200, (64, 96), seed=1))


def test_overlapping_cutmix_boxes_toggle():
    """Without toggling, three boxes cover more: their union is what any two of them cover, not what an odd number does."""

    class Boxes:
        def __init__(self):
            self.corners = iter([0, 0, 0, 0, 2, 0])  # top, left of three boxes

        def uniform(self, *args):
            return np.array([0.36] * 3) if len(args) == 3 else 0.5

        def integers(self, low, high):
            return next(self.corners)

    import unittest.mock

    with unittest.mock.patch.object(datasets.np.random, "default_rng", lambda seed: Boxes()):
        mask = datasets.cutmix_mask(1, (10, 10), 0)[0, 0]
    # sides of 0.6 / sqrt(3) of 10 pixels are 3: two equal boxes cancel, the third stays
    assert mask.sum() == 9 and mask[2:5, :3].all()


def test_seeds_differ_for_every_tuple():
    tuples = [(5,), (5, 0), (5, 0, 0), (0,), (0, 0), (5, 2), (5, 2, 0), (2, 5)]
    assert len({datasets.seed_of(*parts) for parts in tuples}) == len(tuples)


def test_a_mask_turned_by_exif_is_turned_like_its_image(folder):
    mask = np.arange(40 * 56).reshape(40, 56) % 3
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / "im00.png", exif=exif)
    assert np.array_equal(datasets.Folder(folder).mask("im00"), np.rot90(mask, -1))


def test_cutmix_takes_the_second_view_inside_the_box():
    box = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    box[:, :, :2] = True
    views = torch.stack([torch.full((3, 4, 4), float(i)) for i in range(4)])
    mixed = datasets.cutmix(views, box)
    assert (mixed[0, :, :2] == 2).all() and (mixed[0, :, 2:] == 0).all() and (mixed[1, :, :2] == 3).all()
    assert torch.equal(datasets.cutmix(views[:, 0], box), mixed[:, 0])


def test_normalize_gives_imagenets_mean_zero():
    grey = torch.tensor([round(255 * m) for m in datasets.MEAN], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert datasets.normalize(grey, torch.device("cpu")).abs().max() < 0.01


def test_voc_palette():
    assert datasets.voc_palette(21)[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert datasets.voc_palette(21)[20] == (0, 64, 128)
