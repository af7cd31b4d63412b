"""How long does a training step take, against the released procedure, and where
does the time go?

    python benchmarks/bench_step.py      # writes results/step-DEVICE.json
    python benchmarks/bench_step.py --cases 'distill r18 128' --json step.json

The released procedure is written out below, from the paper's code: float32
(TF32 convolutions on GPUs, PyTorch's default), cudnn.benchmark, all networks
in training mode, eight teacher and four student forwards per labeled image,
eleven cross entropies of which only those of the student's own logits can give
a gradient, and every term read on the host. This project's steps follow the
loops of distill.py and train_teacher.py, and call what these call. Both see
the same models, batch and crop, drawn on the device. Each variant runs in a
process of its own. On the CPU `peak_mb` is the resident memory above that
after models and optimizer are built.
"""

import argparse
import ctypes
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from device_name import device_slug
from torch.utils.flop_counter import FlopCounterMode

import batches
import distill
import distill_losses
import kernels
import mgd_ops
import models
from common import ArgumentParser, UserError, autocast, cli, parameter_groups, pick_precision
from pictures import save_figure
from result_files import refuse_outputs, write_result

# stage and student, crop, labeled images per step, classes
CASES = {
    "cuda": {
        "distill r18 512": ("resnet18", 512, 8, 21),
        "distill mbv2 512": ("mobilenetv2", 512, 8, 21),
        "distill r18 800": ("resnet18", 800, 8, 19),
        "distill mbv2 800": ("mobilenetv2", 800, 8, 19),
        "cps r101 512": ("resnet101", 512, 8, 21),
        "cps wr34 512": ("wide_resnet34", 512, 8, 21),
    },
    "cpu": {
        "distill r18 128": ("resnet18", 128, 8, 21),
        "distill mbv2 128": ("mobilenetv2", 128, 8, 21),
        "cps r18 128": ("resnet18", 128, 8, 21),
    },
}
ARMS = {"distill": ["released", "ours", "ours: clean", "ours: compile"], "cps": ["released", "ours"]}
LR = 0.0025
LOSSES = ["sup", "pixel", "image:T_D", "region:T_W"]
WEIGHTS = {"sup": 1.0, "pixel_l": 1.0, "pixel_u": 1.0, "image": 0.002, "region": 100.0}  # of Eq. 7


class Variant(NamedTuple):
    precision: str
    mixed_terms: str


# ---- the released procedure, in words of its description ----


def full(net, images):
    """The network's output with logits at the size of the images, where the released code takes its losses."""
    logits, features = net(images)
    return models.Output(mgd_ops.upsample(logits, images.shape[-2:]), features)


def released_distill(nets, optimizer, batch):
    """One step; returns its terms, as read on the host."""
    student, deep, wide = nets
    images, label, u0, u1, box = batch
    mixed = torch.where(box, u1, u0)
    with torch.no_grad():
        pseudo = {}
        for name, net in (("student", student), ("wide", wide), ("deep", deep)):
            logits = torch.where(box, full(net, u1).logits, full(net, u0).logits)
            pseudo[name] = logits.argmax(1)
    student_mixed = full(student, mixed)
    student_labeled = full(student, images)
    with torch.no_grad():
        wide_mixed, deep_mixed = full(wide, mixed), full(deep, mixed)
        wide_labeled, deep_labeled = full(wide, images), full(deep, images)
    entropy = F.cross_entropy
    on_mixed = entropy(student_mixed.logits, pseudo["wide"]) + entropy(student_mixed.logits, pseudo["deep"])
    unused = entropy(wide_mixed.logits, pseudo["student"]) + entropy(deep_mixed.logits, pseudo["student"])
    on_labeled = entropy(student_labeled.logits, wide_labeled.logits.argmax(1)) + entropy(
        student_labeled.logits, deep_labeled.logits.argmax(1)
    )
    own = student_labeled.logits.argmax(1)
    unused += entropy(wide_labeled.logits, own) + entropy(deep_labeled.logits, own)
    supervised = entropy(student_labeled.logits, label, ignore_index=255)
    unused += entropy(wide_labeled.logits, label, ignore_index=255) + entropy(deep_labeled.logits, label, ignore_index=255)
    image = (student_mixed.logits.mean((2, 3)) - deep_mixed.logits.mean((2, 3))).abs().sum()
    region = mgd_ops.region_loss_reference(student_mixed.features, wide_mixed.features)
    loss = supervised + on_labeled + on_mixed + 0.001 * image + 100 * region + 0 * unused
    terms = {"sup": supervised, "pixel_l": on_labeled, "pixel_u": on_mixed, "image": image, "region": region}
    terms = {name: float(term.detach()) for name, term in terms.items()}
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return terms


