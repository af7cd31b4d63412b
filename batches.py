"""Batches of training images: augmentation, the sampler, CutMix, normalization, and all that one step needs.

Everything random is a pure function of the seed and the step, so that a resumed run sees what an uninterrupted one sees.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from common import IGNORE_INDEX, MEAN, STD, UserError, mean_over_ranks, rank_and_size, start_workers

FILL = [124, 116, 104]  # ImageNet's mean as a colour, for pixels outside the image

# ---- augmentation ----


def draw_window(size, crop, scale: float, rng: np.random.Generator) -> tuple[list[slice], list[slice]]:
    """A uniformly drawn crop of an image (H, W) that is to be resized by `scale`: which rows and columns of the image
    become which rows and columns of the crop. Where the resized image is smaller than the crop, it fills a part of it.

    Windows begin and end at whole pixels of the image, so a crop's scale differs from `scale` by half a pixel at most.
    """
    source, target = [], []
    for side, length in zip(size, crop, strict=True):
        resized = max(1, round(side * scale))
        taken = min(side, max(1, round(length * side / resized)))
        start = int(rng.integers(side - taken, endpoint=True))
        source.append(slice(start, start + taken))
        filled = min(resized, length)
        start = int(rng.integers(length - filled, endpoint=True))
        target.append(slice(start, start + filled))
    return source, target


def resize_window(array: np.ndarray, source: list[slice], crop, target: list[slice], fill) -> torch.Tensor:
    """(H, W, C) uint8 -> (C, *crop) uint8: the window `source`, resized to `target`, and `fill` around it.

    Images (C = 3) are resized with antialiased bilinear weights, masks (C = 1) take the nearest pixel.
    """
    out = torch.tensor(fill, dtype=torch.uint8).view(-1, 1, 1).repeat(1, *crop)
    pixels = torch.from_numpy(np.array(array[tuple(source)])).permute(2, 0, 1)
    mode = v2.InterpolationMode.BILINEAR if len(pixels) == 3 else v2.InterpolationMode.NEAREST_EXACT
    size = [t.stop - t.start for t in target]
    out[:, target[0], target[1]] = v2.functional.resize(pixels, size, mode, antialias=True)
    return out


def strong_view(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """image (3, H, W) uint8 -> one of the same geometry in other colours, and blurred, as UniMatch draws them (Yang et al.
    2023): colour jitter with probability 0.8, its four parts in a drawn order; grey with 0.2; a Gaussian blur with 0.5."""
    colours = v2.functional
    jitter = {  # contrast: the mean of whole numbers in float64, so that the number of threads changes nothing
        "brightness": lambda x: colours.adjust_brightness(x, rng.uniform(0.5, 1.5)),
        "contrast": lambda x: stretch(x, colours.rgb_to_grayscale(x).double().mean().item(), rng.uniform(0.5, 1.5)),
        "saturation": lambda x: colours.adjust_saturation(x, rng.uniform(0.5, 1.5)),
        "hue": lambda x: colours.adjust_hue(x, rng.uniform(-0.25, 0.25)),
    }
    if rng.random() < 0.8:
        for name in rng.permutation([*jitter]):
            image = jitter[name](image)
    if rng.random() < 0.2:
        image = colours.rgb_to_grayscale(image, 3)
    if rng.random() < 0.5:
        image = gaussian_blur(image, rng.uniform(0.1, 2.0))
    return image


def stretch(image: torch.Tensor, centre: float, factor: float) -> torch.Tensor:
    """(..., H, W) uint8, the distance of each value from `centre` multiplied."""
    return image.mul(factor).add_(centre * (1 - factor)).clamp_(0, 255).to(torch.uint8)


def gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """(C, H, W) uint8, blurred with a Gaussian of `sigma` pixels that ends at three of them; the border is mirrored.

    Sums of shifted images along one side and then the other: torchvision's convolution in two dimensions takes ten times as
    long on a CPU and can depend on the number of threads.
    """
    for dim in (1, 2):
        length = image.shape[dim]
        radius = min(math.ceil(3 * sigma), length - 1)  # as far as a border can be mirrored
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        padding = (0, 0, radius, radius) if dim == 1 else (radius, radius, 0, 0)
        padded = torch.nn.functional.pad(image.float(), padding, mode="reflect")
        image = torch.zeros_like(image, dtype=torch.float32)
        for shift, weight in enumerate(weights / weights.sum()):
            image.add_(padded.narrow(dim, shift, length), alpha=float(weight))
    return image.round_().to(torch.uint8)


class TrainSet(torch.utils.data.Dataset):
    """Augmented crops: a drawn scale, mirrored or not, and a drawn window. Item (index, seed) -> `image` (3, h, w) uint8 and
    `mask` (h, w) uint8, 255 where the crop reaches outside the image; with `strong` also the `strong` view (3, h, w) uint8 of
    the same crop, and with `pseudo_labels` the same crop of the image's map, (h, w) uint8, 255 outside. These two change
    nothing of the others.

    With `labeled=False` no mask is opened: the mask then holds 0 for pixels of the image and 255 outside. Masks stay
    bytes until they are on the device.
    """

    def __init__(self, dataset, names, crop, scales, image_scale=1.0, labeled=True, strong=False, pseudo_labels=None):
        self.dataset, self.names, self.crop, self.labeled = dataset, names, crop, labeled
        self.strong, self.pseudo_labels = strong, pseudo_labels
        self.scales = [image_scale * s for s in scales]

    def __getitem__(self, item):
        index, seed = item
        name = self.names[index]
        rng = np.random.default_rng(seed)
        image = self.dataset.image(name)
        mask = self.dataset.mask(name) if self.labeled else np.broadcast_to(np.uint8(0), image.shape[:2])
        # the window first, so that only its pixels are resized
        source, target = draw_window(image.shape[:2], self.crop, rng.choice(self.scales), rng)
        crops = {"image": resize_window(image, source, self.crop, target, FILL)}
        maps = {"mask": mask}
        if self.pseudo_labels:
            has_map = self.pseudo_labels.has_mask(name)
            none = np.broadcast_to(np.uint8(IGNORE_INDEX), image.shape[:2])
            maps["pseudo_labels"] = self.pseudo_labels.mask(name) if has_map else none
        for key, labels in maps.items():
            crops[key] = resize_window(labels[..., None], source, self.crop, target, [IGNORE_INDEX])[0]
        if rng.random() < 0.5:
            crops = {key: crop.flip(-1) for key, crop in crops.items()}
        if self.strong:  # last, so that what it draws leaves the others as they are
            crops["strong"] = strong_view(crops["image"], rng)
        return crops


# ---- which images a step sees ----


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


class StepSampler(torch.utils.data.Sampler):
    """Lists of (index, augmentation seed), one per micro-batch, for steps `start` to `steps`; each is a pure function of (seed,
    step, micro-batch).

    A step sees views · batch images, the views of a batch one after the other. Micro-batch k of `size` images has
    the images k · size to (k + 1) · size of each. The images come in an endless row of permutations of range(n), so each is
    seen once per epoch.
    """

    def __init__(self, n, batch, seed, start, steps, views=1, parts=range(1), size=None):
        self.n, self.batch, self.seed, self.start, self.steps = n, batch, seed, start, steps
        self.views, self.parts, self.size = views, parts, size or batch

    def __iter__(self):
        for step in range(self.start, self.steps):
            for k in self.parts:
                yield [
                    (int(permutation(self.n, self.seed, p // self.n)[p % self.n]), seed_of(self.seed, p))
                    for view in range(step * self.views, (step + 1) * self.views)
                    for p in range(view * self.batch + k * self.size, view * self.batch + (k + 1) * self.size)
                ]


def seed_of(*parts: int) -> int:
    """A seed that is different for each tuple of whole numbers, whatever its length."""
    return int(np.random.SeedSequence([len(parts), *parts]).generate_state(1, np.uint64)[0] >> 1)


def micro_batches(args) -> tuple[range, int]:
    """Which micro-batches of a step this rank computes, one after the other, and how many labeled images one has.

    The batch is cut into ranks · --grad-accum micro-batches in the order of its images, so that it holds the same images at
    any number of ranks. Raises UserError where it cannot be cut evenly.
    """
    rank, ranks = rank_and_size()
    total = ranks * args.grad_accum
    if args.batch % total or args.batch // total < 2:
        raise UserError(
            f"--batch {args.batch}: is split over {ranks} process(es) with --grad-accum {args.grad_accum}, so it must be a "
            f"multiple of {total} and at least {2 * total}"
        )
    return range(rank * args.grad_accum, (rank + 1) * args.grad_accum), args.batch // total


def train_batches(dataset, names, args, views: int, start: int, labeled: bool, **more):
    """An iterator over this rank's micro-batches of steps `start` to `args.steps`: the items of a `TrainSet`, stacked,
    views · m of them, m images of each view. `more`: its `strong` and `pseudo_labels`."""
    train_set = TrainSet(dataset, names, args.crop, args.scales, args.image_scale, labeled, **more)
    parts, size = micro_batches(args)
    sampler = StepSampler(len(names), args.batch, loader_seed(args, labeled), start, args.steps, views, parts, size)
    workers = {"num_workers": args.workers, "persistent_workers": True, "prefetch_factor": 4} if args.workers else {}
    return start_workers(DataLoader(train_set, batch_sampler=sampler, pin_memory=torch.cuda.is_available(), **workers))


def loader_seed(args, labeled: bool) -> int:
    """The seed of the labeled images, or of the unlabeled ones."""
    return seed_of(args.seed, int(labeled))


def images_of_step(args, partition, step: int, images: int) -> dict[str, list[str]]:
    """The names of the images that step `step` saw on all ranks, `images` in number, of which `args.batch` are labeled."""
    found = {}
    for key, names, views in (("labeled", partition.labeled, 1), ("unlabeled", partition.unlabeled, images // args.batch - 1)):
        if views:
            seed = loader_seed(args, key == "labeled")
            (items,) = StepSampler(len(names), args.batch, seed, step, step + 1, views)
            found[key] = [names[index] for index, _ in items]
    return found


# ---- CutMix ----


def cutmix_mask(batch: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """(B, 1, H, W) bool, True where the second view goes: three boxes per image, as in French et al. 2020.

    Each box covers a third of a fraction of the area drawn from 0.25 to 0.5, its shape drawn log-uniformly; where boxes
    overlap, they toggle.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    mask = np.zeros((batch, 1, height, width), bool)
    for b in range(batch):
        for area in rng.uniform(0.25, 0.5, 3):
            tall = math.exp(rng.uniform(0, 1) * math.log(area))  # fraction of the height; the width's is area / tall
            h, w = round(tall * math.sqrt(1 / 3) * height), round(area / tall * math.sqrt(1 / 3) * width)
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            mask[b, 0, top : top + h, left : left + w] ^= True
    return torch.from_numpy(mask)


