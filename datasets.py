"""Images and masks, partitions into labeled and unlabeled images, augmentation, CutMix.

`prepare.py` looks at a data set before training, and converts masks into the form that is read here.

Everything random is a pure function of the seed and the step, so that a resumed run sees what an uninterrupted one sees.
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
import struct
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, UnidentifiedImageError
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from common import IGNORE_INDEX, UserError, crop_size, rank_and_size, shares_of, start_workers

FILL = [124, 116, 104]  # the mean below as a colour, for pixels outside the image
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
SUFFIXES = (".jpg", ".jpeg", ".png")
MOST_UNNAMED = 32  # labels without classes.txt; more are rather levels of grey
VOC_BORDER = (224, 224, 192)  # VOC's colour of 255
MAX_PIXELS = 2**28  # of one image, 16384x16384; a small file can claim to be much larger and fill the memory
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which warns from 89 million pixels on

# What the arguments left at their defaults become, by data set; `teacher`, `student`, a backbone of `of`, and `no_cutmix`
# override. `shapes` has small stand-ins for the teachers, so that the whole pipeline runs in minutes without a GPU. The
# others are the recipes of the paper and its released code, in one process; `folder` follows that of VOC. A window of "crop"
# is as large as the crop: a head that saw nothing but crops is off on larger images, where its dilated convolutions reach
# what was padding before (33.0 mIoU instead of 37.8 on CamVid at half size with crops of 96x128).
SHAPES_RECIPE = {
    "teacher_deep": "resnet34", "teacher_wide": "resnet18", "weights": "none", "head_width": 64, "crop": (64, 64),
    "scales": [0.75, 1.0, 1.25], "batch": 8, "lr": 0.05, "sup_only": 0.4, "ramp_up": 0.6, "cps_weight": 1.0,
    "threshold": 0.0, "lambda_image": 0.002, "lambda_region": 10.0, "window": False, "ohem": False,
    "teacher": {"steps": 350}, "student": {"steps": 250},
}  # fmt: skip
FOLDER_RECIPE = {
    "teacher_deep": "resnet101", "teacher_wide": "wide_resnet34", "weights": "imagenet", "head_width": 256, "crop": (512, 512),
    "scales": [0.5, 0.75, 1.0, 1.5, 1.75, 2.0], "batch": 8, "lr": 0.0025, "steps": 40_000, "sup_only": 0.0, "ramp_up": 0.0,
    "cps_weight": 1.0, "threshold": 0.0, "lambda_image": 0.002, "lambda_region": 100.0, "window": "crop", "ohem": False,
    "of": {"wide_resnet34": {"lr": 0.001}, "mobilenetv2": {"lr": 0.0035}},
}  # fmt: skip
VOC_RECIPE = {
    **FOLDER_RECIPE, "steps": 39_700, "no_cutmix": {"cps_weight": 1.5},
    "of": {"wide_resnet34": {"lr": 0.001}, "mobilenetv2": {"lr": 0.0035, "lambda_image": 0.001, "lambda_region": 50.0}},
}  # fmt: skip
RECIPES = {
    "shapes": SHAPES_RECIPE,
    "folder": FOLDER_RECIPE,
    "voc": VOC_RECIPE,
    "voc-few": VOC_RECIPE,
    "cityscapes": {
        **FOLDER_RECIPE, "crop": (800, 800), "ohem": True, "cps_weight": 5.0,
        "no_cutmix": {"cps_weight": 6.0}, "of": {}, "teacher": {"steps": 44_600}, "student": {"steps": 22_300, "batch": 16},
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
        self.masks = {}  # there are no files

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
    5: np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3),
                 (-1, -.3), (-.3, -.3)]),
}  # fmt: skip


class Files:
    """A data set of files: images by name, and masks of some of them. `Folder`, `Voc` and `Cityscapes` say where they lie.

    A mask is opened only where `mask` is called for its name.
    """

    cache: pathlib.Path | None = None  # a folder of decoded images and masks
    expected: tuple[int, int] | None = None  # training and val images of a data set that everybody has alike: `missing`
    palette_from: str | None = None  # who says that `palette` holds the colours of the masks; None: nobody
    named = True  # whether the classes have names, or are counted in val's masks

    root: pathlib.Path
    name: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    images: dict[str, pathlib.Path]
    masks: dict[str, pathlib.Path]
    train: list[str]
    val: list[str]
    bare: list[str]  # more images without masks

    def has_mask(self, name: str) -> bool:
        return name in self.masks

    def image(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8, RGB, upright."""
        return self.decoded(self.images[name], lambda path: np.asarray(open_image(path)))

    def mask(self, name: str) -> np.ndarray:
        """(H, W) uint8, class indices and 255. Raises UserError for any other value."""
        if name not in self.masks:
            raise UserError(f"{self.root}: '{name}' has no mask")
        return self.decoded(self.masks[name], self.read_mask)

    def read_mask(self, path: pathlib.Path) -> np.ndarray:
        mask = self.to_classes(open_mask(path), path)
        n = len(self.classes)
        wrong = mask[(mask >= n) & (mask != IGNORE_INDEX)]
        if wrong.size:
            classes = f"the {n} classes are 0 to {n - 1}, and 255 is ignored; fix the mask or classes.txt"
            if not self.named:
                classes = f"val's masks hold none above {n - 1} and there is no classes.txt; name every class there"
            flags = flags_for(*np.unique(mask, return_counts=True), n, self.named)
            raise UserError(f"{path}: holds label {wrong.min()}, but {classes}, or {self.fix(flags, path)}")
        return mask.astype(np.uint8)

    def fix(self, flags: str, path: pathlib.Path | None = None) -> str:
        """How to get right masks, `path` or all, as the end of a message; `flags` are those of `prepare.py masks`."""
        return "replace it"

    def colours(self, name: str) -> bytes | None:
        """The palette in the file of a mask, three bytes for each class; None where it has none."""
        return read_colours(self.masks[name])

    def to_classes(self, mask: np.ndarray, path: pathlib.Path) -> np.ndarray:
        """From the values in a mask file to class indices."""
        return mask

    def decoded(self, path: pathlib.Path, decode) -> np.ndarray:
        """decode(path), or the array that an earlier call left in the cache, memory-mapped.

        The entry's name is made of the file's path, size and time, so that a changed file is decoded anew.
        """
        if self.cache is None:
            return decode(path)
        try:
            stat = path.stat()
        except OSError:
            return decode(path)  # which says what is wrong
        key = digest(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {','.join(self.classes)}")
        entry = self.cache / f"{key}.npy"
        if entry.exists():
            with contextlib.suppress(OSError, ValueError, EOFError):  # cut short: made again
                return np.load(entry, mmap_mode="r")
        array = decode(path)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.cache, suffix=".tmp", delete=False) as file:
                np.save(file, array)
            os.replace(file.name, entry)
        except OSError as error:
            raise UserError(f"--cache {self.cache}: cannot be written ({error}); give another folder, or none") from None
        return array

    def missing(self) -> str | None:
        """What lacks to the counts that everybody has, in one line."""
        if self.expected and (len(self.train), len(self.val)) != self.expected:
            return (f"{self.root}: {self.name} has {len(self.train)} training and {len(self.val)} val images here, not "
                    f"{self.expected[0]:,} and {self.expected[1]:,}; {self.what_is_missing()}")  # fmt: skip
        return None


