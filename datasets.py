"""Images and masks, partitions into labeled and unlabeled images, augmentation, CutMix.

    python datasets.py --dataset folder --data data/mine --part 1/8     # what would be labeled, and the classes' shares
    python datasets.py --dataset shapes --picture shapes.png            # a sheet of images and masks

Everything random is a pure function of the seed and the step, so that a resumed run sees what an uninterrupted one sees.
"""

import argparse
import colorsys
import functools
import hashlib
import math
import pathlib
import re
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from common import ArgumentParser, UserError, crop_size, run

IGNORE = 255  # the mask value that takes part neither in a loss nor in mIoU
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
SUFFIXES = (".jpg", ".jpeg", ".png")
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on files it cannot read

# What the arguments left at their defaults become, by data set. `shapes` has small stand-ins for the teachers, so that
# the whole pipeline runs in minutes without a GPU; `folder` follows the paper's VOC recipe.
RECIPES = {
    "shapes": {
        "deep": "resnet34", "wide": "resnet18", "weights": "none", "head_width": 64, "crop": (64, 64),
        "scales": [0.75, 1.0, 1.25], "batch": 8, "lr": 0.05, "teacher_steps": 350, "steps": 250, "sup_only": 0.4,
        "ramp_up": 0.6, "cps_weight": 1.0, "threshold": 0.0, "lambda_image": 0.002, "lambda_region": 10.0,
    },
    "folder": {
        "deep": "resnet101", "wide": "wide_resnet34", "weights": "imagenet", "head_width": 256,
        "crop": (512, 512), "scales": [0.5, 0.75, 1.0, 1.5, 1.75, 2.0], "batch": 8, "lr": 0.0025,
        "lr_of": {"wide_resnet34": 0.001, "mobilenetv2": 0.0035}, "teacher_steps": 40_000, "steps": 40_000, "sup_only": 0.0,
        "ramp_up": 0.0, "cps_weight": 1.0, "threshold": 0.0, "lambda_image": 0.002, "lambda_region": 100.0,
    },
}  # fmt: skip


class Partition(NamedTuple):
    name: str  # such as 1/8
    labeled: list[str]
    unlabeled: list[str]
    hash: str  # of both lists; stands in checkpoints and results, so that figures can be compared


class Shapes:
    """The embedded data set: 64x64 scenes of five kinds of shapes, drawn by a generator seeded with the image's name.

    Each kind has a hue of its own, somewhat spread, and the background is paler than the shapes; brightness, stripes, size
    and angle say nothing. Shapes cover one another, and thin lines distract.
    """

    name = "shapes"
    size = 64

    def __init__(self, train: int = 512, val: int = 200):
        self.classes = ["background", "disk", "square", "triangle", "star", "cross"]
        self.palette = [(40, 44, 52), (224, 108, 117), (97, 175, 239), (152, 195, 121), (229, 192, 123), (198, 120, 221)]
        self.train = [f"train-{i:04d}" for i in range(train)]
        self.val = [f"val-{i:04d}" for i in range(val)]
        self.bare = []

    def has_mask(self, name):
        return True

    @functools.lru_cache(maxsize=1024)  # noqa: B019  (one instance a process; drawing costs more than augmenting)
    def draw(self, name):
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        s = self.size
        image = texture(rng, s, rng.random(), (0.0, 0.3))
        mask = np.zeros((s, s), np.uint8)
        for _ in range(rng.integers(2, 5)):
            kind = int(rng.integers(1, 6))
            centre, radius = rng.uniform(0.1 * s, 0.9 * s, 2), rng.uniform(0.14, 0.3) * s
            canvas = Image.new("L", (s, s))
            outline = OUTLINES[kind] @ rotation(rng.uniform(0, 2 * math.pi)) * radius + centre
            ImageDraw.Draw(canvas).polygon([tuple(p) for p in outline], fill=1)
            inside = np.asarray(canvas, bool)
            hue = (kind - 1) / 5 + rng.normal(0, 0.04)
            image[inside] = texture(rng, s, hue, (0.35, 1.0))[inside]
            mask[inside] = kind
        picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        for _ in range(rng.integers(2, 5)):
            pen.line([tuple(p) for p in rng.uniform(0, s, (2, 2))], fill=tuple(rng.integers(0, 256, 3).tolist()))
        image = np.asarray(picture) + rng.normal(0, 8, (s, s, 3))
        return np.clip(image, 0, 255).astype(np.uint8), mask

    def image(self, name) -> np.ndarray:
        """(H, W, 3) uint8, RGB."""
        return self.draw(name)[0]

    def mask(self, name) -> np.ndarray:
        """(H, W) uint8, class indices."""
        return self.draw(name)[1]

    def check(self, names, masks):
        pass