def cutmix(views: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """views (2B, C, H, W) or (2B, H, W), mask (B, 1, H, W) bool -> B mixed views: the first B outside the mask, the last
    inside.

    Maps of another size than the mask are mixed along the mask at their size. Without a mask the views are as they are.
    """
    if mask is None:
        return views
    if mask.shape[-2:] != views.shape[-2:]:
        mask = torch.nn.functional.interpolate(mask.float(), views.shape[-2:], mode="nearest-exact") > 0.5
    outside, inside = views.chunk(2)
    return torch.where(mask if views.ndim == 4 else mask[:, 0], inside, outside)


# ---- a step ----


class Batch(NamedTuple):
    """One micro-batch on the device: m labeled images, and m or 2m clean unlabeled views that CutMix mixes to m. In a step
    without unlabeled images the views and what is made of them are None, and so are pseudo labels that no files give."""

    images: torch.Tensor  # (m, 3, H, W), normalized
    labels: torch.Tensor  # (m, H, W) int64, 255 = ignore
    views: torch.Tensor = None  # (2m, 3, H, W), clean; (m, 3, H, W) without CutMix
    views_ignore: torch.Tensor = None  # (2m, H, W) bool: where a view reaches outside its image
    mixed: torch.Tensor = None  # (m, 3, H, W), as teachers see it
    mixed_ignore: torch.Tensor = None  # (m, H, W) bool
    cutmix_mask: torch.Tensor | None = None  # (m, 1, H, W) bool; None without CutMix
    student_mixed: torch.Tensor = None  # (m, 3, H, W), as the student sees it: `mixed`, or the strong views, mixed alike
    pseudo_labels_l: torch.Tensor | None = None  # (m, H, W) int64, of files, for the labeled images; 255 = ignore
    pseudo_labels_u: torch.Tensor | None = None  # (m, H, W) int64, of files, for the views, mixed as they are

    def mix(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps of the clean views, mixed as the views are."""
        return cutmix(maps, self.cutmix_mask)

    def ignore_masks(self) -> list[torch.Tensor]:
        """What is ignored of the labels, the mixed views, and the files' pseudo labels of both, (m, H, W) bool each, for
        `valid_pixels`. Where there is no such map, nothing is valid.

        A teacher labels every pixel that its image has, so its cross entropies are divided by the first two. Files may label
        some images and pixels alone: their cross entropies are means over the pixels that they label, so that a folder which
        covers a part of the images teaches as much about each of them as one that covers all.
        """
        of_files = (self.pseudo_labels_l, self.pseudo_labels_u)
        none = torch.ones(1, dtype=torch.bool, device=self.labels.device)
        views = none if self.mixed_ignore is None else self.mixed_ignore
        return [self.labels == IGNORE_INDEX, views, *(none if maps is None else maps == IGNORE_INDEX for maps in of_files)]


def step_batches(args, step: int, device, next_labeled, next_unlabeled=None) -> list[Batch]:
    """This rank's micro-batches of a step. `next_labeled` and `next_unlabeled` give the next item of `train_batches`; without
    the latter there are no views."""
    parts, size = micro_batches(args)
    masks = [None] * len(parts)
    if next_unlabeled and args.cutmix:
        whole = cutmix_mask(args.batch, args.crop, seed_of(args.seed, 2, step))
        if device.type == "cuda":
            whole = whole.pin_memory().to(device, non_blocking=True)
        masks = [whole[k * size : (k + 1) * size] for k in parts]
    batches = []
    for mask in masks:
        crops = next_labeled()
        labels = crops["mask"].to(device, non_blocking=True).long()
        batch = Batch(normalize(crops["image"], device), labels, cutmix_mask=mask)
        if "pseudo_labels" in crops:  # a pixel without ground truth has none of a teacher either
            maps = crops["pseudo_labels"].to(device, non_blocking=True).long()
            batch = batch._replace(pseudo_labels_l=maps.masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX))
        if next_unlabeled:
            crops = next_unlabeled()
            views, ignore = normalize(crops["image"], device), crops["mask"].to(device, non_blocking=True) == IGNORE_INDEX
            mixed = batch.mix(views)
            batch = batch._replace(views=views, views_ignore=ignore, mixed=mixed, mixed_ignore=batch.mix(ignore))
            batch = batch._replace(student_mixed=mixed)
            if "strong" in crops:  # mixed as bytes, which takes less memory
                strong = batch.mix(crops["strong"].to(device, non_blocking=True))
                batch = batch._replace(student_mixed=normalize(strong, device))
            if "pseudo_labels" in crops:
                maps = crops["pseudo_labels"].to(device, non_blocking=True)
                batch = batch._replace(pseudo_labels_u=batch.mix(maps).long())
        batches.append(batch)
    return batches


def normalize(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 on `device`, channels_last, with ImageNet's mean and deviation taken out."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    mean, std = colour_statistics(device)
    return (images / 255 - mean) / std


@functools.lru_cache(maxsize=4)
def colour_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 1, 1) each, copied to the device once: a copy from pageable memory waits for it."""
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


def valid_pixels(ignore_masks: list[list[torch.Tensor]]) -> torch.Tensor:
    """The mean number of pixels per micro-batch that are not ignored, over the micro-batches of all ranks.

    `ignore_masks` has a list per micro-batch of K bool masks (m, H, W) -> (K,) float32. The cross entropies of a map are
    divided by its entry, so that a step does not depend on how its batch is split.
    """
    counts = torch.stack([torch.stack([(~ignore).sum() for ignore in masks]) for masks in ignore_masks])
    return mean_over_ranks(counts.float().mean(0))