def released_cps(nets, optimizer, batch):
    """Cross pseudo supervision as published: float32, each batch by itself."""
    images, label, u0, u1, box = batch
    with torch.no_grad():
        pseudo = [torch.where(box, full(net, u1).logits, full(net, u0).logits).argmax(1) for net in nets]
    mixed = torch.where(box, u1, u0)
    on_mixed = [full(net, mixed).logits for net in nets]
    on_labeled = [full(net, images).logits for net in nets]
    cps = F.cross_entropy(on_mixed[0], pseudo[1]) + F.cross_entropy(on_mixed[1], pseudo[0])
    supervised = sum(F.cross_entropy(logits, label, ignore_index=255) for logits in on_labeled)
    optimizer.zero_grad()
    (supervised + cps).backward()
    optimizer.step()
    return {"sup": float(supervised.detach()), "cps": float(cps.detach())}


# ---- this project's steps, after the loops of distill.py and train_teacher.py ----


def as_batch(images, label, u0, u1, box):
    """The micro-batch that `batches.step_batches` would make of these images."""
    views = torch.cat([u0, u1])
    ignore = torch.zeros(len(views), *label.shape[1:], dtype=torch.bool, device=label.device)
    mixed, mixed_ignore = batches.cutmix(views, box), batches.cutmix(ignore, box)
    return batches.Batch(images, label, views, ignore, mixed, mixed_ignore, box)


def our_distill(nets, optimizer, batch, args, clock=lambda name: None):
    """One step; returns its terms, on the device. `clock(name)` is called at the end of each part."""
    student, deep, wide = nets
    images, label, u0, u1, box = batch
    micro_batch, device = as_batch(images, label, u0, u1, box), images.device
    optimizer.zero_grad(set_to_none=True)
    with autocast(device, args.precision):
        teachers = {
            role: distill.teacher_outputs(
                teacher,
                micro_batch,
                distill_losses.needed_outputs("mgd", LOSSES, role),
                mixed_terms=args.mixed_terms,
            )
            for role, teacher in (("T_D", deep), ("T_W", wide))
        }
    normalizer = batches.valid_pixels([[label == 255, micro_batch.mixed_ignore]])
    clock("teachers")
    with autocast(device, args.precision):
        outputs = student(images), student(micro_batch.mixed)
    clock("student forward")
    terms = distill_losses.mgd_losses(*outputs, micro_batch, teachers, normalizer, losses=LOSSES, ohem=False)
    terms["loss"] = distill_losses.weighted_sum(terms, WEIGHTS)
    clock("losses")
    terms["loss"].backward()
    clock("backward")
    optimizer.step()
    clock("optimizer")
    return {name: term.detach() for name, term in terms.items()}


def our_cps(nets, optimizer, batch, args, clock=lambda name: None):
    images, label, u0, u1, box = batch
    views, device = torch.cat([u0, u1]), images.device
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad(), autocast(device, args.precision):
        labels = [mgd_ops.upsampled_argmax(net(views).logits, label.shape[1:]) for net in nets]
    pseudo = [batches.cutmix(each, box) for each in labels]
    mixed = batches.cutmix(views, box)
    clock("pseudo labels")
    terms = {"sup": 0.0, "cps": 0.0}
    for i, net in enumerate(nets):
        with autocast(device, args.precision):
            logits = net(images).logits
        sup = mgd_ops.pixel_cross_entropy(logits, label)
        with autocast(device, args.precision):
            logits = net(mixed).logits
        cps = mgd_ops.pixel_cross_entropy(logits, pseudo[1 - i])
        clock("student forward")
        (sup + cps).backward()
        clock("backward")
        terms = {"sup": terms["sup"] + sup.detach(), "cps": terms["cps"] + cps.detach()}
    optimizer.step()
    clock("optimizer")
    return terms


# ---- measuring ----