def check_size(path: pathlib.Path, mask: np.ndarray, size: tuple[int, int]):
    height, width = mask.shape
    if (width, height) != size:
        raise UserError(f"{path}: is {width}x{height}, its image {size[0]}x{size[1]}; image and mask must be of one size")


class Folder(Files):
    """Own data: images/NAME.(jpg|png), masks/NAME.png (class index, 255 = ignore), train.txt, val.txt, and optionally
    classes.txt (one name a line), palette.txt (one `R G B` a line) and unlabeled.txt. An image without a mask is unlabeled."""

    def __init__(self, root: pathlib.Path | str):
        self.root = root = pathlib.Path(root)
        self.name = root.resolve().name
        for folder in (root, root / "images", root / "masks"):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; --data names one that holds images/, masks/, train.txt and val.txt")
        self.images = by_name(p for p in (root / "images").iterdir() if p.suffix.lower() in SUFFIXES)
        self.masks = by_name(p for p in (root / "masks").iterdir() if p.suffix.lower() == ".png")
        lossy = by_name(p for p in (root / "masks").iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
        if lossy:
            path = min(lossy.values())
            raise UserError(f"{path}: is a JPEG, whose compression changes labels; masks must be PNG files; "
                            f"{self.fix(flags_for_file(path))}")  # fmt: skip
        self.train, self.val = (read_names(root / f, self.images) for f in ("train.txt", "val.txt"))
        extra = read_names(root / "unlabeled.txt", self.images) if (root / "unlabeled.txt").exists() else []
        self.bare = [name for name in extra if name not in set(self.train)]
        overlap = set(self.val) & {*self.train, *self.bare}
        if overlap:
            other = "train.txt" if min(overlap) in set(self.train) else "unlabeled.txt"
            raise UserError(
                f"{root / 'val.txt'}: '{min(overlap)}' is also a training image, of {other}; take it out of one list"
            )
        unmasked = [name for name in self.val if name not in self.masks]
        if unmasked:
            longer = [name for name in self.masks.keys() - self.images.keys() if name.startswith(unmasked[0])]
            help = f", or, as there is {min(longer)}.png, {self.fix('')}" if longer else ""
            raise UserError(f"{root / 'masks' / (unmasked[0] + '.png')}: no such mask, but val.txt lists its image; "
                            f"add the mask or take the name out{help}")  # fmt: skip
        self.named = (root / "classes.txt").exists()
        self.classes = read_lines(root / "classes.txt") if self.named else self.count_classes()
        twice = [name for name, count in collections.Counter(self.classes).items() if count > 1]
        if twice:
            raise UserError(f"{root / 'classes.txt'}: names '{twice[0]}' twice; give every class a name of its own")
        if not 2 <= len(self.classes) <= IGNORE_INDEX:
            raise UserError(f"{root / 'classes.txt'}: names {len(self.classes)} class(es); 2 to 255 are needed, one per line")
        self.palette = voc_palette(len(self.classes))
        if (root / "palette.txt").exists():
            self.palette = read_palette(root / "palette.txt", len(self.classes))
            self.palette_from = str(root / "palette.txt")

    def count_classes(self) -> list[str]:
        """Names for the labels of val's masks, so that there are as many classes whatever the partition."""
        labels = set().union(*(np.unique(open_mask(self.masks[name])).tolist() for name in self.val)) - {IGNORE_INDEX}
        many = len(labels) > MOST_UNNAMED  # `faults` refuses that, in words that fit, where no mask is refused before
        return [f"class {i}" for i in range(IGNORE_INDEX if many else 1 + min(max(labels | {1}), IGNORE_INDEX - 1))]

    def fix(self, flags, path=None):
        return masks_command(self.root / "masks", flags)


VOC_CLASSES = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
               "tvmonitor"]  # fmt: skip


