"""How fast are augmented crops made if the window is chosen first, against the
plain order: resize the whole image, then crop?

    python benchmarks/bench_loading.py      # writes results/loading-cpu.json
    python benchmarks/bench_loading.py --rounds 5 --json loading.json

The plain order is torchvision's v2 transforms on tensors. Both make the
paper's crops at the paper's scales, of drawn images: a 2048x1024 PNG with its
mask (Cityscapes), and a 500x375 JPEG (VOC). `decode` times everything from the
file on; `resize` starts from decoded arrays; `cache` is the window-first order
with --cache. One process works on one image at a time.
"""

import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import batches
import datasets
import recipes
from common import ArgumentParser, UserError, cli
from result_files import refuse_outputs, write_result

CASES = {"cityscapes 2048x1024 PNG": ((1024, 2048), 800, "png"), "voc 500x375 JPEG": ((375, 500), 512, "jpg")}
SCALES = recipes.FOLDER_RECIPE["scales"]


class Drawn(datasets.Files):
    """One image and its mask, as files; `keep` holds them decoded."""

    def __init__(self, root: pathlib.Path, size, suffix: str, keep: bool):
        self.root, self.name, self.classes = root, "drawn", [str(i) for i in range(19)]
        self.images, self.masks = {"a": root / f"a.{suffix}"}, {"a": root / "mask.png"}
        if not self.masks["a"].exists():
            rng = np.random.default_rng(0)
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
            image = np.asarray(coarse) + rng.normal(0, 4, (*size, 1))  # compresses about as a photo does
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(self.images["a"], quality=90)
            mask = Image.fromarray(rng.integers(0, 19, (24, 32), np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
            mask.save(self.masks["a"])
        self.kept = (super().image("a"), super().mask("a")) if keep else None

    def image(self, name):
        return self.kept[0] if self.kept else super().image(name)

    def mask(self, name):
        return self.kept[1] if self.kept else super().mask(name)


def plain_order(dataset, crop):
    """The usual pipeline; `scale` is drawn outside, so that both orders get the same."""
    fill = {tv_tensors.Image: batches.FILL, tv_tensors.Mask: datasets.IGNORE_INDEX}
    rest = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(crop, pad_if_needed=True, fill=fill)])

    def item(scale):
        image = tv_tensors.Image(torch.from_numpy(np.array(dataset.image("a"))).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(np.array(dataset.mask("a"))))
        size = [round(side * scale) for side in image.shape[-2:]]
        return rest(*(v2.functional.resize(t, size, antialias=True) for t in (image, mask)))

    return item


def window_first(dataset, crop):
    sets = {scale: batches.TrainSet(dataset, ["a"], (crop, crop), [scale]) for scale in SCALES}
    seeds = iter(range(10**9))
    return lambda scale: sets[scale][0, next(seeds)]


def main():
    parser = ArgumentParser(__doc__, usage="python benchmarks/%(prog)s [options]")
    path = pathlib.Path("results/loading-cpu.json")
    parser.add_argument("--json", type=pathlib.Path, default=path, metavar="FILE", help=f"result file (default: {path})")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timed rounds (default: 15)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    args = parser.parse_args()
    refuse_outputs([("--json", args.json)], [], args.overwrite)
    torch.set_num_threads(1)  # as in a loader's worker
    began, rows = time.perf_counter(), []
    print(f"{'case':26} {'from':7} {'impl':13} {'p50 ms':>8} {'images/s':>9} {'speedup':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for case, (size, crop, suffix) in CASES.items():
            root = pathlib.Path(folder, suffix)
            root.mkdir()
            files, kept, cached = (Drawn(root, size, suffix, keep) for keep in (False, True, False))
            cached.cache = root / "cache"
            variants = {
                ("resize", "plain"): plain_order(kept, crop),
                ("resize", "window first"): window_first(kept, crop),
                ("decode", "plain"): plain_order(files, crop),
                ("decode", "window first"): window_first(files, crop),
                ("cache", "window first"): window_first(cached, crop),
            }
            if window_first(kept, crop)(1.0)["image"].shape != plain_order(kept, crop)(1.0)[0].shape:
                raise UserError(f"{case}: the two orders make crops of other sizes")
            times = {variant: [] for variant in variants}
            for _ in range(args.rounds):
                for scale in SCALES:
                    for variant, item in variants.items():
                        start = time.perf_counter()
                        item(scale)
                        times[variant].append(1e3 * (time.perf_counter() - start))
            mean = {variant: float(np.mean(t)) for variant, t in times.items()}
            for (source, impl), t in times.items():
                speedup = mean["resize" if source == "resize" else "decode", "plain"] / mean[source, impl]
                p20, p50, p80 = np.quantile(t, [0.2, 0.5, 0.8]).tolist()
                rows.append(
                    {
                        "case": case,
                        "impl": impl,
                        "from": source,
                        "device": "cpu",
                        "shape": [*size, 3],
                        "crop": crop,
                        "pass": "item",
                        "p20_ms": p20,
                        "p50_ms": p50,
                        "p80_ms": p80,
                        "images_per_s": 1e3 / mean[source, impl],
                        "speedup": speedup,
                    }
                )
                print(f"{case:26} {source:7} {impl:13} {p50:8.1f} {1e3 / mean[source, impl]:9.1f} {speedup:7.2f}x")
    write_result(args.json, "loading", rows, time.perf_counter() - began, "torch")
    print(f"results: {args.json} ({os.cpu_count()} cores)")


if __name__ == "__main__":
    cli(main)