def texture(rng, s, hue, saturation):
    """(s, s, 3): a gradient between two colours of one hue, with stripes of a random period, angle and strength."""
    a, b = (np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(*saturation), rng.uniform(0.3, 1))) for _ in range(2))
    angle, period, strength = rng.uniform(0, 2 * math.pi), rng.uniform(3, 16), rng.uniform(0, 30)
    y, x = np.mgrid[:s, :s]
    along = x * math.cos(angle) + y * math.sin(angle)
    t = ((along - along.min()) / np.ptp(along))[..., None]
    return 255 * (a + (b - a) * t) + strength * np.sin(2 * math.pi * along / period)[..., None]


def rotation(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def ring(corners, radii=(1.0,)):
    """A polygon of `corners` corners on circles whose radii alternate."""
    angles = np.arange(corners) * 2 * math.pi / corners
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.resize(radii, corners)[:, None]


OUTLINES = {
    1: ring(24, (0.9,)),
    2: ring(4),
    3: ring(3, (1.15,)),
    4: ring(10, (1.15, 0.5)),
    5: np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3),
                 (-1, -.3), (-.3, -.3)]),
}  # fmt: skip


class Folder:
    """Own data: images/NAME.(jpg|png), masks/NAME.png (class index, 255 = ignore), train.txt, val.txt, and optionally
    classes.txt (one name a line) and unlabeled.txt. An image without a mask is unlabeled; its mask is never opened."""

    def __init__(self, root: pathlib.Path | str):
        self.root = root = pathlib.Path(root)
        self.name = root.resolve().name
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the data set's folder with --data")
        for part in ("images", "masks"):
            if not (root / part).is_dir():
                raise UserError(f"{root / part}: no such folder; a data set holds images/, masks/, train.txt and val.txt")
        self.files = {p.stem: p for p in sorted((root / "images").iterdir()) if p.suffix.lower() in SUFFIXES}
        self.masked = {p.stem for p in (root / "masks").iterdir() if p.suffix.lower() == ".png"}
        self.train, self.val = self.read_list("train.txt"), self.read_list("val.txt")
        extra = self.read_list("unlabeled.txt") if (root / "unlabeled.txt").exists() else []
        self.bare = [name for name in extra if name not in set(self.train)]
        overlap = set(self.val) & {*self.train, *self.bare}
        if overlap:
            raise UserError(f"{root / 'val.txt'}: '{min(overlap)}' is also a training image; take it out of one list")
        unmasked = [name for name in self.val if name not in self.masked]
        if unmasked:
            raise UserError(f"{root / 'masks' / (unmasked[0] + '.png')}: no such mask, but val.txt lists its image; "
                            "add the mask or take the name out")  # fmt: skip
        if (root / "classes.txt").exists():
            self.classes = self.read_lines("classes.txt")
        else:  # then val says how many classes there are, whatever the partition
            highest = max(int(mask[mask != IGNORE].max(initial=0)) for mask in map(self.read_mask, self.val))
            self.classes = [f"class {i}" for i in range(highest + 1)]
        if len(self.classes) < 2:
            raise UserError(f"{root / 'classes.txt'}: names {len(self.classes)} class(es); at least two are needed, one a line")
        self.palette = voc_palette(len(self.classes))

    def read_lines(self, file):
        path = self.root / file
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; write one image name a line, without folder and extension") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None

    def read_list(self, file):
        names = self.read_lines(file)
        if not names:
            raise UserError(f"{self.root / file}: names no image; write one image name a line")
        for name in names:
            if name not in self.files:
                raise UserError(f"{self.root / 'images' / name}.jpg (or .png): no such image, but {file} lists '{name}'; "
                                "add the image or take the name out")  # fmt: skip
        return list(dict.fromkeys(names))

    def has_mask(self, name):
        return name in self.masked

    def image(self, name) -> np.ndarray:
        """(H, W, 3) uint8, RGB, upright."""
        return np.asarray(open_image(self.files[name]))

    def mask(self, name) -> np.ndarray:
        """(H, W) uint8, class indices and 255. Raises UserError for any other value."""
        mask = self.read_mask(name)
        values = np.unique(mask)
        wrong = values[(values >= len(self.classes)) & (values != IGNORE)]
        if wrong.size:
            raise UserError(f"{self.mask_path(name)}: holds label {wrong[0]}, but the {len(self.classes)} classes are 0 to "
                            f"{len(self.classes) - 1}, and 255 is ignored; mend the mask or classes.txt")  # fmt: skip
        return mask

    def mask_path(self, name):
        return self.root / "masks" / f"{name}.png"

    def read_mask(self, name):
        path = self.mask_path(name)
        try:
            with Image.open(path) as file:
                if file.mode not in ("L", "P", "1"):
                    raise UserError(
                        f"{path}: is a {file.mode} image; a mask holds one class index a pixel (grey or palette PNG)"
                    )
                return np.array(ImageOps.exif_transpose(file), dtype=np.uint8)
        except FileNotFoundError:
            raise UserError(f"{path}: no such mask") from None
        except BROKEN_IMAGE as error:
            raise UserError(f"{path}: cannot be read as a PNG ({error}); replace it") from None

    def check(self, names, masks: bool):
        """Open the header of every image, and where `masks` every mask, so that unreadable files, unequal sizes and labels
        outside the classes end the run before it starts."""
        for name in names:
            width, height = upright_size(self.files[name])
            if masks and self.mask(name).shape != (height, width):
                mask_height, mask_width = self.mask(name).shape
                raise UserError(f"{self.mask_path(name)}: is {mask_width}x{mask_height}, its image {width}x{height}; image and "
                                "mask must be of one size")  # fmt: skip