class Voc(Files):
    """PASCAL VOC 2012 in the VOCdevkit layout; `data` is VOCdevkit, its VOC2012, or the folder that holds VOCdevkit.

    Training images are VOC's train and SBD's, without VOC's val: those that ImageSets/Segmentation/train_aug.txt lists, or,
    without that file, those with a mask in SegmentationClassAug (see `prepare.py`). With `few` (voc-few) they are VOC's
    train alone.
    """

    def __init__(self, data: pathlib.Path | str, few: bool = False):
        self.root = root = voc_root(pathlib.Path(data))
        self.name, self.expected = ("voc-few", (1464, 1449)) if few else ("voc", (10582, 1449))
        self.classes, self.palette, self.bare, self.palette_from = VOC_CLASSES, voc_palette(21), [], "VOC's palette"
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
            raise UserError(f"{augmented}: no such folder; build it with python prepare.py voc --data {data}, or "
                            "take --dataset voc-few")  # fmt: skip
        self.listed = [*self.listed, *by_name(augmented.glob("*.png"))]
        for file in ("train_aug.txt", "trainaug.txt"):
            if (lists / file).exists():
                self.listed = read_names(lists / file, self.images)
        held_out = set(self.val)
        self.train = sorted({name for name in self.listed if name in self.images} - held_out)

    def fix(self, flags, path=None):
        return masks_command(path.parent if path else self.root / "SegmentationClassAug", flags or "--palette voc")

    def what_is_missing(self):
        without = [name for name in self.listed if name not in self.images]
        if without:
            return f"JPEGImages lacks {len(without)} of them, first {without[0]}.jpg"
        return "ImageSets/Segmentation or SegmentationClassAug is not whole (python prepare.py voc builds the latter)"


VOC_FOLDERS = ("", "VOC2012", "VOCdevkit/VOC2012")


def voc_root(data: pathlib.Path) -> pathlib.Path:
    """The folder VOC2012 itself. Raises UserError."""
    for root in (data / folder for folder in VOC_FOLDERS):
        if (root / "JPEGImages").is_dir():
            return root
    raise UserError(f"{data}: holds no VOC2012/JPEGImages; give VOCdevkit with --data, or download it with "
                    f"python prepare.py voc --data {data} --download")  # fmt: skip


