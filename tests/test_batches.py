"""What a training step gets: crops, batches of a step, CutMix; all of it a function of the seed and the step."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import batches
import datasets

# ---- crops ----


def test_augmentation_is_a_function_of_the_seed(folder):
    train_set = batches.TrainSet(datasets.Folder(folder), ["im00"], (32, 32), [0.5, 1.0, 2.0])
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
        image, mask = batches.TrainSet(Painted(), ["train-0000"], (80, 80), [1.0])[0, seed]
        inside = mask != 255
        assert torch.equal(image[0][inside], mask[inside]) and int(inside.sum()) == 64 * 64
        assert (torch.tensor([round(255 * m) for m in batches.MEAN]) == image[:, ~inside].T).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 4.0])
def test_resizing_a_window_equals_resizing_all(scale):
    """At scales at which the resized window begins at a whole pixel, but for the pixels beside its border."""
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (80, 122, 3), np.uint8), rng.integers(0, 9, (80, 122, 1), np.uint8)
    size = [round(80 * scale), round(122 * scale)]
    whole = v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), size, antialias=True).int()
    whole_mask = np.asarray(Image.fromarray(mask[..., 0]).resize(size[::-1], Image.Resampling.NEAREST))
    for _ in range(20):
        source, target = batches.draw_window((80, 122), (40, 48), scale, rng)
        if any(s.start * scale % 1 for s in source):
            continue
        crop = batches.resize_window(image, source, (40, 48), target, [1, 2, 3]).int()
        labels = batches.resize_window(mask, source, (40, 48), target, [255])[0].numpy()
        top, left = (round(s.start * scale) for s in source)
        assert (crop[:, 4:-4, 4:-4] - whole[:, top : top + 40, left : left + 48][:, 4:-4, 4:-4]).abs().max() <= 1
        assert np.array_equal(labels, whole_mask[top : top + 40, left : left + 48])


def test_windows_are_drawn_uniformly_and_small_images_are_surrounded():
    rng = np.random.default_rng(0)
    drawn = [batches.draw_window((10, 4), (6, 10), 1.5, rng) for _ in range(2000)]
    rows = np.bincount([source[0].start for source, _ in drawn])
    cols = np.bincount([target[1].start for _, target in drawn])
    assert len(rows) == 7 and (rows > 200).all() and len(cols) == 5 and (cols > 300).all()
    source, target = drawn[0]
    assert source[1] == slice(0, 4) and target[1].stop - target[1].start == 6 and target[0] == slice(0, 6)
    crop = batches.resize_window(np.zeros((10, 4, 3), np.uint8), source, (6, 10), target, [1, 2, 3])
    assert (crop[:, 0, target[1].start - 1 if target[1].start else -1] == torch.tensor([1, 2, 3])).all()
    assert (crop[:, :, target[1]] == 0).all()


def test_normalize_gives_imagenets_mean_zero():
    grey = torch.tensor([round(255 * m) for m in batches.MEAN], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert batches.normalize(grey, torch.device("cpu")).abs().max() < 0.01


# ---- the batches of a step ----


def test_sampler_is_a_function_of_seed_and_step():
    whole = list(batches.StepSampler(10, 4, seed=3, start=0, steps=20))
    assert list(batches.StepSampler(10, 4, seed=3, start=7, steps=20)) == whole[7:]
    assert whole != list(batches.StepSampler(10, 4, seed=4, start=0, steps=20))
    order = [index for batch in whole for index, _ in batch]
    assert all(sorted(order[i : i + 10]) == list(range(10)) for i in range(0, 80, 10))  # each image once an epoch
    seeds = [seed for batch in whole for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_micro_batches_of_a_step_are_its_batch():
    whole = list(batches.StepSampler(10, 6, seed=3, start=2, steps=5, views=2))
    micro_batches = list(batches.StepSampler(10, 6, seed=3, start=2, steps=5, views=2, parts=range(3), size=2))
    assert len(whole) == 3 and len(micro_batches) == 9
    for step, (first, second) in enumerate(zip([w[:6] for w in whole], [w[6:] for w in whole], strict=True)):
        of_step = micro_batches[3 * step : 3 * step + 3]
        assert [item for micro_batch in of_step for item in micro_batch[:2]] == first  # the views stay apart
        assert [item for micro_batch in of_step for item in micro_batch[2:]] == second
    assert list(batches.StepSampler(10, 6, 3, 2, 5, 2, range(1, 3), 2)) == [s for i, s in enumerate(micro_batches) if i % 3]


def test_seeds_differ_for_every_tuple():
    tuples = [(5,), (5, 0), (5, 0, 0), (0,), (0, 0), (5, 2), (5, 2, 0), (2, 5)]
    assert len({batches.seed_of(*parts) for parts in tuples}) == len(tuples)


# ---- CutMix ----


def test_cutmix_mask_covers_what_three_boxes_may():
    masks = batches.cutmix_mask(200, (64, 96), seed=0)
    assert masks.shape == (200, 1, 64, 96) and masks.dtype == torch.bool
    areas = masks.float().mean((1, 2, 3))
    # three boxes of a third of 0.25 to 0.5 of the area each; overlaps toggle, so the mean area is below 0.375
    assert 0.2 < areas.mean() < 0.375 and areas.max() < 0.52
    assert torch.equal(masks, batches.cutmix_mask(200, (64, 96), seed=0))
    assert not torch.equal(masks, batches.cutmix_mask(200, (64, 96), seed=1))


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
        mask = batches.cutmix_mask(1, (10, 10), 0)[0, 0]
    # sides of 0.6 / sqrt(3) of 10 pixels are 3: two equal boxes cancel, the third stays
    assert mask.sum() == 9 and mask[2:5, :3].all()


def test_cutmix_takes_the_second_view_inside_the_box():
    box = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    box[:, :, :2] = True
    views = torch.stack([torch.full((3, 4, 4), float(i)) for i in range(4)])
    mixed = batches.cutmix(views, box)
    assert (mixed[0, :, :2] == 2).all() and (mixed[0, :, 2:] == 0).all() and (mixed[1, :, :2] == 3).all()
    assert torch.equal(batches.cutmix(views[:, 0], box), mixed[:, 0])
    assert torch.equal(batches.cutmix(views[:, :, ::2, ::2], box), mixed[:, :, ::2, ::2])
    assert batches.cutmix(views, None) is views