def draw_batch(batch, crop, classes, device, channels_last):
    generator = torch.Generator().manual_seed(0)
    images, u0, u1 = (torch.randn(batch, 3, crop, crop, generator=generator).to(device) for _ in range(3))
    if channels_last:
        images, u0, u1 = (x.contiguous(memory_format=torch.channels_last) for x in (images, u0, u1))
    label = torch.randint(classes, (batch, crop, crop), generator=generator).to(device)
    return images, label, u0, u1, batches.cutmix_mask(batch, (crop, crop), 0).to(device)


def make_variant(stage, backbone, crop, batch, classes, impl, device):
    """(step, clocked step, unit of labeled images): functions without arguments that run one step."""
    torch.manual_seed(0)
    ours = impl != "released"
    args = Variant(pick_precision(None, device), "clean" if impl == "ours: clean" else "mixed")
    names = [backbone, "resnet101", "wide_resnet34"] if stage == "distill" else [backbone] * 2
    nets = [models.build_model(name, classes).to(device).train() for name in names]
    if not ours:
        nets = [net.to(memory_format=torch.contiguous_format) for net in nets]
    trained = nets[:1] if stage == "distill" else nets
    groups = [group for net in trained for group in parameter_groups(net, 5e-4)]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, **({"fused": True} if ours else {}))
    if stage == "distill":
        for net in nets[1:]:
            net.requires_grad_(False)
        if ours:
            nets[1:] = [models.fold_batch_norm(net, args.precision) for net in nets[1:]]
    if impl == "ours: compile":
        nets = [torch.compile(net, dynamic=False) for net in nets]
    data = draw_batch(batch, crop, classes, device, ours)
    if not ours:
        step = released_distill if stage == "distill" else released_cps
        return lambda: step(nets, optimizer, data), None
    step = our_distill if stage == "distill" else our_cps
    return (lambda: step(nets, optimizer, data, args)), lambda clock: step(nets, optimizer, data, args, clock)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident_mb(field: str) -> float:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1e3
    return float("nan")