def upright_size(path) -> tuple[int, int]:
    """(width, height) of an image as it is shown, from its header alone. Raises UserError."""
    try:
        with Image.open(path) as file:
            # EXIF orientations that swap the sides; but for the first test Pillow would decode a PNG to look for EXIF after it
            turned = "exif" in file.info and file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return file.size[::-1] if turned else file.size
    except BROKEN_IMAGE:
        raise UserError(f"{path}: not a readable image; replace it or take it out of the lists") from None


def open_image(path) -> Image.Image:
    """An RGB image, turned upright by its EXIF entry. Raises UserError."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except BROKEN_IMAGE as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); replace it or take it out of the lists") from None


def voc_palette(n: int) -> list[tuple[int, int, int]]:
    """PASCAL VOC's colours: the bits of the class index, spread over the three channels from the highest bit down."""
    colours = []
    for index in range(n):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        colours.append(tuple(colour))
    return colours


def open_dataset(name: str, data: pathlib.Path | str | None):
    """The data set of `--dataset` and `--data`. Raises UserError."""
    if name == "shapes":
        if data is not None:
            raise UserError(f"--data {data}: the embedded data set takes no folder; give --dataset folder with it "
                            "(make: DATASET=folder)")  # fmt: skip
        return Shapes()
    if data is None:
        raise UserError(f"--dataset {name}: needs its folder; give --data DIR (make: DATA=DIR)")
    return Folder(data)


