"""Data sets, and their partitions into labeled and unlabeled images.

`prepare.py` looks at a data set before training, and converts masks into the form that is read here.
"""

import argparse
import collections
import colorsys
import contextlib
import functools
import hashlib
import math
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from checks import refuse_faults, refuse_wrong_pseudo_labels
from common import IGNORE_INDEX, UserError, being_read, print0, rank_and_size
from readers import (
    CITYSCAPES_PALETTE,
    MOST_UNNAMED,
    PALETTE,
    SUFFIXES,
    by_name,
    flags_for,
    flags_for_file,
    masks_command,
    open_image,
    open_mask,
    read_colours,
    read_lines,
    read_names,
    read_palette,
    refuse_special,
    upright_size,
    voc_palette,
)
from run_folder import atomic_write


class Partition(NamedTuple):
    name: str  # such as 1/8
    labeled: list[str]
    unlabeled: list[str]
    hash: str  # of both lists; recorded in checkpoints and results, so that numbers can be compared


class Shapes:
    """The embedded data set: 64x64 scenes of five kinds of shapes, drawn by a generator seeded with the image's name.

    Each kind has its own range of hues, and the background is paler than the shapes. Brightness, stripes, size and angle are
    independent of the kind. Shapes cover one another, and thin lines are drawn over them.
    """

    name = "shapes"
    drawn = named = True  # there is no file
    palette_from, cache = "the embedded data set's palette", None
    size = 64

    def __init__(self, train: int = 512, val: int = 200):
        self.classes = ["background", "disk", "square", "triangle", "star", "cross"]
        self.palette = [(40, 44, 52), (224, 108, 117), (97, 175, 239), (152, 195, 121), (229, 192, 123), (198, 120, 221)]
        self.train = [f"train-{i:04d}" for i in range(train)]
        self.val = [f"val-{i:04d}" for i in range(val)]
        self.unlabeled = []
        self.images, self.masks = {}, {}  # there are no files

    def has_mask(self, name):
        return True

    @functools.lru_cache(maxsize=1024)  # noqa: B019  (one instance per process; drawing costs more than augmenting)
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

    def image_size(self, name) -> tuple[int, int]:
        """(H, W)."""
        return self.size, self.size

    def image(self, name) -> np.ndarray:
        """(H, W, 3) uint8, RGB."""
        return self.draw(name)[0]

    def mask(self, name) -> np.ndarray:
        """(H, W) uint8, class indices."""
        return self.draw(name)[1]

    def missing(self):
        return None


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
    5: np.array(
        [
            (-0.3, -1),
            (0.3, -1),
            (0.3, -0.3),
            (1, -0.3),
            (1, 0.3),
            (0.3, 0.3),
            (0.3, 1),
            (-0.3, 1),
            (-0.3, 0.3),
            (-1, 0.3),
            (-1, -0.3),
            (-0.3, -0.3),
        ]
    ),
}