def measure(stage, backbone, crop, batch, classes, impl, device, steps) -> list[dict]:
    """The rows of one variant, in this process."""
    device = torch.device(device)
    torch.backends.cudnn.benchmark = True  # as the training scripts have it
    if impl != "released":
        kernels.load_kernels()
    step, clocked = make_variant(stage, backbone, crop, batch, classes, impl, device)
    if device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(
            0
        )  # memory that the building left free goes back to the system, and so is counted when it is used
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
        before = resident_mb("VmRSS")
    step()
    step()
    if device.type == "cuda":  # without what cudnn's search took
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    times = []
    for _ in range(steps):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else resident_mb("VmHWM")
    gflops = None
    if impl != "ours: compile":  # the counter sees eager ops
        with FlopCounterMode(display=False) as counter:
            step()
        gflops = counter.get_total_flops() / 1e9
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    low = impl != "released" and pick_precision(None, device) == "bf16"
    common = {
        "impl": impl,
        "device": device.type,
        "dtype": "bfloat16" if low else "float32",
        "memory_format": "contiguous" if impl == "released" else "channels_last",
        "shape": [batch, 3, crop, crop],
        "classes": classes,
    }
    rows = [
        {
            **common,
            "pass": "step",
            "p20_ms": p20,
            "p50_ms": p50,
            "p80_ms": p80,
            "peak_mb": peak - before,
            "images_per_s": 1e3 * batch / p50,
            "gflops": gflops,
        }
    ]
    if clocked and impl == "ours":
        parts = {}

        def clock(name):
            nonlocal last
            synchronize(device)
            now = time.perf_counter()
            parts[name] = parts.get(name, 0.0) + 1e3 * (now - last)
            last = now

        rounds = max(2, steps // 2)
        for _ in range(rounds):
            synchronize(device)
            last = time.perf_counter()
            clocked(clock)
        rows += [{**common, "pass": name, "p50_ms": total / rounds} for name, total in parts.items()]
    return rows


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Measured TFLOP/s of large matrix products."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize(torch.device(device))
        began = time.perf_counter()
        a @ b
        synchronize(torch.device(device))
        times.append(time.perf_counter() - began)
    return 2 * n**3 / sorted(times)[len(times) // 2] / 1e12


def in_own_process(stage, backbone, crop, batch, classes, impl, device, steps) -> list[dict]:
    spec = json.dumps([stage, backbone, crop, batch, classes, impl, device, steps])
    done = subprocess.run([sys.executable, __file__, "--variant", spec], capture_output=True, text=True, check=False)
    if done.returncode:
        print(
            f"{stage} {backbone} {crop} {impl}: failed: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}",
            file=sys.stderr,
        )
        return []
    return json.loads(done.stdout.strip().splitlines()[-1])


def draw_curves(path, device, rows):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, what in zip(axes, ("crop", "batch", "classes"), strict=True):
        for impl in ("released", "ours"):
            points = sorted((row[what], row["p50_ms"]) for row in rows if row["curve"] == what and row["impl"] == impl)
            axis.plot(*zip(*points, strict=True), "o-", label=impl)
        axis.set(xlabel=what, ylim=(0, None))
    axes[0].set_ylabel(f"ms per step ({device})")
    axes[0].legend(frameon=False)
    save_figure(path, figure)


def main():
    parser = ArgumentParser(__doc__, usage="python benchmarks/%(prog)s [options]")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="result file (default: results/step-DEVICE.json)")
    curves = "write a picture of the cost against crop, batch and classes (default: none)"
    parser.add_argument("--curves", type=pathlib.Path, metavar="PNG", help=curves)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"],
        help="where to measure (default: cuda where there is one)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="timed steps per variant (default: 30 on a GPU, 5 on the CPU)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="such as 'distill r18 512' (default: all)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (default: off)")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    args = parser.parse_args()
    if args.variant:
        os.environ["MGD_OPS"] = "native"  # or fail
        print(json.dumps(measure(*json.loads(args.variant))))
        return
    path = args.json or pathlib.Path("results", f"step-{device_slug(args.device)}.json")
    refuse_outputs([("--json", path), ("--curves", args.curves)], [], args.overwrite)
    unknown = set(args.cases or []) - set(CASES[args.device])
    if unknown:
        raise UserError(f"--cases '{min(unknown)}': choose of {', '.join(CASES[args.device])}")
    began, device = time.perf_counter(), args.device
    steps = args.steps or (30 if device == "cuda" else 5)
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions are by default
    rates = {dtype: matrix_rate(device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    print(", ".join(f"{dtype} matrix products {rate:.2f} TFLOP/s" for dtype, rate in rates.items()))
    print(f"{'case':18} {'impl':14} {'ms':>8} {'images/s':>9} {'speedup':>8} {'peak MB':>8} {'GFLOP':>7} {'of peak':>8}")
    rows = []
    for case in args.cases or CASES[device]:
        stage, backbone, first = case.split()[0], CASES[device][case], None
        for impl in ARMS[stage]:
            if impl == "ours: compile" and args.no_compile:
                continue
            for row in in_own_process(stage, *backbone, impl, device, steps):
                row = {"case": case, **row}
                rows.append(row)
                if row["pass"] != "step":
                    print(f"{'':18} {'':14} {row['p50_ms']:8.1f} {row['pass']}")
                    continue
                first = first or row
                row["speedup"] = row["images_per_s"] / first["images_per_s"] if first["impl"] == "released" else None
                rate = rates[row["dtype"]]
                counted = ""
                if row["gflops"]:
                    row["matrix_tflops"], row["utilisation"] = rate, row["gflops"] / row["p50_ms"] / rate
                    counted = f"{row['gflops']:7.0f} {row['utilisation']:7.1%}"
                print(
                    f"{case:18} {impl:14} {row['p50_ms']:8.1f} {row['images_per_s']:9.2f} {row['speedup'] or 0:7.2f}x "
                    f"{row['peak_mb']:8.0f} {counted}"
                )
    if args.curves:
        base = ("resnet18", *((512, 8, 21) if device == "cuda" else (128, 4, 21)))
        values = {"crop": (256, 512, 768) if device == "cuda" else (64, 96, 128), "batch": (2, 4, 8), "classes": (2, 21, 80)}
        points = []
        for place, (what, steps_of) in enumerate(values.items(), 1):
            for value in steps_of:
                for impl in ("released", "ours"):
                    setting = [*base[:place], value, *base[place + 1 :]]
                    for row in in_own_process("distill", *setting, impl, device, max(2, steps // 2))[:1]:
                        points.append({**row, "case": f"curve {what} {value}", "pass": "curve", "curve": what, what: value})
        draw_curves(args.curves, device, points)
        rows += points
        print(f"curves: {args.curves}")
    write_result(path, "training step", rows, time.perf_counter() - began, "native")
    print(f"results: {path} ({os.cpu_count()} cores)")


if __name__ == "__main__":
    cli(main)