CITYSCAPES_CLASSES = ["road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
                      "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]  # fmt: skip
CITYSCAPES_PALETTE = [(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
                      (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
                      (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)]  # fmt: skip
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # the classes' labelIds


class Cityscapes(Files):
    """Cityscapes as downloaded: leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png and gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png,
    or _labelTrainIds.png, which goes first where both are there."""

    name, expected = "cityscapes", (2975, 500)

    def __init__(self, root: pathlib.Path | str):
        self.root = root = pathlib.Path(root)
        self.classes, self.palette, self.bare = CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, []
        self.palette_from = "Cityscapes' palette"
        self.images, self.masks, names = {}, {}, {}
        for split in ("train", "val"):
            images = by_name((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
            if not images:
                raise UserError(f"{root / 'leftImg8bit' / split}: holds no CITY/NAME_leftImg8bit.png; --data names the "
                                "folder of leftImg8bit and gtFine")  # fmt: skip
            names[split] = list(images)
            self.images |= images
            for kind in ("labelIds", "labelTrainIds"):
                self.masks |= by_name((root / "gtFine" / split).glob(f"*/*_gtFine_{kind}.png"))
        self.train, self.val = names["train"], names["val"]
        unmasked = [name for name in self.val if name not in self.masks]
        if unmasked:
            raise UserError(f"{root / 'gtFine' / 'val'}: holds no {unmasked[0]}_gtFine_labelIds.png (or labelTrainIds); "
                            "unpack gtFine_trainvaltest.zip there")  # fmt: skip

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


# ---- names, lists, images and masks ----


def name_of(text: str) -> str:
    """The image's name in a file name or path: without folders, suffix, and what Cityscapes appends; in Unicode's NFC, since
    zip files from macOS spell accents as characters of their own (NFD)."""
    text = unicodedata.normalize("NFC", text).replace("\\", "/").rsplit("/", 1)[-1]
    text = re.sub(r"\.(jpe?g|png)$", "", text, flags=re.IGNORECASE)
    return re.sub(r"_leftImg8bit$|_gtFine(_label(Train)?Ids)?$", "", text)


def by_name(paths: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
    """{name: path}, sorted; hidden files, such as the ._NAME.png of macOS, are left out. Raises UserError where two files have
    one name."""
    files = {}
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        other = files.setdefault(name_of(path.name), path)
        if other is not path:
            alike = unicodedata.normalize("NFC", path.name) == unicodedata.normalize("NFC", other.name)
            forms = ", with accents in another Unicode form" if alike else ""
            raise UserError(f"{path}: has the name of {other.name}, beside it{forms}; rename or remove one of them")
    return files


def read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a text file that are not empty, stripped, in Unicode's NFC. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one name a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as such") from None
    return [line.strip() for line in unicodedata.normalize("NFC", text).splitlines() if line.strip()]


def read_names(path: pathlib.Path, known: Iterable[str]) -> list[str]:
    """The images that a list names, each once, in its order.

    A line is a name, or a path of the image (folders and suffix do not count), or such a path and that of the mask, with a
    space or tab between. Raises UserError where the list is empty or names what is not among `known`.
    """
    names, known = {}, set(known)
    for number, line in enumerate(read_lines(path), 1):
        pair = re.match(r"(.+?\.(?:jpe?g|png))\s+\S", line, re.IGNORECASE)
        candidates = [line, line.split("\t")[0], pair[1] if pair else line, line.split()[0]]
        name = next((n for n in [line, *map(name_of, candidates)] if n in known), None)
        if name is None:
            raise UserError(f"{path}, entry {number}: '{line}' is no image of this data set (no file "
                            f"'{name_of(line)}.jpg' or .png); add the image or take the line out")  # fmt: skip
        names[name] = None
    if not names:
        raise UserError(f"{path}: names no image; write one image name a line")
    return list(names)


def read_palette(path: pathlib.Path, classes: int) -> list[tuple[int, int, int]]:
    palette = []
    for line in read_lines(path):
        colour = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)", line)
        if not colour or max(map(int, colour.groups())) > 255:
            raise UserError(f"{path}: '{line}' is no colour; write one 'R G B' a line, each from 0 to 255")
        palette.append(tuple(map(int, colour.groups())))
    if len(palette) != classes:
        raise UserError(f"{path}: holds {len(palette)} colours for {classes} classes; write one line a class")
    return palette


@contextlib.contextmanager
def reading(path, problem: str, fix: str):
    """One file is read: any exception, out of memory included, becomes a UserError of one line with the file's name and the
    exception's type. Pillow and its plugins raise almost anything on damaged files, so this catches all."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such {problem.split()[-1]}") from None
    except Exception as error:
        kind, text = type(error).__name__, " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            text = "of no format that Pillow opens"
        reason = f"{kind}: {text}" if text else kind
        raise UserError(f"{path}: {problem} ({reason}); {fix}") from error


@contextlib.contextmanager
def opened(path, problem: str, fix: str = "replace it or take it out of the lists"):
    """`Image.open`, whose errors are UserErrors: see `reading`. An image of more than MAX_PIXELS is refused by its header."""
    with reading(path, problem, fix), Image.open(path) as file:
        width, height = file.size
        if width * height > MAX_PIXELS:
            raise UserError(f"{path}: has {width}x{height} pixels, more than the {MAX_PIXELS:,} that are read at once; cut it "
                            "into pieces or make it smaller")  # fmt: skip
        yield file


# EXIF's orientation -> how the image is turned upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = [TURNS[orientation] for orientation in (5, 6, 7, 8)]
# What Pillow raises on an EXIF entry that it cannot parse.
BROKEN_EXIF = (ArithmeticError, AssertionError, LookupError, OSError, struct.error, SyntaxError, TypeError, ValueError)


def turn_of(file: Image.Image) -> Image.Transpose | None:
    """How an image is turned upright, by its orientation alone (tag 0x0112 of its EXIF or XMP entry); None where it is upright,
    has no such entry, or a broken one. `ImageOps.exif_transpose` also writes the entry back, which not every entry survives."""
    try:
        return TURNS.get(file.getexif().get(0x0112))
    except BROKEN_EXIF:
        return None


def upright(file: Image.Image) -> Image.Image:
    """The decoded image, turned upright."""
    file.load()  # first, since a PNG may have its EXIF entry after the pixels, and a TIFF turns itself
    turn = turn_of(file)
    return file if turn is None else file.transpose(turn)


def upright_size(path) -> tuple[int, int]:
    """(width, height) of an image as it is shown, from its header alone. Raises UserError."""
    with opened(path, "not a readable image") as file:
        # but for the first test Pillow would decode a PNG to look for EXIF after it
        stated = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & file.info.keys()
        return file.size[::-1] if stated and turn_of(file) in SWAPS_SIDES else file.size


def open_image(path) -> Image.Image:
    """An RGB image of 8 bits, turned upright by its EXIF entry. Raises UserError.

    Transparency is dropped. Of 16-bit colours the upper 8 bits stay. Grey values of more than 8 bits and floats are brought to
    0 to 255 by the value that is white: see `white_of`.
    """
    with opened(path, "cannot be read as an image") as file:
        deep = ";16" in str(file.tile)  # Pillow keeps the upper half of 16-bit colours
        image = upright(file)
        if image.mode == "F" or image.mode.startswith("I"):
            return grey(path, file, np.asarray(image)).convert("RGB")
        if deep and max(high for _, high in np.reshape(image.getextrema(), (-1, 2))[: 1 if image.mode == "LA" else 3]) < 16:
            raise UserError(f"{path}: holds 16-bit colours, all of them below 4096 of 65535, so it is nearly black or 12-bit "
                            "data; save it with 8 bits per channel")  # fmt: skip
        image.info.pop("transparency", None)  # of a palette, which Pillow would warn of
        return image if image.mode == "RGB" else image.convert("RGB")


def grey(path, file: Image.Image, values: np.ndarray) -> Image.Image:
    """Grey values (H, W), whole numbers or floats, of an opened file -> an image of 8 bits, black at 0. Raises UserError."""
    tags = getattr(file, "tag_v2", {})  # of a TIFF
    if values.dtype == np.int32 and tags.get(339) in (None, 1, (1,)):
        values = values.view(np.uint32)  # Pillow knows signed 32-bit values alone
    low, high = values.min().item(), values.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{path}: holds values that are not finite (nan or inf); save it with grey values from 0 to 255")
    if low < 0:
        raise UserError(f"{path}: holds grey values from {low:g} to {high:g}, but 0 is black; save it with 0 to 255")
    white = white_of(path, file, tags, high, values.dtype.kind == "f")
    out = np.empty(values.shape, np.uint8)
    for row, line in zip(out, values, strict=True):  # by rows, which takes little memory
        # 65535 -> 255: whole numbers lose their lower bits
        row[:] = np.rint(line * (255 / white)) if values.dtype.kind == "f" else line.astype(np.uint64) * 256 // (white + 1)
    return Image.fromarray(255 - out if tags.get(262) == 0 else out)  # PhotometricInterpretation 0: 0 is white


def white_of(path, file: Image.Image, tags, high: float, floats: bool) -> float:
    """The grey value that is white in a file whose largest value is `high`. Raises UserError where that cannot be told.

    It is what the file says: the largest value of a format whose samples Pillow scales to 16 bits (PGM, JPEG 2000), or a TIFF's
    MaxSampleValue, SMaxSampleValue or BitsPerSample. Otherwise it is the smallest usual one that is not exceeded: 255, 4095
    (12 bits), 65535 or 2^32 - 1; for floats 1, 255 or 65535. So the values of a 12-bit camera are seen alike in a container
    of 16 bits. Where all values lie below a sixteenth of it, there is no telling.
    """
    if not floats and file.format in ("PPM", "JPEG2000"):
        return 65535
    bits = np.max(tags.get(258, 0))
    stated = [np.max(tags[tag]).item() for tag in (281, 341) if tag in tags]
    stated += [2 ** int(bits) - 1] if not floats and bits not in (0, 16, 32) else []
    for white in stated:
        if white > 0 and high <= white:
            return white
    usual = (1.0, 255.0, 65535.0) if floats else (255, 4095, 65535, 2**32 - 1)
    white = next((white for white in usual if high <= white), math.inf)
    if white == math.inf or (white > usual[0] and high < white / 16):
        raise UserError(f"{path}: holds grey values up to {high:g}, and does not say which value is white; save it with values "
                        "from 0 to 255")  # fmt: skip
    return white


def open_mask(path) -> np.ndarray:
    """(H, W) whole numbers, as they are in a grey or palette PNG of 1 to 16 bits. Raises UserError."""
    with opened(path, "cannot be read as a PNG mask", "replace it") as file:
        if file.mode in ("L", "P", "1") or file.mode.startswith("I"):
            return mask_values(file)
        kind = file.mode
    raise UserError(f"{path}: is a {kind} image; a mask holds one class index per pixel (grey or palette PNG); "
                    f"{masks_command(pathlib.Path(path).parent, flags_for_file(path))}")  # fmt: skip


def mask_values(file: Image.Image) -> np.ndarray:
    """(H, W) uint8 or int32: the values of an opened grey or palette image as they stand in the file, upright."""
    raw = file.tile[0].args if file.tile else None
    values = np.array(upright(file)).astype(np.int32 if file.mode.startswith("I") else np.uint8)
    return values // {"L;2": 85, "L;4": 17}.get(raw if isinstance(raw, str) else "", 1)  # Pillow stretches them to 0..255


def read_colours(path: pathlib.Path) -> bytes | None:
    """The palette of a mask file, three bytes per index, from its header alone; None where it has none, or one that says
    nothing: the grey ramp that Pillow gives by default. Raises UserError."""
    with opened(path, "cannot be read as a PNG mask", "replace it") as file:
        if file.mode != "P":
            return None
        rawmode, colours = file.palette.getdata()
        colours = bytes(colours) if rawmode == "RGB" else bytes(file.getpalette())
    ramp = bytes(np.repeat(np.arange(256, dtype=np.uint8), 3))
    return None if ramp.startswith(colours) else colours


# ---- which command fixes wrong masks ----


def masks_command(folder: pathlib.Path, flags: str) -> str:
    """The command that converts the masks in `folder`, as the end of a message."""
    old, new = (shlex.quote(str(path)) for path in (folder.with_name(f"{folder.name}-original"), folder))
    return f"rename {new} to {old} and run: python prepare.py masks --masks {old} --out {new} {flags}".rstrip()


def flags_for(values: np.ndarray, pixels: np.ndarray, classes: int, named: bool = False) -> str:
    """The flags of `prepare.py masks` for masks that hold the grey `values`, sorted, in so many `pixels` each, in a data set of
    `classes` classes; `named`: in classes.txt."""
    common = values[pixels >= 0.03 * pixels.sum()]
    values = values.tolist()
    wrong = [value for value in values if value >= classes and value != IGNORE_INDEX]
    if wrong and len(common) > 1 and len(values) - len(common) > 3:  # soft edges, or a JPEG
        levels, more = common.tolist(), " --unknown nearest"
    elif len(values) > MOST_UNNAMED:
        levels, more = [0, 255], " --unknown nearest"
    elif values == [0, IGNORE_INDEX] or (
        wrong and min(wrong) > 2 * classes and 1 < len(values) <= classes + 1
    ):  # levels of grey
        levels, more = values, ""
    elif named:
        return "--unknown ignore"
    else:
        return "--values " + " ".join([*(f"{i}={i}" for i in range(classes)), *(f"{value}=ignore" for value in wrong)])
    names = [i if i < max(2, classes) else "ignore" for i in range(len(levels))]
    return "--values " + " ".join(f"{value}={name}" for value, name in zip(levels, names, strict=True)) + more


def flags_for_file(path) -> str:
    """The flags of `prepare.py masks` for a file that is no grey or palette PNG: by its colours."""
    path = pathlib.Path(path)
    with opened(path, "cannot be read as an image", "replace it") as file:
        pixels = np.asarray(file.convert("RGB")).reshape(-1, 3)
    lossy = " --unknown nearest" if path.suffix.lower() in (".jpg", ".jpeg") else ""
    if (pixels == pixels[:, :1]).all():  # grey
        if not lossy and pixels.max() < IGNORE_INDEX:
            return ""  # class indices in three channels
        values, counts = np.unique(pixels[:, 0], return_counts=True)
        flags = flags_for(values, counts, 2) if len(values) > 1 else "--values 0=0 255=1"
        return flags.removesuffix(lossy) + lossy
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    if (path.parent.parent / "palette.txt").exists():
        return f"--palette {shlex.quote(str(path.parent.parent / 'palette.txt'))}{lossy}"
    for name, palette in (("voc", voc_palette(21)), ("cityscapes", CITYSCAPES_PALETTE)):
        if colours <= {*palette, VOC_BORDER, (0, 0, 0)}:
            return f"--palette {name}"
    if len(colours) <= 8:
        return "--values " + " ".join(f"{','.join(map(str, colour))}={i}" for i, colour in enumerate(sorted(colours)))
    return f"--palette palette.txt{lossy} (which holds the colour of each class, one 'R G B' per line)"


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


def colour_table(palette: list[tuple[int, int, int]]) -> np.ndarray:
    """(256, 3) uint8: the colour of every mask value, white beyond the classes."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table


def open_dataset(name: str, data: pathlib.Path | str | None, cache: pathlib.Path | None = None):
    """The data set of `--dataset` and `--data`. Raises UserError."""
    if name == "shapes":
        if data is not None:
            raise UserError(f"--data {data}: the embedded data set takes no folder; give --dataset folder with it "
                            "(make: DATASET=folder)")  # fmt: skip
        return Shapes()
    if data is None:
        raise UserError(f"--dataset {name}: needs its folder; give --data DIR (make: DATA=DIR)")
    dataset = {"folder": Folder, "voc": Voc, "voc-few": lambda data: Voc(data, few=True), "cityscapes": Cityscapes}[name](data)
    dataset.cache = cache
    return dataset


# ---- partitions ----


def digest(text: str) -> str:
    """A short hash; file names that are not UTF-8 are welcome."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def partition(dataset, part: str) -> Partition:
    """Split the training images: of n, ceil(n / k) stay labeled for `part` 1/k, or as many of them as have a mask.

    Images come in an order drawn by their names, but those that show a class for the first time come first, so every class
    is labeled if that many images can hold it. Partitions are nested, 1/16 in 1/8 in 1/4, and do not change when the masks
    of unlabeled images go away. To find those images, masks are looked at in that order until each class was seen; training
    itself opens the labeled ones alone. `1` keeps every mask.
    """
    match = re.fullmatch(r"1(?:/([1-9][0-9]*))?", part)
    if not match:
        raise UserError(f"--part {part}: expected 1/K with a whole number K, such as 1/8, or 1 for all masks; lists of "
                        "your own are --labeled-list and --unlabeled-list")  # fmt: skip
    k = int(match[1] or 1)
    able = [name for name in dataset.train if dataset.has_mask(name)]
    ranked = sorted(able, key=lambda name: hashlib.sha256(f"0:{name}".encode(errors="surrogateescape")).digest())
    count = math.ceil(len(dataset.train) / k)
    if count < len(ranked):
        carriers = first_carriers(dataset, ranked)
        ranked.sort(key=lambda name: name not in carriers)  # stable
    labeled = sorted(ranked[:count])
    if not labeled:
        raise UserError(f"--part {part}: leaves no labeled image, since no training image of {dataset.name} has a mask")
    return make_partition("1" if k == 1 else part, labeled, sorted({*dataset.train, *dataset.bare} - set(labeled)))


def make_partition(name: str, labeled: list[str], unlabeled: list[str]) -> Partition:
    return Partition(name, labeled, unlabeled, digest("\n".join([*labeled, "--", *unlabeled])))


def first_carriers(dataset, names: list[str]) -> set[str]:
    """The images that show a class which none before them shows."""
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


def listed_partition(dataset, labeled_list: pathlib.Path, unlabeled_list: pathlib.Path | None) -> Partition:
    """The partition of --labeled-list and --unlabeled-list; without the latter all other training images are unlabeled.

    An image in both lists stays labeled, with a warning. Raises UserError for a val image, and for one without a mask.
    """
    known = {*dataset.train, *dataset.bare, *dataset.val}
    labeled = read_names(labeled_list, known)
    unlabeled = read_names(unlabeled_list, known) if unlabeled_list else [*dataset.train, *dataset.bare]
    for path, names in ((labeled_list, labeled), (unlabeled_list, unlabeled)):
        held_out = sorted(set(names) & set(dataset.val))
        if held_out:
            raise UserError(f"{path}: names {len(held_out)} val image(s), first '{held_out[0]}'; take them out")
    unmasked = [name for name in labeled if not dataset.has_mask(name)]
    if unmasked:
        raise UserError(f"{labeled_list}: '{unmasked[0]}' has no mask; add it or take the name out")
    both = sorted(set(labeled) & set(unlabeled)) if unlabeled_list else []
    if both:
        print(f"warning: {unlabeled_list} names {len(both)} labeled image(s) too, first '{both[0]}'; they stay labeled",
              file=sys.stderr)  # fmt: skip
    return make_partition(labeled_list.stem, sorted(labeled), sorted(set(unlabeled) - set(labeled)))


def partition_of(dataset, args: argparse.Namespace) -> Partition:
    """The partition of the arguments. Raises UserError."""
    if args.labeled_list:
        return listed_partition(dataset, args.labeled_list, args.unlabeled_list)
    if args.unlabeled_list:
        raise UserError(f"--unlabeled-list {args.unlabeled_list}: give --labeled-list with it")
    return partition(dataset, args.part)


def open_training_data(args: argparse.Namespace, unlabeled: bool):
    """The data set and the partition of a training, with every file's header checked; `unlabeled` says whether unlabeled
    images are needed. Raises UserError."""
    dataset = open_dataset(args.dataset, args.data, args.cache)
    part = partition_of(dataset, args)
    if unlabeled and not part.unlabeled:
        flag = f"--labeled-list {args.labeled_list}" if args.labeled_list else f"--part {args.part}"
        raise UserError(f"{flag}: leaves no unlabeled image; take a smaller part, add images to unlabeled.txt, or train "
                        "with labels alone (train_teacher.py --method sup)")  # fmt: skip
    if rank_and_size()[0] == 0:  # an error here ends all ranks
        if dataset.missing():
            print(f"note: {dataset.missing()}", file=sys.stderr)
        groups = {"labeled": part.labeled, "val": dataset.val}
        refuse_faults(dataset, groups | ({"unlabeled": part.unlabeled} if unlabeled else {}))
    return dataset, part


# ---- a look at the data, before training and evaluation and by `prepare.py check` ----


class Look(NamedTuple):
    """What the files of a data set hold. The groups are labeled, unlabeled and val; unlabeled masks are never opened."""

    sizes: collections.Counter  # images of each (height, width)
    pixels: dict[str, np.ndarray]  # group -> (256,) int64: pixels of each label
    images: dict[str, np.ndarray]  # group -> (256,) int64: images that show it
    palettes: dict[bytes, dict[int, str]]  # palette of mask files -> its indices that occur -> the first file that shows one
    problems: dict[str, str]  # name -> what is wrong with its image or mask


def look_at(dataset, groups: dict[str, list[str]], whole: bool) -> Look:
    """Look at the images and masks of `groups` (group -> names).

    With `whole`, images are decoded and problems are collected, and progress is shown. Otherwise only the headers of the images
    are read, and the first problem raises UserError.
    """
    masked = [group for group in groups if group != "unlabeled"]
    pixels, images = ({group: np.zeros(256, np.int64) for group in masked} for _ in range(2))
    look = Look(collections.Counter(), pixels, images, {}, {})

    def look_at_one(group, name):
        try:
            if whole:
                height, width = dataset.image(name).shape[:2]
            else:
                width, height = upright_size(dataset.images[name])
            if group not in masked:
                return (height, width), None, None
            mask = dataset.mask(name)
            colours = None
            if name in dataset.masks:  # files
                check_size(dataset.masks[name], mask, (width, height))
                colours = dataset.colours(name)
            return (height, width), np.bincount(mask.ravel(), minlength=256), colours
        except UserError as error:
            if not whole:
                raise
            return str(error)

    with ThreadPoolExecutor() as pool:
        for group, names in groups.items():
            seen = pool.map(functools.partial(look_at_one, group), names)
            for name, found in zip(names, tqdm(seen, group, len(names), disable=None if whole else True), strict=True):
                if isinstance(found, str):
                    look.problems[name] = found
                    continue
                size, counts, colours = found
                look.sizes[size] += 1
                if counts is not None:
                    look.pixels[group][:] += counts
                    look.images[group][:] += counts > 0
                if colours is not None:
                    first = look.palettes.setdefault(colours, {})
                    for label in counts.nonzero()[0].tolist():
                        first.setdefault(label, str(dataset.masks[name]))
    return look


def faults(dataset, look: Look) -> list[str]:
    """What makes every number meaningless that is trained or measured on these masks, each in one line."""
    if not isinstance(dataset, Files):  # what is drawn is right
        return []
    found, labels = [], {group: set(pixels.nonzero()[0].tolist()) for group, pixels in look.pixels.items()}
    for group, shown in labels.items():
        task = "evaluate" if group == "val" else "learn"
        where, classes = f"{dataset.root}: the {group} masks", sorted(shown - {IGNORE_INDEX})
        if not shown:
            continue  # none could be read
        if not classes:
            found.append(f"{where} hold 255 alone, which is ignored, so there is nothing to {task}; take images that show "
                         f"classes, or {dataset.fix('--values 0=0 255=1')}")  # fmt: skip
        elif len(classes) == 1 and shown == {0, IGNORE_INDEX}:
            found.append(f"{where} hold 0 and 255 alone, and 255 is ignored; {dataset.fix('--values 0=0 255=1')}")
        elif len(classes) == 1:
            found.append(f"{where} show one class alone, '{dataset.classes[classes[0]]}', so there is nothing to {task}; take "
                         "images that show others too (a larger --part, other lists), or fix the masks")  # fmt: skip
    every = sorted(set().union(*labels.values()) - {IGNORE_INDEX})
    gap = sorted(set(range(max(every, default=0))) - set(every))
    counted = not dataset.named and "labeled" in labels  # val alone may lack a class
    if counted and len(every) > 1 and (gap or len(every) > MOST_UNNAMED):
        pixels = sum(look.pixels.values())
        flags = flags_for(pixels.nonzero()[0], pixels[pixels > 0], len(every))
        if max(every) <= MOST_UNNAMED:
            flags = "--values " + " ".join(f"{label}={i}" for i, label in enumerate(every))
        if len(every) > 8:
            what = f"{len(every)} different labels{', with gaps,' if gap else ''} as soft edges and levels of grey do"
        else:
            what = f"the labels {', '.join(map(str, every))} but not {gap[0]}"
        found.append(f"{dataset.root / 'masks'}: hold {what}; name every class in classes.txt, one per line in the order of "
                     f"the labels, or {dataset.fix(flags)}")  # fmt: skip
    clash = palette_clash(dataset, look.palettes)
    if clash:
        found.append(clash)
    return found


def palette_clash(dataset, palettes: dict[bytes, dict[int, str]]) -> str | None:
    """Where one colour stands for two indices that occur, in two mask files or in one and `dataset.palette`, and one of the two
    palettes has another colour at the other's index: then the indices mean different things."""
    known = {}  # colour -> index -> a palette that has it there, and its file
    official = bytes(channel for colour in dataset.palette for channel in colour) if dataset.palette_from else b""
    place = dataset.palette_from
    if not official and dataset.named and dataset.classes[0].lower() == "background":  # black by custom
        official, place = bytes(3), "the name background of class 0"
    reference = (official, dict.fromkeys(range(len(official) // 3), place))
    for palette, labels in [reference, *palettes.items()]:
        for label, path in labels.items():
            colour = palette[3 * label : 3 * label + 3]
            same = known.setdefault(colour, {}) if len(colour) == 3 else {}
            for other, (theirs, where) in same.items():
                both = theirs[3 * label : 3 * label + 3], palette[3 * other : 3 * other + 3]
                if other != label and any(len(each) == 3 and each != colour for each in both):
                    flag = "--palette palette.txt (which holds each class's colour, one 'R G B' per line)"
                    if dataset.palette_from:
                        flag = f"--palette {shlex.quote(dataset.palette_from)}" if isinstance(dataset, Folder) else ""
                    fix = dataset.fix(flag, pathlib.Path(path))
                    return (f"{path}: its palette gives the colour {tuple(colour)} to index {label}, but {where} to index "
                            f"{other}, so indices do not mean the same everywhere; {fix}")  # fmt: skip
            same.setdefault(label, (palette, path))
    return None


def refuse_faults(dataset, groups: dict[str, list[str]]):
    """Raises UserError for the first file that cannot be read, size or label that is wrong, or fault of the masks. A look at
    headers of images, and at every mask of `groups` (see `look_at`)."""
    if isinstance(dataset, Files):  # nothing is read of what is drawn
        problems = faults(dataset, look_at(dataset, groups, whole=False))
        if problems:
            raise UserError(problems[0])


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
    out = torch.empty(array.shape[2], *crop, dtype=torch.uint8)
    out[:] = torch.tensor(fill, dtype=torch.uint8).view(-1, 1, 1)
    pixels = torch.from_numpy(np.array(array[tuple(source)])).permute(2, 0, 1)
    mode = v2.InterpolationMode.BILINEAR if len(pixels) == 3 else v2.InterpolationMode.NEAREST_EXACT
    size = [t.stop - t.start for t in target]
    out[:, target[0], target[1]] = v2.functional.resize(pixels, size, mode, antialias=True)
    return out


class TrainSet(torch.utils.data.Dataset):
    """Augmented crops: a drawn scale, mirrored or not, and a drawn window. Item (index, seed) -> image (3, h, w) uint8, mask
    (h, w) uint8; padding is 255 in the mask. The device makes int64 of masks, so that workers send one byte per pixel.

    With `labeled=False` no mask is opened: the mask then holds 0 for pixels of the image and 255 for padding.
    """

    def __init__(self, dataset, names, crop, scales, image_scale=1.0, labeled=True):
        self.dataset, self.names, self.crop, self.labeled = dataset, names, crop, labeled
        self.scales = [image_scale * s for s in scales]

    def __getitem__(self, item):
        index, seed = item
        name = self.names[index]
        rng = np.random.default_rng(seed)
        image = self.dataset.image(name)
        mask = self.dataset.mask(name) if self.labeled else np.broadcast_to(np.uint8(0), image.shape[:2])
        # the window first, so that only its pixels are resized
        source, target = draw_window(image.shape[:2], self.crop, rng.choice(self.scales), rng)
        image = resize_window(image, source, self.crop, target, FILL)
        mask = resize_window(mask[..., None], source, self.crop, target, [IGNORE_INDEX])[0]
        if rng.random() < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return image, mask


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


class StepSampler(torch.utils.data.Sampler):
    """Lists of (index, augmentation seed), one a share of a step, for steps `start` to `steps`; each is a pure function of
    (seed, step, share).

    A step sees views · batch images, the views of a batch one after the other. A share of `size` images has the images
    share · size to (share + 1) · size of each. The images come in an endless row of permutations of range(n), so each is seen
    once an epoch.
    """

    def __init__(self, n, batch, seed, start, steps, views=1, shares=range(1), size=None):
        self.n, self.batch, self.seed, self.start, self.steps = n, batch, seed, start, steps
        self.views, self.shares, self.size = views, shares, size or batch

    def __len__(self):
        return (self.steps - self.start) * len(self.shares)

    def __iter__(self):
        for step in range(self.start, self.steps):
            for share in self.shares:
                yield [
                    (int(permutation(self.n, self.seed, p // self.n)[p % self.n]), seed_of(self.seed, p))
                    for view in range(step * self.views, (step + 1) * self.views)
                    for p in range(view * self.batch + share * self.size, view * self.batch + (share + 1) * self.size)
                ]


def seed_of(*parts: int) -> int:
    """A seed that is different for each tuple of whole numbers, whatever its length."""
    return int(np.random.SeedSequence([len(parts), *parts]).generate_state(1, np.uint64)[0] >> 1)


def train_batches(dataset, names, args, views: int, start: int, labeled: bool):
    """An iterator over this rank's shares of steps `start` to `args.steps`: images (views · m, 3, h, w) uint8, masks
    (views · m, h, w) uint8, m images of each view (see `common.shares_of`)."""
    train_set = TrainSet(dataset, names, args.crop, args.scales, args.image_scale, labeled)
    seed, (shares, size) = seed_of(args.seed, int(labeled)), shares_of(args)
    sampler = StepSampler(len(names), args.batch, seed, start, args.steps, views, shares, size)
    workers = {"num_workers": args.workers, "persistent_workers": True, "prefetch_factor": 4} if args.workers else {}
    loader = DataLoader(train_set, batch_sampler=sampler, pin_memory=torch.cuda.is_available(), **workers)
    return start_workers(loader)


def cutmix_boxes(args, step: int, device) -> list[torch.Tensor | None]:
    """The CutMix masks of a step, one (m, 1, h, w) bool on `device` for each of this rank's shares; None with --no-cutmix."""
    shares, size = shares_of(args)
    if not args.cutmix:
        return [None] * len(shares)
    boxes = cutmix_mask(args.batch, args.crop, seed_of(args.seed, 2, step))
    if device.type == "cuda":
        boxes = boxes.pin_memory().to(device, non_blocking=True)
    return [boxes[share * size : (share + 1) * size] for share in shares]


def normalize(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 on `device`, channels_last, with ImageNet's mean and deviation taken out."""
    images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    mean, std = colour_statistics(device)
    return (images / 255 - mean) / std


@functools.lru_cache(maxsize=4)
def colour_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 1, 1) each, copied to the device once: a copy from pageable memory waits for it."""
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


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


def cutmix(views: torch.Tensor, box: torch.Tensor | None) -> torch.Tensor:
    """views (2B, C, H, W) or (2B, H, W), box (B, 1, H, W) -> B mixed views: the first B outside the box, the last inside.

    Maps of another size than the box are mixed along the box at their size. Without a box the views are as they are.
    """
    if box is None:
        return views
    if box.shape[-2:] != views.shape[-2:]:
        box = torch.nn.functional.interpolate(box.float(), views.shape[-2:], mode="nearest-exact") > 0.5
    outside, inside = views.chunk(2)
    return torch.where(box if views.ndim == 4 else box[:, 0], inside, outside)


# ---- command line ----


def add_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="shapes", choices=list(RECIPES), help="shapes is embedded and needs no files")
    group.add_argument("--data", type=pathlib.Path, help="folder of the data set")
    group.add_argument("--part", default="1/8", help="1/K: so many of the training images are labeled, as far as they have "
                       "masks; 1: all that have one")  # fmt: skip
    group.add_argument("--labeled-list", type=pathlib.Path, help="instead of --part: a file that names the labeled images")
    group.add_argument("--unlabeled-list", type=pathlib.Path, help="with --labeled-list: a file that names the unlabeled ones")
    group.add_argument("--cache", type=pathlib.Path, help="folder in which decoded images are kept and found again")


def add_view_arguments(parser: argparse.ArgumentParser):
    """How networks see images."""
    group = parser.add_argument_group("views")
    group.add_argument("--scales", type=float, nargs="+", help="training: factors on the image size, one drawn an image")
    group.add_argument("--image-scale", type=float, default=1.0, help="factor on the size of all images, in evaluation too")
    group.add_argument("--window", type=window_size, help=WINDOW_HELP)


WINDOW_HELP = "evaluation: size of sliding windows, SIDE or HEIGHTxWIDTH, or `whole` for whole images"


def window_size(text: str) -> tuple[int, int] | bool:
    """As `crop_size`, and False for `whole`."""
    return False if text == "whole" else crop_size(text)
