"""What a training step gets: crops, batches of a step, CutMix; all of it a function of the seed and the step."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import batches
import common
import datasets

# ---- crops ----


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_augmentation_is_a_function_of_the_seed(folder):
    train_set = batches.TrainSet(datasets.Folder(folder), ["im00"], (32, 32), [0.5, 1.0, 2.0])
    state = torch.get_rng_state()
    a, b, c = train_set[0, 1], train_set[0, 1], train_set[0, 2]
    assert same(a, b) and not torch.equal(a["image"], c["image"])
    assert torch.equal(torch.get_rng_state(), state)


def test_image_and_mask_are_cropped_alike_and_padding_is_ignored():
    class Painted(datasets.Shapes):
        """The image shows its mask."""

        def image(self, name):
            return np.repeat(self.mask(name)[..., None], 3, 2)

    for seed in range(8):
        image, mask = batches.TrainSet(Painted(), ["train-0000"], (80, 80), [1.0])[0, seed].values()
        inside = mask != 255
        assert torch.equal(image[0][inside], mask[inside]) and int(inside.sum()) == 64 * 64
        assert (torch.tensor([round(255 * m) for m in common.MEAN]) == image[:, ~inside].T).all()


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
    grey = torch.tensor([round(255 * m) for m in common.MEAN], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert batches.normalize(grey, torch.device("cpu")).abs().max() < 0.01


# ---- strong views ----


def strong_views(image, count):
    return [batches.strong_view(image, np.random.default_rng(seed)) for seed in range(count)]


def noise(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def fraction(values) -> float:
    return float(np.mean([bool(value) for value in values]))


def test_strong_views_are_as_frequent_as_in_unimatch():
    """Of one colour, on which a blur does not show; of one bright pixel, which a blur spreads."""
    plain = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).repeat(1, 4, 4)
    views = strong_views(plain, 600)
    assert fraction(torch.equal(view, plain) for view in views) == pytest.approx(0.2 * 0.8, abs=0.04)
    assert fraction((view == view[:1]).all() for view in views) == pytest.approx(0.2, abs=0.04)
    dot = torch.zeros(3, 15, 15, dtype=torch.uint8)
    dot[:, 7, 7] = 255
    blurred = fraction(len(view.unique()) > 2 for view in strong_views(dot, 500))
    assert 0.5 * (2 - 0.5) / 1.9 - 0.05 < blurred < 0.5 + 0.05  # of a sigma below 0.25 to 0.5, by the contrast, nothing shows


def test_colours_are_drawn_from_the_ranges_of_unimatch(monkeypatch):
    drawn = {name: [] for name in ("adjust_brightness", "adjust_saturation", "adjust_hue")}
    for name, values in drawn.items():
        monkeypatch.setattr(v2.functional, name, lambda x, factor, values=values: values.append(factor) or x)
    for name, values in (("stretch", drawn.setdefault("contrast", [])), ("gaussian_blur", drawn.setdefault("sigma", []))):
        monkeypatch.setattr(batches, name, lambda x, *factors, values=values: values.append(factors[-1]) or x)
    strong_views(noise(3, 4, 4), 500)
    low = {"adjust_hue": -0.25, "sigma": 0.1}
    high = {"adjust_hue": 0.25, "sigma": 2.0}
    for name, values in drawn.items():
        near = {"abs": 0.01 * (high.get(name, 1.5) - low.get(name, 0.5))}
        assert min(values) == pytest.approx(low.get(name, 0.5), **near), name
        assert max(values) == pytest.approx(high.get(name, 1.5), **near), name
        assert len(values) / 500 == pytest.approx(0.5 if name == "sigma" else 0.8, abs=0.05), name


@pytest.mark.parametrize("size", [(40, 56), (5, 3), (1, 1)])
def test_contrast_and_blur_are_those_of_torchvision(size):
    image = noise(3, *size)
    grey = v2.functional.rgb_to_grayscale(image).double().mean().item()
    for factor in (0.5, 1.0, 1.5):
        ours, theirs = batches.stretch(image, grey, factor), v2.functional.adjust_contrast(image, factor)
        assert (ours.int() - theirs.int()).abs().max() <= 1
    for sigma in (0.1, 0.7, 2.0):
        radius = [min(int(np.ceil(3 * sigma)), side - 1) for side in size[::-1]]
        theirs = v2.functional.gaussian_blur(image, [2 * r + 1 for r in radius], [sigma, sigma])
        assert (batches.gaussian_blur(image, sigma).int() - theirs.int()).abs().max() <= 1


def test_a_strong_view_has_the_geometry_of_the_weak_one_and_is_a_function_of_the_seed():
    image = noise(3, 40, 56)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    views, again, mirrored = (strong_views(each, 50) for each in (image, image, image.flip(-1)))
    torch.set_num_threads(3 - min(threads, 2))
    other_threads = strong_views(noise(3, 200, 400), 4)
    torch.set_num_threads(threads)
    assert all(map(torch.equal, strong_views(noise(3, 200, 400), 4), other_threads))
    assert all(map(torch.equal, views, again)) and torch.equal(torch.get_rng_state(), state)
    assert len({view.numpy().tobytes() for view in views}) > 40
    for view, mirror in zip(views, mirrored, strict=True):
        assert view.shape == image.shape and view.dtype == torch.uint8
        assert (view.flip(-1).int() - mirror.int()).abs().max() <= 1


# ---- the batches of a step ----


def arguments(**changes):
    """Of `step_batches` and `train_batches`."""
    args = {"batch": 4, "grad_accum": 1, "seed": 3, "steps": 4, "crop": (48, 48), "scales": [0.75, 1.25], "image_scale": 1.0}
    return argparse.Namespace(**{**args, "workers": 0, "cutmix": True, **changes})


def first_steps(args, steps=2, views=2, labeled_more=None, **more):
    """The `Batch`es of the first steps on `shapes`."""
    data = datasets.Shapes()
    labeled = batches.train_batches(data, data.train[:6], args, 1, 0, labeled=True, **(labeled_more or {}))
    unlabeled = batches.train_batches(data, data.train[6:20], args, views, 0, labeled=False, **more)
    device = torch.device("cpu")
    return [
        batch
        for step in range(steps)
        for batch in batches.step_batches(args, step, device, labeled.__next__, unlabeled.__next__)
    ]


@pytest.mark.parametrize("cutmix", [True, False])
def test_strong_views_change_what_the_student_sees_and_nothing_else(cutmix):
    args, views = arguments(cutmix=cutmix), 1 + cutmix
    for weak, strong in zip(first_steps(args, views=views), first_steps(args, views=views, strong=True), strict=True):
        assert weak.student_mixed is weak.mixed
        for field in batches.Batch._fields:
            ours, theirs = getattr(weak, field), getattr(strong, field)
            if field != "student_mixed" and ours is not None:
                assert torch.equal(ours, theirs), field
        assert not torch.equal(strong.student_mixed, strong.mixed)


class Reds(datasets.Shapes):
    """Scenes of large squares, whose upper rows have no ground truth; three images in four have a map."""

    def image(self, name):
        rng = np.random.default_rng(int(name[-4:]))
        return rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)

    def mask(self, name):
        return np.where(np.arange(64)[:, None] < 9, 255, super().mask(name)).astype(np.uint8)

    def has_mask(self, name):
        return int(name[-4:]) % 4 > 0


def red(images: torch.Tensor) -> torch.Tensor:
    """(m, 3, H, W) normalized -> (m, H, W) int64: a map that follows from the image itself."""
    mean, std = batches.colour_statistics(torch.device("cpu"))
    return (255 * (images * std + mean))[:, 0].round().long() // 52


@pytest.mark.parametrize("cutmix", [True, False])
@pytest.mark.parametrize("scales,alike", [([1.0], 1.0), ([0.75, 1.25], 0.75)])
def test_files_of_pseudo_labels_follow_the_crop_the_flip_and_cutmix(monkeypatch, cutmix, scales, alike):
    """Exactly; but for the borders of the squares, where images of another size are blurred."""
    monkeypatch.setattr(datasets, "Shapes", Reds)
    maps = Reds()
    maps.mask = lambda name: maps.image(name)[..., 0] // 52
    args = arguments(crop=(72, 56), scales=scales, cutmix=cutmix)
    made = first_steps(args, 3, 1 + cutmix, {"pseudo_labels": maps}, pseudo_labels=maps)
    agree, covered = [], []
    for batch in made:
        for images, labels, outside in (
            (batch.images, batch.pseudo_labels_l, batch.labels == 255),
            (batch.mixed, batch.pseudo_labels_u, batch.mixed_ignore),
        ):
            given = labels != 255
            assert not given[outside].any() and labels.dtype == torch.int64
            agree.append((red(images) == labels)[given])
        has_map = (batch.pseudo_labels_l != 255).flatten(1).any(1)
        assert torch.equal(batch.pseudo_labels_l != 255, (batch.labels != 255) & has_map[:, None, None])
        covered += has_map.tolist()
    assert {*covered} == {False, True}
    assert torch.cat(agree).float().mean() >= alike and len(torch.cat(agree)) > 20000


def test_pseudo_labels_of_files_are_counted_for_themselves():
    """The mean over the pixels that they label; the teachers' over all pixels of the images."""
    maps = datasets.Shapes()
    maps.mask = lambda name: np.where(np.arange(64) < 16, 255, 1).astype(np.uint8)[None].repeat(64, 0)
    maps.has_mask = lambda name: name >= "train-0010"
    args = arguments(crop=(64, 64), scales=[1.0], grad_accum=2, cutmix=False)
    parts = first_steps(args, 1, 1, pseudo_labels=maps)
    assert len(parts) == 2 and parts[0].pseudo_labels_l is None
    counts = batches.valid_pixels([part.ignore_masks() for part in parts])
    labeled = [int((part.pseudo_labels_u != 255).sum()) for part in parts]
    assert counts.tolist() == [2 * 64 * 64, 2 * 64 * 64, 0, sum(labeled) / 2] and 0 < sum(labeled) < 4 * 64 * 64


def test_a_strong_view_is_one_of_the_same_crop_and_mixed_alike(monkeypatch):
    """A negative in place of other colours is found at every pixel again."""
    monkeypatch.setattr(batches, "strong_view", lambda image, rng: 255 - image)
    mean, std = batches.colour_statistics(torch.device("cpu"))
    for batch in first_steps(arguments(crop=(80, 80)), strong=True):
        ours, theirs = ((255 * (images * std + mean)) for images in (batch.student_mixed, batch.mixed))
        torch.testing.assert_close(ours, 255 - theirs, rtol=0, atol=1e-3)


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
