"""What does a model cost where it runs: on disk, in memory, in time?

    python benchmarks/bench_deploy.py              # writes results/deploy.json
    python benchmarks/bench_deploy.py --resume --evaluations results/export.json
    python benchmarks/bench_deploy.py --cases 'resnet101 256' --json part.json

Both teachers, three students with several heads, and what one would take from
torchvision instead. Each runs in PyTorch (float32, eager, batch norm folded),
compiled at one size, and in ONNX Runtime in float32 and int8, after the same
export and quantization. All do the same work: from a uint8 image to the uint8
label of every pixel, so the normalization, the upsampling and the argmax count.
21 classes, one image at a time, on the CPU. Weights are random, which does not
change the speed.

An export is compared with PyTorch before anything is timed. The models take
turns, round by round, so that drift affects all alike. A cell ends after
--calls calls or --seconds seconds, but not before 30 calls. `peak_mb` is the
resident memory while a fresh process runs the model, its weights included,
above that after the imports. mIoU comes from the result files of
--evaluations. --resume keeps the rows of the file, measures those it lacks, and
writes table and picture again.
"""

import argparse
import concurrent.futures
import ctypes
import gc
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torchvision
from torch import nn

import batches
import export
import mgd_ops
import models
import onnx_model
from common import ArgumentParser, UserError, cli
from result_files import TABLE_MARK, refuse_outputs, write_result, write_text