def partition(dataset, part: str, seed: int = 0) -> Partition:
    """Split the training images: of n, ceil(n / k) stay labeled for `part` 1/k, or as many of them as have a mask.

    Partitions of one seed are nested, 1/16 in 1/8 in 1/4, and do not change when the masks of unlabeled images go away.
    `1` keeps every mask.
    """
    match = re.fullmatch(r"1(?:/([1-9][0-9]*))?", part)
    if not match:
        raise UserError(f"--part {part}: expected 1/K with a whole number K, such as 1/8, or 1 for all masks")
    k = int(match[1] or 1)
    able = [name for name in dataset.train if dataset.has_mask(name)]
    ranked = sorted(able, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    labeled = sorted(ranked[: math.ceil(len(dataset.train) / k)])
    if not labeled:
        raise UserError(f"--part {part}: leaves no labeled image, since no image of train.txt has a mask in masks/")
    unlabeled = sorted({*dataset.train, *dataset.bare} - set(labeled))
    digest = hashlib.sha256("\n".join([*labeled, "--", *unlabeled]).encode()).hexdigest()
    return Partition("1" if k == 1 else part, labeled, unlabeled, digest[:12])


def open_training_data(args: argparse.Namespace, unlabeled: bool):
    """The data set and the partition of a training, with every file's header checked; `unlabeled` says whether unlabeled
    images are needed. Raises UserError."""
    dataset = open_dataset(args.dataset, args.data)
    part = partition(dataset, args.part)
    if unlabeled and not part.unlabeled:
        raise UserError(f"--part {args.part}: leaves no unlabeled image; take a smaller part, add images to "
                        "unlabeled.txt, or train with labels alone (train_teacher.py --method sup)")  # fmt: skip
    dataset.check(part.labeled + dataset.val, masks=True)
    if unlabeled:
        dataset.check(part.unlabeled, masks=False)
    return dataset, part


# ---- augmentation ----


class RandomScale(v2.Transform):
    """Resize by a factor drawn from `scales`: images bilinear, masks nearest."""

    def __init__(self, scales):
        super().__init__()
        self.scales = scales

    def make_params(self, flat_inputs):
        height, width = v2.functional.get_size(flat_inputs[0])
        scale = self.scales[int(torch.randint(len(self.scales), ()))]
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt, params):
        return self._call_kernel(v2.functional.resize, inpt, size=params["size"], antialias=True)


class TrainSet(torch.utils.data.Dataset):
    """Augmented crops. Item (index, seed) -> image (3, h, w) uint8, mask (h, w) int64; padding is 255 in the mask.

    With `labeled=False` no mask is opened: the mask then holds 0 for pixels of the image and 255 for padding.
    """

    def __init__(self, dataset, names, crop, scales, image_scale=1.0, labeled=True):
        self.dataset, self.names, self.labeled = dataset, names, labeled
        fill = {tv_tensors.Image: [round(255 * m) for m in MEAN], tv_tensors.Mask: IGNORE}
        self.transform = v2.Compose([
            RandomScale([image_scale * s for s in scales]),
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(crop, pad_if_needed=True, fill=fill),
        ])  # fmt: skip

    def __getitem__(self, item):
        index, seed = item
        name = self.names[index]
        image = self.dataset.image(name)
        mask = self.dataset.mask(name) if self.labeled else np.zeros(image.shape[:2], np.uint8)
        image = tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(np.array(mask)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image, mask = self.transform(image, mask)
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor).long()


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