class Files:
    """A data set of files: images by name, and masks of some of them. `Folder`, `Voc` and `Cityscapes` find them.

    A mask is opened only when `mask` is called with its name.
    """

    drawn = False
    cache: pathlib.Path | None = None  # a folder of decoded images and masks
    expected: tuple[int, int] | None = None  # numbers of training and val images, for `missing`
    palette_from: str | None = None  # the source of `palette`; None: it need not fit the masks
    named = True  # whether the classes have names, or are counted in val's masks

    root: pathlib.Path
    name: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    images: dict[str, pathlib.Path]
    masks: dict[str, pathlib.Path]
    train: list[str]
    val: list[str]
    unlabeled: list[str]  # more images without masks

    def has_mask(self, name: str) -> bool:
        return name in self.masks

    def image_size(self, name: str) -> tuple[int, int]:
        """(H, W) of the upright image, from its header alone. Raises UserError."""
        return upright_size(self.images[name])[::-1]

    def image(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8, RGB, upright."""
        with being_read(self.images[name]):
            return self.decoded(self.images[name], lambda path: np.asarray(open_image(path)))

    def mask(self, name: str) -> np.ndarray:
        """(H, W) uint8, class indices and 255. Raises UserError for any other value."""
        if name not in self.masks:
            raise UserError(f"{self.root}: '{name}' has no mask")
        with being_read(self.masks[name]):
            return self.decoded(self.masks[name], self.read_mask)

    def read_mask(self, path: pathlib.Path) -> np.ndarray:
        mask = self.to_classes(open_mask(path), path)
        n = len(self.classes)
        wrong = mask[(mask >= n) & (mask != IGNORE_INDEX)]
        if wrong.size:
            flags = flags_for(*np.unique(mask, return_counts=True), n, self.named)
            reason, fix = f"the {n} classes are 0 to {n - 1}, and 255 is ignored", "fix the mask, or"
            if not self.named:
                reason, fix = f"val's masks hold none above {n - 1} and there is no classes.txt", "name every class there, or"
            elif self.expected is None and "=CLASS" not in flags:  # classes.txt may lack a class
                fix = f"if it is a class, name it in classes.txt; if {'the first class is 1' if '1=0' in flags else 'not'},"
            raise UserError(f"{path}: holds label {wrong.min()}, but {reason}; {fix} {self.fix(flags, path)}")
        return mask.astype(np.uint8)

    def fix(self, flags: str, path: pathlib.Path | None = None) -> str:
        """How to fix the mask `path`, or all masks, as the end of a message; `flags` are for `prepare.py masks`."""
        return "replace it"

    def colours(self, name: str) -> bytes | None:
        """The palette in a mask's file, three bytes per class, or None."""
        return read_colours(self.masks[name])

    def to_classes(self, mask: np.ndarray, path: pathlib.Path) -> np.ndarray:
        """Convert the values of a mask file to class indices."""
        return mask

    def decoded(self, path: pathlib.Path, decode) -> np.ndarray:
        """decode(path), or the array that an earlier call left in the cache, memory-mapped.

        The name of the cache entry depends on the file's path, size and time, so a changed file is decoded again.
        """
        if self.cache is None or not os.path.exists(path):  # decode raises the error
            return decode(path)
        stat = path.stat()
        key = digest(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {','.join(self.classes)}")
        entry = self.cache / f"{key}.npy"
        if entry.exists():
            with contextlib.suppress(OSError, ValueError, EOFError):  # an incomplete entry is written again
                return np.load(entry, mmap_mode="r")
        array = decode(path)
        try:
            with atomic_write(entry) as temporary, open(temporary, "wb") as file:
                np.save(file, array)
        except UserError as error:
            raise UserError(f"--cache {self.cache}: cannot be written ({error}); give another folder, or none") from None
        return array

    def missing(self) -> str | None:
        """One line about missing images of a data set whose size is known, or None."""
        if self.expected and (len(self.train), len(self.val)) != self.expected:
            return (
                f"{self.root}: {self.name} has {len(self.train)} training and {len(self.val)} val images here, not "
                f"{self.expected[0]:,} and {self.expected[1]:,}; {self.what_is_missing()}"
            )
        return None


class Folder(Files):
    """Own data: images/NAME.(jpg|png), masks/NAME.png (class index, 255 = ignore), train.txt, val.txt, and optionally
    classes.txt (one name per line), palette.txt (`R G B` per line) and unlabeled.txt. Images without a mask are unlabeled."""

    def __init__(self, root: pathlib.Path | str):
        self.root = root = pathlib.Path(root)
        self.name = root.resolve().name
        for folder in (root, root / "images", root / "masks"):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; --data must hold images/, masks/, train.txt and val.txt")
        self.images = by_name(p for p in (root / "images").iterdir() if p.suffix.lower() in SUFFIXES)
        self.masks = by_name(p for p in (root / "masks").iterdir() if p.suffix.lower() == ".png")
        lossy = by_name(p for p in (root / "masks").iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
        if lossy:
            path = min(lossy.values())
            raise UserError(
                f"{path}: is a JPEG, whose compression corrupts labels; masks must be PNG; {self.fix(flags_for_file(path))}"
            )
        self.train, self.val = (read_names(root / f, self.images) for f in ("train.txt", "val.txt"))
        extra = read_names(root / "unlabeled.txt", self.images) if (root / "unlabeled.txt").exists() else []
        self.unlabeled = [name for name in extra if name not in set(self.train)]
        overlap = set(self.val) & {*self.train, *self.unlabeled}
        if overlap:
            other = "train.txt" if min(overlap) in set(self.train) else "unlabeled.txt"
            raise UserError(f"{root / 'val.txt'}: '{min(overlap)}' is also in {other}; remove it from one list")
        unmasked = [name for name in self.val if name not in self.masks]
        if unmasked:
            longer = [name for name in self.masks.keys() - self.images.keys() if name.startswith(unmasked[0])]
            help = f", or, as there is {min(longer)}.png, {self.fix('')}" if longer else ""
            raise UserError(
                f"{root / 'masks' / (unmasked[0] + '.png')}: no such mask, but val.txt lists its image; "
                f"add the mask or remove the name{help}"
            )
        self.named = (root / "classes.txt").exists()
        self.classes = read_lines(root / "classes.txt") if self.named else self.count_classes()
        twice = [name for name, count in collections.Counter(self.classes).items() if count > 1]
        if twice:
            raise UserError(f"{root / 'classes.txt'}: names '{twice[0]}' twice; give every class its own name")
        if not 2 <= len(self.classes) <= IGNORE_INDEX:
            raise UserError(f"{root / 'classes.txt'}: names {len(self.classes)} class(es); 2 to 255 are needed, one per line")
        self.palette = voc_palette(len(self.classes))
        if (root / "palette.txt").exists():
            self.palette = read_palette(root / "palette.txt", len(self.classes))
            self.palette_from = str(root / "palette.txt")

    def count_classes(self) -> list[str]:
        """Names for the labels in val's masks, so that the number of classes does not depend on the partition."""
        labels = set().union(*(np.unique(open_mask(self.masks[name])).tolist() for name in self.val)) - {IGNORE_INDEX}
        many = len(labels) > MOST_UNNAMED  # `checks.faults` refuses that, with a better message
        return [f"class {i}" for i in range(IGNORE_INDEX if many else 1 + min(max(labels | {1}), IGNORE_INDEX - 1))]

    def fix(self, flags, path=None):
        return masks_command(self.root / "masks", flags)


VOC_CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


class Voc(Files):
    """PASCAL VOC 2012 in the VOCdevkit layout; `data` is VOCdevkit, its VOC2012, or the folder that holds VOCdevkit.

    The training images are VOC's train and SBD, without VOC's val: those that ImageSets/Segmentation/train_aug.txt lists, or,
    without that file, those with a mask in SegmentationClassAug (see `prepare.py`). With `few` (voc-few) only VOC's train is
    used.
    """

    def __init__(self, data: pathlib.Path | str, few: bool = False):
        self.root = root = voc_root(pathlib.Path(data))
        self.name, self.expected = ("voc-few", (1464, 1449)) if few else ("voc", (10582, 1449))
        self.classes, self.palette, self.unlabeled, self.palette_from = VOC_CLASSES, voc_palette(21), [], "VOC's palette"
        self.images = by_name((root / "JPEGImages").glob("*.jpg"))
        own, augmented = root / "SegmentationClass", root / "SegmentationClassAug"
        lists = root / "ImageSets" / "Segmentation"
        self.listed = read_names(lists / "train.txt", self.images)
        self.val = read_names(lists / "val.txt", self.images)
        self.masks = by_name(augmented.glob("*.png")) | by_name(own.glob("*.png"))
        if few:
            self.train = self.listed
            return
        if not augmented.is_dir():
            raise UserError(
                f"{augmented}: no such folder; build it with python prepare.py voc --data {shlex.quote(str(data))}, or use "
                "--dataset voc-few"
            )
        self.listed = [*self.listed, *by_name(augmented.glob("*.png"))]
        for file in ("train_aug.txt", "trainaug.txt"):
            if (lists / file).exists():
                self.listed = read_names(lists / file, self.images)
        self.train = sorted({name for name in self.listed if name in self.images} - set(self.val))

    def fix(self, flags, path=None):
        flags = flags.replace(PALETTE, "--palette voc")
        return masks_command(path.parent if path else self.root / "SegmentationClassAug", flags)

    def what_is_missing(self):
        without = [name for name in self.listed if name not in self.images]
        if without:
            return f"JPEGImages lacks {len(without)} of them, first {without[0]}.jpg"
        return "ImageSets/Segmentation or SegmentationClassAug is incomplete (python prepare.py voc builds the latter)"


VOC_FOLDERS = ("", "VOC2012", "VOCdevkit/VOC2012")


def voc_root(data: pathlib.Path) -> pathlib.Path:
    """The folder VOC2012 itself. Raises UserError."""
    for root in (data / folder for folder in VOC_FOLDERS):
        if (root / "JPEGImages").is_dir():
            return root
    raise UserError(
        f"{data}: holds no VOC2012/JPEGImages; give VOCdevkit with --data, or download it with "
        f"python prepare.py voc --data {shlex.quote(str(data))} --download"
    )


CITYSCAPES_CLASSES = [
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
]
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # the classes' labelIds


class Cityscapes(Files):
    """Cityscapes as downloaded: leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png,
    or _labelTrainIds.png, which is used where both exist."""

    name, expected = "cityscapes", (2975, 500)

    def __init__(self, root: pathlib.Path | str):
        self.root = root = pathlib.Path(root)
        self.classes, self.palette, self.unlabeled = CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, []
        self.palette_from = "Cityscapes' palette"
        self.images, self.masks, names = {}, {}, {}
        for split in ("train", "val"):
            images = by_name((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
            if not images:
                raise UserError(
                    f"{root / 'leftImg8bit' / split}: holds no CITY/NAME_leftImg8bit.png; --data names the "
                    "folder of leftImg8bit and gtFine"
                )
            names[split] = list(images)
            self.images |= images
            for kind in ("labelIds", "labelTrainIds"):
                self.masks |= by_name((root / "gtFine" / split).glob(f"*/*_gtFine_{kind}.png"))
        self.train, self.val = names["train"], names["val"]
        unmasked = [name for name in self.val if name not in self.masks]
        if unmasked:
            raise UserError(
                f"{root / 'gtFine' / 'val'}: holds no {unmasked[0]}_gtFine_labelIds.png (or labelTrainIds); "
                "unpack gtFine_trainvaltest.zip there"
            )

    def to_classes(self, mask, path):
        if path.stem.endswith("labelTrainIds"):
            return mask
        table = np.full(256, IGNORE_INDEX, np.uint8)
        table[CITYSCAPES_IDS] = range(19)
        if mask.max(initial=0) > 33 and set(np.unique(mask[mask > 33])) != {IGNORE_INDEX}:  # 255 is -1, the ego licence plate
            raise UserError(f"{path}: holds label {mask[mask != IGNORE_INDEX].max()}, but labelIds end at 33; replace it")
        return table[mask]

    def colours(self, name):
        colours = super().colours(name)
        if colours is None or self.masks[name].stem.endswith("labelTrainIds"):
            return colours
        return b"".join(colours[3 * i : 3 * i + 3] for i in CITYSCAPES_IDS) if len(colours) >= 3 * 34 else None

    def what_is_missing(self):
        return "leftImg8bit_trainvaltest.zip holds 18 cities for training and 3 for val"


class PseudoLabels(Files):
    """The maps of `distill.py --pseudo-labels`: FOLDER/NAME.png holds class indices, from any model, for the image NAME of a
    data set, and 255 where there is none. Images need no map. Raises UserError where no image of `names` has one.

    They are read and checked as masks are, but are class indices for every data set.
    """

    def __init__(self, folder: pathlib.Path, dataset, names: Iterable[str]):
        if not folder.is_dir():
            raise UserError(f"--pseudo-labels {folder}: no such folder; give one that holds NAME.png for each image")
        self.root, self.dataset, self.cache = folder, dataset, dataset.cache
        self.classes, self.named = dataset.classes, dataset.named
        self.palette, self.palette_from = dataset.palette, dataset.palette_from
        names, found = [*names], by_name(path for path in folder.iterdir() if path.suffix.lower() == ".png")
        self.masks = {name: found[name] for name in sorted(names) if name in found}
        if not self.masks:
            raise UserError(
                f"--pseudo-labels {folder}: holds a PNG for no training image that is used; name them as the images, such as "
                f"{names[0]}.png"
            )
        read = (f"{name} {hashlib.sha256(self.bytes_of(path)).hexdigest()}" for name, path in self.masks.items())
        self.hash = digest("\n".join(read))  # of names and files, so that a resumed run and a result can tell them apart

    @staticmethod
    def bytes_of(path: pathlib.Path) -> bytes:
        refuse_special(path)
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); replace it, or remove it") from None

    def image_size(self, name):
        return self.dataset.image_size(name)

    def read_mask(self, path):
        mask, n = open_mask(path), len(self.classes)
        wrong = mask[(mask >= n) & (mask != IGNORE_INDEX)]
        if wrong.size:
            raise UserError(
                f"{path}: holds label {wrong.min()}, but the {n} classes of the data set are 0 to {n - 1}, and 255 is ignored; "
                "write the indices of these classes, and 255 for all else"
            )
        return mask.astype(np.uint8)

    def fix(self, flags, path=None):
        return masks_command(self.root, flags)


def open_dataset(name: str, data: pathlib.Path | str | None, cache: pathlib.Path | None = None):
    """The data set that `--dataset` and `--data` name. Raises UserError."""
    if name == "shapes":
        if data is not None:
            raise UserError(f"--data {data}: the embedded data set has no folder; add --dataset folder (make: DATASET=folder)")
        return Shapes()
    if data is None:
        raise UserError(f"--dataset {name}: needs its folder; give --data DIR (make: DATA=DIR)")
    dataset = {"folder": Folder, "voc": Voc, "voc-few": lambda data: Voc(data, few=True), "cityscapes": Cityscapes}[name](data)
    dataset.cache = cache
    return dataset


# ---- partitions ----


def digest(text: str) -> str:
    """A short hash; file names need not be UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def partition(dataset, part: str) -> Partition:
    """Split the training images: for `part` 1/k, ceil(n / k) of n images stay labeled, or fewer if fewer have a mask.

    Images come in a random order that depends on their names only, but images that show a class for the first time come first,
    so every class is labeled if that many images can contain it. To find them, masks are opened in that order until each class
    was seen; training itself opens only the labeled masks. Partitions are nested, 1/16 in 1/8 in 1/4, and do not change when
    the masks of unlabeled images are removed. `1` keeps every mask.
    """
    match = re.fullmatch(r"1(?:/([1-9][0-9]*))?", part)
    if not match:
        raise UserError(
            f"--part {part}: expected 1/K with a whole number K, such as 1/8, or 1 for all masks; for your "
            "own lists use --labeled-list and --unlabeled-list"
        )
    k = int(match[1] or 1)
    masked = filter(dataset.has_mask, dataset.train)
    ranked = sorted(masked, key=lambda name: hashlib.sha256(f"0:{name}".encode(errors="surrogateescape")).digest())
    count = math.ceil(len(dataset.train) / k)
    if count < len(ranked):
        carriers = first_carriers(dataset, ranked)
        ranked.sort(key=lambda name: name not in carriers)  # stable
    labeled = sorted(ranked[:count])
    if not labeled:
        raise UserError(f"--part {part}: leaves no labeled image, since no training image of {dataset.name} has a mask")
    return make_partition("1" if k == 1 else part, labeled, sorted({*dataset.train, *dataset.unlabeled} - set(labeled)))


def make_partition(name: str, labeled: list[str], unlabeled: list[str]) -> Partition:
    return Partition(name, labeled, unlabeled, digest("\n".join([*labeled, "--", *unlabeled])))


def first_carriers(dataset, names: list[str]) -> set[str]:
    """The images that show a class that no image before them shows."""
    carriers, missing = set(), set(range(len(dataset.classes)))
    for name in names:
        if not missing:
            break
        with contextlib.suppress(UserError):  # a broken mask shows nothing; if it is labeled, the check will name it
            new = missing.intersection(np.unique(dataset.mask(name)).tolist())
            if new:
                carriers.add(name)
                missing -= new
    return carriers


def read_masked_names(path: pathlib.Path, dataset, known: Iterable[str]) -> list[str]:
    """The images that a list names, as from `read_names`. Raises UserError for one without a mask too."""
    names = read_names(path, known)
    unmasked = [name for name in names if not dataset.has_mask(name)]
    if unmasked:
        raise UserError(f"{path}: '{unmasked[0]}' has no mask; add it or remove the name")
    return names


def listed_partition(dataset, labeled_list: pathlib.Path, unlabeled_list: pathlib.Path | None) -> Partition:
    """The partition of --labeled-list and --unlabeled-list; without the latter, all other training images are unlabeled.

    An image in both lists stays labeled, with a warning. Raises UserError for a val image, and for one without a mask.
    """
    known = {*dataset.train, *dataset.unlabeled, *dataset.val}
    labeled = read_masked_names(labeled_list, dataset, known)
    unlabeled = read_names(unlabeled_list, known) if unlabeled_list else [*dataset.train, *dataset.unlabeled]
    for path, names in ((labeled_list, labeled), (unlabeled_list, unlabeled)):
        held_out = sorted(set(names) & set(dataset.val))
        if held_out:
            raise UserError(f"{path}: names {len(held_out)} val image(s), first '{held_out[0]}'; remove them")
    both = sorted(set(labeled) & set(unlabeled)) if unlabeled_list else []
    if both:
        print(
            f"warning: {unlabeled_list} also names {len(both)} labeled image(s), first '{both[0]}'; they stay labeled",
            file=sys.stderr,
        )
    return make_partition(labeled_list.stem, sorted(labeled), sorted(set(unlabeled) - set(labeled)))


def partition_of(dataset, args: argparse.Namespace) -> Partition:
    """The partition that the arguments choose. Raises UserError."""
    if args.labeled_list:
        return listed_partition(dataset, args.labeled_list, args.unlabeled_list)
    if args.unlabeled_list:
        raise UserError(f"--unlabeled-list {args.unlabeled_list}: give --labeled-list with it")
    return partition(dataset, args.part)


def open_pseudo_labels(folder: pathlib.Path, dataset, part: Partition, labeled: bool, unlabeled: bool) -> PseudoLabels:
    """The maps of `distill.py --pseudo-labels` for the labeled images of the partition, the unlabeled ones, or both, all of
    them checked. Raises UserError."""
    groups = {"labeled": part.labeled} if labeled else {}
    groups |= {"unlabeled": part.unlabeled} if unlabeled else {}
    maps = PseudoLabels(folder, dataset, [name for names in groups.values() for name in names])
    if rank_and_size()[0] == 0:  # an error here ends all ranks
        refuse_wrong_pseudo_labels(maps, part.labeled)
    counts = [f"{sum(map(maps.has_mask, names))} of {len(names)} {group}" for group, names in groups.items()]
    print0(f"{folder}: pseudo labels of {' and '.join(counts)} images")
    return maps


def open_training_data(args: argparse.Namespace, unlabeled: bool):
    """The data set and the partition of a training, with the header of every file checked. `unlabeled`: unlabeled images are
    needed. Raises UserError."""
    dataset = open_dataset(args.dataset, args.data, args.cache)
    part = partition_of(dataset, args)
    if unlabeled and not part.unlabeled:
        flag = f"--labeled-list {args.labeled_list}" if args.labeled_list else f"--part {args.part}"
        raise UserError(
            f"{flag}: leaves no unlabeled image; use a smaller part, add images to unlabeled.txt, or train "
            "with labels only (train_teacher.py --method sup)"
        )
    if rank_and_size()[0] == 0:  # an error here ends all ranks
        if dataset.missing():
            print(f"note: {dataset.missing()}", file=sys.stderr)
        groups = {"labeled": part.labeled, "val": dataset.val}
        refuse_faults(dataset, groups | ({"unlabeled": part.unlabeled} if unlabeled else {}))
    return dataset, part