CLASSES = 21  # of VOC, and of torchvision's networks
SHAPES = [(512, 512), (360, 480)]
THREADS = [1, 2]
COMPILED = ((512, 512), 2)  # the size and the threads of torch.compile, which takes a minute for each
RUNTIMES = [("pytorch", "fp32"), ("compile", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")]
FEWEST_CALLS = 30
# Seconds between two calls. Threads wait for their next work in a loop, for tens of milliseconds: with 5 ms, two threads of one
# model took a core from the next one, and int8 on two threads was slower than on one.
PAUSE = 0.05
CALIBRATION = 4  # images of noise: the ranges of the activations do not change the speed


class Case(NamedTuple):
    role: str  # as in result files, or `torchvision`
    backbone: str  # or torchvision's name of the whole network
    head_width: int | None
    separable_head: bool


class Cell(NamedTuple):
    name: str  # of `CASES`
    runtime: str
    precision: str
    threads: int
    shape: tuple[int, int]


HEADS = [(256, False), (128, False), (64, False), (64, True)]
ALL = [
    Case("teacher_deep", "resnet101", 256, False),
    Case("teacher_wide", "wide_resnet34", 256, False),
    *(Case("student", backbone, *head) for backbone in ("resnet18", "mobilenetv2", "efficientnet_lite0") for head in HEADS),
    *(
        Case("torchvision", name, None, False)
        for name in ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50")
    ),
]


def name_of(case: Case) -> str:
    return " ".join(
        [case.backbone, *["separable"] * case.separable_head, *map(str, [case.head_width] if case.head_width else [])]
    )


CASES = {name_of(case): case for case in ALL}
DEEP, LIGHT, RIVAL = "resnet101 256", "mobilenetv2 separable 64", "lraspp_mobilenet_v3_large"


# ---- networks ----


class Coarse(nn.Module):
    """A segmentation network of torchvision without its last upsampling, which `Labels` and the export do for all alike:
    normalized images (B, 3, H, W) -> logits (B, N, h, w)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.backbone, self.classifier = network.backbone, network.classifier

    def forward(self, images):
        features = self.backbone(images)
        return self.classifier(features.get("out", features))  # LR-ASPP takes both stages


class Labels(nn.Module):
    """The whole work in PyTorch: images (B, H, W, 3) uint8 -> labels (B, H, W) uint8."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.mean, self.std = batches.colour_statistics(torch.device("cpu"))

    def forward(self, images):
        x = (images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std  # channels_last, as the image is
        out = self.network(x)
        return mgd_ops.upsample(getattr(out, "logits", out), x.shape[2:]).argmax(1).to(torch.uint8)


def build(case: Case) -> nn.Module:
    """The network with random weights, the same in every process, and with the statistics of noise in its batch norm, without
    which the activations of a deep network leave every range."""
    torch.manual_seed(0)
    if case.role == "torchvision":
        network = torchvision.models.get_model(case.backbone, weights=None, weights_backbone=None, num_classes=CLASSES)
        network = Coarse(network).to(memory_format=torch.channels_last)
    else:
        width, separable = case.head_width, case.separable_head
        network = models.build_model(case.backbone, CLASSES, head_width=width, separable_head=separable)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(2, 3, 128, 128))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def draw_image(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(1, H, W, 3) uint8: noise in large spots."""
    spots = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    image = nn.functional.interpolate(spots, shape, mode="bicubic").clamp(0, 1)
    return (255 * image).byte().permute(0, 2, 3, 1).contiguous().numpy()


def export_case(case: Case, folder: pathlib.Path) -> tuple[dict, dict[str, pathlib.Path]]:
    """Params in M and GMACs of a case, and its files: `pytorch` (the weights alone), `fp32` and `int8`, as exported models that
    give labels."""
    network = build(case)
    files = {kind: folder / f"{name_of(case)}.{kind}" for kind in ("pytorch", "fp32", "int8")}
    torch.save(models.fold_batch_norm(network).state_dict(), files["pytorch"])
    logits = {precision: folder / f"{name_of(case)}-logits.{precision}" for precision in ("fp32", "int8")}
    export.export_onnx(network, logits["fp32"])
    export.quantize(logits["fp32"], logits["int8"], [draw_image((256, 256), seed) for seed in range(CALIBRATION)])
    for precision, file in logits.items():
        export.add_labels(file, files[precision])
        file.unlink()
    params = sum(p.numel() for p in network.parameters()) / 1e6
    return {"params_m": params, "gmacs_model": models.gmacs(network, 512)}, files


def start(case: Case, runtime: str, file: pathlib.Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images (1, H, W, 3) to labels (1, H, W), both uint8."""
    if runtime == "onnxruntime":
        session = onnx_model.start_session(file, threads)
        return lambda image: session.run(None, {"image": image})[0]
    model = Labels(models.fold_batch_norm(build(case))).eval()
    if runtime == "compile":
        model = torch.compile(model, dynamic=False)

    def run(image):
        with torch.inference_mode():
            return model(torch.from_numpy(image)).numpy()

    return run


# ---- measurements ----


def check(case: Case, files: dict[str, pathlib.Path]):
    """Raises UserError where an export does not give labels, or where one in float32 gives others than PyTorch. Those of int8
    say nothing: random weights leave the classes close together."""
    image = draw_image(SHAPES[-1])
    expected = start(case, "pytorch", files["pytorch"], 1)(image)
    for precision in ("fp32", "int8"):
        labels = start(case, "onnxruntime", files[precision], 1)(image)
        if labels.shape != expected.shape or labels.dtype != np.uint8:
            raise UserError(f"{name_of(case)}: the export gives {labels.dtype} labels of {labels.shape}, not {expected.shape}")
        if precision == "fp32" and (equal := float((labels == expected).mean())) < 0.999:
            raise UserError(f"{name_of(case)}: only {equal:.2%} of the export's labels are PyTorch's; nothing is timed")


def resident_mb(field: str) -> float:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    return math.nan


def peak_memory(case: list, runtime: str, file: str, shape: list[int]) -> float:
    """MB while this fresh process runs a model, above what it had before it loaded the model."""
    image, before = draw_image(tuple(shape)), resident_mb("VmRSS")
    run = start(Case(*case), runtime, pathlib.Path(file), max(THREADS))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what loading left free goes back to the system
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
    run(image)
    run(image)
    return resident_mb("VmHWM") - before


def peak_in_own_process(spec: tuple) -> float:
    command = [sys.executable, __file__, "--peak", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name_of(spec[0])}, {spec[1]}: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def take_turns(runs: dict, image: np.ndarray, calls: int, seconds: float) -> dict:
    """Milliseconds of each call of each function of `runs`, after two that are not counted."""
    times = {key: [] for key in runs}

    def left(key):
        count = len(times[key]) - 2
        return count < min(calls, FEWEST_CALLS) or (count < calls and sum(times[key][2:]) < 1e3 * seconds)

    while going := [key for key in runs if left(key)]:
        for key in going:
            time.sleep(PAUSE)
            began = time.perf_counter()
            runs[key](image)
            times[key].append(1e3 * (time.perf_counter() - began))
    return {key: values[2:] for key, values in times.items()}


def measure(cells: list[Cell], folder: pathlib.Path, calls: int, seconds: float):
    """Yields lists of rows: of all cells with the same threads and shape, whose models take turns."""
    facts, files = {}, {}
    for name in dict.fromkeys(cell.name for cell in cells):
        facts[name], files[name] = export_case(CASES[name], folder)
        check(CASES[name], files[name])
        print(f"{name}: exported; the labels are PyTorch's", flush=True)
    file_of = {cell: files[cell.name][cell.precision if cell.runtime == "onnxruntime" else "pytorch"] for cell in cells}
    once = {(CASES[cell.name], cell.runtime, str(file_of[cell]), cell.shape) for cell in cells if cell.runtime != "compile"}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # memory does not mind neighbours
        peaks = dict(zip(once, pool.map(peak_in_own_process, once), strict=True))
    for threads in sorted({cell.threads for cell in cells}):
        torch.set_num_threads(threads)
        started = {}
        for shape in dict.fromkeys(cell.shape for cell in cells if cell.threads == threads):
            turn = [cell for cell in cells if (cell.threads, cell.shape) == (threads, shape)]
            for cell in turn:
                if cell[:3] not in started:
                    started[cell[:3]] = start(CASES[cell.name], cell.runtime, file_of[cell], threads)
            times = take_turns({cell: started[cell[:3]] for cell in turn}, draw_image(shape), calls, seconds)
            rows = []
            for cell in turn:
                p50, p95 = np.quantile(times[cell], [0.5, 0.95]).tolist()
                row = {
                    "case": cell.name,
                    "impl": f"{cell.runtime} {cell.precision}",
                    "device": "cpu",
                    **CASES[cell.name]._asdict(),
                    "classes": CLASSES,
                    "runtime": cell.runtime,
                    "precision": cell.precision,
                    "threads": threads,
                    "shape": [1, *shape, 3],
                    "calls": len(times[cell]),
                    "p50_ms": p50,
                    "p95_ms": p95,
                    "size_mb": file_of[cell].stat().st_size / 1e6,
                    "peak_mb": peaks.get((CASES[cell.name], cell.runtime, str(file_of[cell]), shape)),
                    "params_m": facts[cell.name]["params_m"],
                    "gmacs_model": facts[cell.name]["gmacs_model"],
                    "miou": None,
                    "miou_on": None,
                }
                rows.append(row)
                print(f"{cell.name:30} {row['impl']:17} {threads} {shape} {p50:8.1f} ms, p95 {p95:8.1f} ms", flush=True)
            yield rows


def cell_of(row: dict) -> Cell:
    return Cell(row["case"], row["runtime"], row["precision"], row["threads"], tuple(row["shape"][1:3]))


# ---- mIoU, table and picture ----


def add_miou(rows: list[dict], paths: list[pathlib.Path]):
    """Give the rows the mIoU of the same network, runtime and precision in the result files `paths`, with the data set and its
    image scale as `miou_on`, and None where these have none; without `paths` all stays. A row of `export.py` also has its
    checkpoint's mIoU in PyTorch. Raises UserError."""
    found, scenes = {}, {}
    for path in paths:
        for row in read_rows(path):
            if not {"miou", "role", "backbone", "head_width"} <= row.keys():
                raise UserError(f"--evaluations {path}: is no evaluation; give what export.py or evaluate.py --json wrote")
            case = tuple(row.get(key) or False for key in Case._fields)
            scale = row.get("image_scale", 1)
            scenes[case] = row.get("dataset", "") + (f" at {scale} of its size" if scale != 1 else "")
            runtime = ("onnxruntime", row["export"]) if row.get("export") else ("pytorch", "fp32")
            for key, miou in [(runtime, row["miou"]), (("pytorch", "fp32"), row.get("miou_torch"))]:
                if miou is not None and found.setdefault((*case, *key), miou) != miou:
                    raise UserError(
                        f"--evaluations {path}: has another mIoU of {' '.join(map(str, case))}; give one run of each"
                    )
    for row in rows if paths else []:
        runtime = "pytorch" if row["runtime"] == "compile" else row["runtime"]
        case = tuple(row[key] or False for key in Case._fields)
        row["miou"] = found.get((*case, runtime, row["precision"]))
        row["miou_on"] = None if row["miou"] is None else scenes[case]


def read_rows(path: pathlib.Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("its rows are no list of objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as a result file ({error}); give one of this project, or leave it out"
        ) from None
    return rows


TITLES = {
    "resnet101": "T_D: ResNet-101",
    "wide_resnet34": "T_W: Wide ResNet-34",
    "resnet18": "ResNet-18",
    "mobilenetv2": "MobileNetV2",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "lraspp_mobilenet_v3_large": "LR-ASPP, MobileNetV3-L",
    "deeplabv3_mobilenet_v3_large": "DeepLabV3, MobileNetV3-L",
    "deeplabv3_resnet50": "DeepLabV3, ResNet-50",
}
IMPLS = {
    "pytorch fp32": "PyTorch",
    "compile fp32": "torch.compile",
    "onnxruntime fp32": "ONNX Runtime, float32",
    "onnxruntime int8": "ONNX Runtime, int8",
}


def title_of(row: dict) -> str:
    head = [] if row["head_width"] is None else [f"head {row['head_width']}"]
    return ", ".join([TITLES[row["backbone"]], *head, *["separable"] * row["separable_head"]])


def miou_label(rows: list[dict]) -> str:
    return f"mIoU on {', '.join(sorted({row['miou_on'] for row in rows if row['miou'] is not None}))}"


def markdown(rows: list[dict]) -> str:
    """One line per model and implementation, with p50 and p95 for each size and number of threads."""
    columns = sorted({(row["threads"], *row["shape"][1:3]) for row in rows}, key=lambda c: (-c[1] * c[2], c[0]))
    heads = ["model", "in", "MB on disk", "peak MB", "params, M", "GMACs", "mIoU"]
    heads += [f"{h}×{w}, {threads} thread{'s' * (threads > 1)}, ms" for threads, h, w in columns]
    lines = [heads, ["---"] * len(heads)]
    groups = {}
    for row in rows:
        groups.setdefault((row["case"], row["impl"]), {})[(row["threads"], *row["shape"][1:3])] = row
    for (_, impl), cells in sorted(groups.items(), key=lambda g: (list(CASES).index(g[0][0]), list(IMPLS).index(g[0][1]))):
        row = next(cells[column] for column in columns if column in cells)  # at the largest size
        line = [
            title_of(row),
            IMPLS[impl],
            f"{row['size_mb']:.1f}",
            "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
            f"{row['params_m']:.1f}",
        ]
        line += [f"{row['gmacs_model']:.1f}", "–" if row["miou"] is None else f"{row['miou']:.1f}"]
        lines.append(line + [f"{cells[c]['p50_ms']:.1f} ({cells[c]['p95_ms']:.1f})" if c in cells else "–" for c in columns])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = f"Milliseconds: p50 (p95). Peak MB at the largest size. GMACs at 512×512. {miou_label(rows)}".removesuffix(
        " mIoU on "
    )
    return f"{TABLE_MARK}\n\n**Deployment**\n\n{table}\n\n{note}\n"


def draw(path: pathlib.Path, rows: list[dict], shape: tuple[int, int]):
    """mIoU against latency at one size, with one panel per number of threads. A model's runtimes are joined by a line; models
    without mIoU stand below the axis."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    from paper.report import STYLE
    from pictures import save_figure

    shown = [row for row in rows if tuple(row["shape"][1:3]) == shape and row["runtime"] != "compile"]
    shown = [row for row in shown if row["miou"] is not None or (row["role"] == "torchvision" and row["precision"] == "int8")]
    if not any(row["miou"] is not None for row in shown):
        return print(f"{path}: not drawn, for no row has a mIoU; give result files with --evaluations")
    markers = dict(zip(IMPLS, "oDs^", strict=True))
    threads = sorted({row["threads"] for row in shown})
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(threads), figsize=(10, 4.8), sharex=True, sharey=True, squeeze=False)
        entries, names = {}, list(dict.fromkeys(row["case"] for row in shown if row["miou"] is not None))
        for axis, count in zip(axes.flat, threads, strict=True):
            axis.set(title=f"{count} thread{'s' * (count > 1)}", xscale="log")
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.xaxis.set_minor_formatter("")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_xlabel(f"milliseconds per image of {shape[0]}×{shape[1]} (median)")
            for i, name in enumerate(names):
                line = [row for row in shown if (row["case"], row["threads"]) == (name, count)]
                look = {"color": f"C{i}", "zorder": 3}
                axis.plot([row["p50_ms"] for row in line], [row["miou"] for row in line], linewidth=1, **look)
                for row in line:
                    axis.plot(row["p50_ms"], row["miou"], markers[row["impl"]], **look)
                    entries[IMPLS[row["impl"]]] = Line2D([], [], color="0.4", marker=markers[row["impl"]], linestyle="none")
                entries[title_of(line[0])] = Line2D([], [], color=look["color"])
            for row in (row for row in shown if row["miou"] is None and row["threads"] == count):
                axis.axvline(row["p50_ms"], color="0.6", linestyle=":", linewidth=1)
                look = {"rotation": 90, "va": "top", "ha": "right", "fontsize": 7, "color": "0.4"}
                text = f"{TITLES[row['backbone']]}, int8, not trained"
                axis.text(row["p50_ms"], 0.99, text, transform=axis.get_xaxis_transform(), **look)
        axes[0, 0].set_ylabel(f"{miou_label(shown)}, %")
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=8)
        save_figure(path, figure)
    print(path)


def print_aims(rows: list[dict]):
    """How many times as fast the lightest student in int8 is as the deep teacher in PyTorch and as its rival in int8."""
    times = {cell_of(row): row["p50_ms"] for row in rows}
    for light in (cell for cell in times if cell[:3] == (LIGHT, "onnxruntime", "int8")):
        for other in (light._replace(name=DEEP, runtime="pytorch", precision="fp32"), light._replace(name=RIVAL)):
            if other in times:
                where = f"{light.shape[0]}x{light.shape[1]}, {light.threads} thread(s)"
                times_as_fast = f"{times[other] / times[light]:.2f} times as fast as {other.name}"
                print(f"{where}: {LIGHT} in int8 is {times_as_fast}, {other.runtime} {other.precision}")


def main():
    parser = ArgumentParser(__doc__, usage="python benchmarks/%(prog)s [options]")
    path = {"type": pathlib.Path, "metavar": "FILE"}
    parser.add_argument(
        "--json", default=pathlib.Path("results/deploy.json"), help="result file (default: results/deploy.json)", **path
    )
    parser.add_argument("--table", help="Markdown table (default: tables/deploy.md beside the result file)", **path)
    parser.add_argument(
        "--picture", help="picture of mIoU against latency (default: deploy.png beside the result file)", **path
    )
    parser.add_argument(
        "--evaluations", nargs="+", default=[], help="result files to take the mIoU from (default: none)", **path
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"such as '{LIGHT}' (default: all)")
    parser.add_argument("--calls", type=int, default=60, metavar="N", help="most calls per cell (default: 60)")
    parser.add_argument(
        "--seconds", type=float, default=20, metavar="S", help="time per cell, but at least 30 calls (default: 20)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of --json, and measure those it lacks (default: off)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak_memory(*json.loads(args.peak)))
        return
    table, picture = args.table or args.json.parent / "tables" / "deploy.md", args.picture or args.json.with_name("deploy.png")
    refuse_outputs([("--json", args.json), ("--table", table), ("--picture", picture)], args.evaluations, args.overwrite)
    if unknown := set(args.cases or []) - set(CASES):
        raise UserError(f"--cases '{min(unknown)}': choose of {', '.join(CASES)}")
    onnx_model.require("onnx", "onnxscript", "onnxruntime")
    began = time.perf_counter()
    rows = read_rows(args.json) if args.resume and args.json.exists() else []
    if any(row.get("case") not in CASES for row in rows):
        raise UserError(f"--resume: {args.json} holds rows of other models; leave --resume out, or give another --json")
    add_miou(rows, args.evaluations)  # before any work
    measured = {cell_of(row) for row in rows}
    cells = [
        Cell(name, runtime, precision, threads, shape)
        for threads in THREADS
        for shape in SHAPES
        for name in args.cases or CASES
        for runtime, precision in RUNTIMES
        if runtime != "compile" or (shape, threads) == COMPILED
    ]
    with tempfile.TemporaryDirectory() as folder:
        for new in measure([cell for cell in cells if cell not in measured], pathlib.Path(folder), args.calls, args.seconds):
            rows += new
            add_miou(rows, args.evaluations)
            write_result(args.json, "deployment", rows, time.perf_counter() - began, "torch")  # a stop loses one group
    write_result(args.json, "deployment", rows, time.perf_counter() - began, "torch")
    write_text(table, markdown(rows))
    draw(picture, rows, SHAPES[-1])
    print_aims(rows)
    print(f"results: {args.json}, {table} ({os.cpu_count()} cores)")


if __name__ == "__main__":
    cli(main)