class StepSampler(torch.utils.data.Sampler):
    """Batches of (index, augmentation seed) for steps `start` to `steps`, each a pure function of (seed, step).

    The images come in an endless row of permutations of range(n), so each is seen once an epoch.
    """

    def __init__(self, n, batch, seed, start, steps):
        self.n, self.batch, self.seed, self.start, self.steps = n, batch, seed, start, steps

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        for step in range(self.start, self.steps):
            positions = range(step * self.batch, (step + 1) * self.batch)
            indices = [int(permutation(self.n, self.seed, p // self.n)[p % self.n]) for p in positions]
            yield [(i, seed_of(self.seed, p)) for i, p in zip(indices, positions, strict=True)]


def seed_of(*parts: int) -> int:
    """A seed that is different for each tuple of whole numbers, whatever its length."""
    return int(np.random.SeedSequence([len(parts), *parts]).generate_state(1, np.uint64)[0] >> 1)


def train_batches(dataset, names, args, batch: int, start: int, labeled: bool):
    """An iterator over the batches of steps `start` to `args.steps`: images (B, 3, h, w) uint8, masks (B, h, w)."""
    train_set = TrainSet(dataset, names, args.crop, args.scales, args.image_scale, labeled)
    sampler = StepSampler(len(names), batch, seed_of(args.seed, int(labeled)), start, args.steps)
    workers = {"num_workers": args.workers, "persistent_workers": True, "prefetch_factor": 4} if args.workers else {}
    loader = DataLoader(train_set, batch_sampler=sampler, pin_memory=torch.cuda.is_available(), **workers)
    return iter(loader)


def normalize(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 on `device`, channels_last, with ImageNet's mean and deviation taken out."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(STD, device=device).view(3, 1, 1)
    return (images / 255 - mean) / std


def cutmix_mask(batch: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """(B, 1, H, W) bool, True where the second view goes: three boxes an image, as in French et al. 2020.

    Each box covers a third of a share of the area drawn from 0.25 to 0.5, its shape drawn log-uniformly; where boxes
    overlap, they toggle.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    mask = np.zeros((batch, 1, height, width), bool)
    for b in range(batch):
        for area in rng.uniform(0.25, 0.5, 3):
            tall = math.exp(rng.uniform(0, 1) * math.log(area))  # share of the height; the width's share is area / tall
            h, w = round(tall * math.sqrt(1 / 3) * height), round(area / tall * math.sqrt(1 / 3) * width)
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            mask[b, 0, top : top + h, left : left + w] ^= True
    return torch.from_numpy(mask)


def cutmix(views: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """views (2B, C, H, W) or (2B, H, W), box (B, 1, H, W) -> B mixed views: the first B outside the box, the last inside."""
    outside, inside = views.chunk(2)
    return torch.where(box if views.ndim == 4 else box[:, 0], inside, outside)


# ---- command line ----


def add_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="shapes", choices=list(RECIPES), help="shapes is embedded and needs no files")
    group.add_argument("--data", type=pathlib.Path, help="folder of the data set")
    group.add_argument("--part", default="1/8", help="share of the masks that is used: 1/K, or 1 for all")
    group.add_argument("--scales", type=float, nargs="+", help="factors on the image size, one drawn an image")
    group.add_argument("--image-scale", type=float, default=1.0, help="factor on the size of all images, in evaluation too")
    group.add_argument("--window", type=crop_size, help="evaluate in sliding windows, SIDE or HEIGHTxWIDTH, not whole images")


def main():
    parser = ArgumentParser("Show a partition, the classes' shares and a sheet of samples.")
    add_arguments(parser)
    parser.add_argument("--picture", type=pathlib.Path, help="write a PNG of eight images and their masks")
    args = parser.parse_args()
    dataset = open_dataset(args.dataset, args.data)
    part = partition(dataset, args.part)
    dataset.check(part.labeled + dataset.val, masks=True)
    dataset.check(part.unlabeled, masks=False)
    print(f"{len(part.labeled)} labeled, {len(part.unlabeled)} unlabeled, {len(dataset.val)} val; partition {part.hash}")
    counts = np.zeros((2, 256), np.int64)
    for row, names in enumerate((part.labeled, dataset.val)):
        for name in names:
            counts[row] += np.bincount(dataset.mask(name).ravel(), minlength=256)
    shares = 100 * counts / counts.sum(1, keepdims=True)
    for index, label in [*enumerate(dataset.classes), (IGNORE, "(ignored)")]:
        print(f"{index:4d} {label:20} {shares[0, index]:6.2f}% of the labeled pixels, {shares[1, index]:6.2f}% of val")
    if args.picture:
        colours = np.full((256, 3), 255, np.uint8)
        colours[: len(dataset.palette)] = dataset.palette
        columns = [np.vstack([dataset.image(n), colours[dataset.mask(n)]]) for n in part.labeled[:8]]
        height = min(c.shape[0] for c in columns)
        try:
            Image.fromarray(np.hstack([c[:height] for c in columns])).save(args.picture)
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {args.picture}: cannot be written ({error}); give a name such as look.png") from None
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    run(main)
