"""How fast are cross entropies and pseudo labels of upsampled logits, and how
much memory do they take?

    python benchmarks/bench_upsample_loss.py    # upsample-loss-DEVICE.json
    python benchmarks/bench_upsample_loss.py --no-compile --json upsample.json

A step's losses at full resolution: coarse logits, a quarter of the labels'
size, against three label maps, as distill.py has them on labeled images. The
reference interpolates and then takes the cross entropies; `compile` is
torch.compile of it. Losses and gradients of compile and native are first
checked against the reference in float64, and pseudo labels wherever the best
two classes differ. Then all are timed in turn, as in bench_region_loss.py.
"""

import os
import pathlib
import sys
import time

if __name__ == "__main__" and os.environ.get("MALLOC_MMAP_MAX_") != "0":  # as in bench_region_loss.py
    environment = {**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "KINETO_LOG_LEVEL": "99"}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from bench_region_loss import FORMATS, peak_mb, timed_cpu, timed_cuda
from device_name import device_slug

import kernels
import mgd_ops
from common import ArgumentParser, UserError, cli
from result_files import refuse_outputs, write_result

CASES = {  # (B, N, H, W) at full size
    "cpu": {"demo": (8, 6, 48, 48), "voc 512": (4, 21, 512, 512)},
    "cuda": {"demo": (8, 6, 48, 48), "voc 512": (8, 21, 512, 512), "cityscapes 800": (8, 19, 800, 800)},
}
MAPS = 3
THRESHOLD = 0.5  # of the pseudo labels that have one


def draw(shape, form, device):
    """Coarse logits (B, N, H/4, W/4), and label maps (B, H, W) that have regions as real ones do, and pixels without label."""
    batch, classes, height, width = shape
    logits = 3 * torch.randn(batch, classes, height // 4, width // 4, device=device)
    labels = []
    for _ in range(MAPS):
        label = mgd_ops.upsampled_argmax(torch.randn(batch, classes, 12, 12, device=device), (height, width))
        label[:, : height // 20] = 255
        labels.append(label)
    return logits.contiguous(memory_format=FORMATS[form]).requires_grad_(), labels


def gradient(function, logits, labels):
    return torch.autograd.grad(sum(function(logits, labels)), logits)[0]


def check_losses(function, logits, labels, name):
    """Losses and gradient against the reference in float64, image by image, which takes less memory."""
    counts = [(label != 255).sum() for label in labels]
    off = 0.0
    exact = torch.zeros(len(labels), dtype=torch.float64, device=logits.device)
    grad = gradient(function, logits, labels)
    for b in range(len(logits)):
        image, maps = logits[b, None].detach().double().requires_grad_(), [label[b, None] for label in labels]
        losses = torch.stack(mgd_ops.pixel_cross_entropies_reference(image, maps, counts))
        expected = torch.autograd.grad(losses.sum(), image)[0]
        off = max(off, float((grad[b] - expected).abs().max() / expected.abs().max()))
        exact += losses.detach()
    with torch.no_grad():
        wrong = float((torch.stack(function(logits, labels)) / exact - 1).abs().max())
    if wrong > 1e-5 or off > 1e-4:
        raise UserError(f"{name}: wrong by {wrong:.1e} (losses), {off:.1e} (gradient)")


def check_argmax(logits, size, name):
    for image in logits.detach().split(1):
        full = mgd_ops.upsample(image.double(), size)
        best = full.topk(2, 1).values
        probability = full.softmax(1).amax(1)
        for threshold in (0.0, THRESHOLD):
            sure = (best[:, 0] - best[:, 1] > 1e-3) & ((probability - threshold).abs() > 1e-3)
            expected = torch.where(probability < threshold, 255, full.argmax(1))
            if not torch.equal(mgd_ops.upsampled_argmax(image, size, threshold)[sure], expected[sure]):
                raise UserError(f"{name}: wrong pseudo labels")


def bench(device, case, shape, form, rounds, with_compile) -> list[dict]:
    logits, labels = draw(shape, form, device)
    size = tuple(shape[2:])
    losses = {"reference": mgd_ops.pixel_cross_entropies_reference, "native": mgd_ops.pixel_cross_entropies}
    if with_compile:
        torch._dynamo.reset()
        losses["compile"] = torch.compile(mgd_ops.pixel_cross_entropies_reference, dynamic=False)
    for name, function in losses.items():
        if name != "reference":
            check_losses(function, logits, labels, f"{case} {form} {name}")
    check_argmax(logits, size, f"{case} {form}")

    def forward(function):
        def call(_):
            with torch.no_grad():
                function(logits, labels)

        return call

    def both(function):
        return lambda _: gradient(function, logits, labels)

    argmaxes = {"reference": mgd_ops.upsampled_argmax_reference, "native": mgd_ops.upsampled_argmax}
    passes = [
        (case, "fwd", {impl: forward(function) for impl, function in losses.items()}),
        (case, "fwd+bwd", {impl: both(function) for impl, function in losses.items()}),
    ]
    for threshold, name in ((0.0, "labels"), (THRESHOLD, f"labels above {THRESHOLD}")):
        functions = {impl: lambda _, f=f, t=threshold: f(logits.detach(), size, t) for impl, f in argmaxes.items()}
        passes.append((f"{case}, {name}", "fwd", functions))
    rows = []
    for title, name, functions in passes:
        # inputs need not rotate on a GPU: the reference's large logits leave nothing of them in its cache
        times = timed_cuda(functions, rounds, 1) if device == "cuda" else timed_cpu(functions, rounds)
        for impl, function in functions.items():
            p20, p50, p80 = (float(torch.tensor(times[impl]).quantile(q)) for q in (0.2, 0.5, 0.8))
            rows.append(
                {
                    "case": title,
                    "impl": impl,
                    "device": device,
                    "dtype": "float32",
                    "memory_format": form,
                    "shape": list(shape),
                    "pass": name,
                    "p20_ms": p20,
                    "p50_ms": p50,
                    "p80_ms": p80,
                    "peak_mb": peak_mb(function, device),
                }
            )
    return rows


def print_table(rows):
    print("case                         format         pass     reference   compile    native  ref/native MB reference native")
    cells = {}
    for row in rows:
        cells.setdefault((row["case"], row["memory_format"], row["pass"]), {})[row["impl"]] = row
    for (case, form, name), impls in cells.items():
        reference, compiled, native = (impls.get(i, {}).get("p50_ms", float("nan")) for i in ("reference", "compile", "native"))
        print(
            f"{case:28} {form:14} {name:8} {reference:9.2f} {compiled:9.2f} {native:9.2f}{reference / native:11.1f}x"
            f"{impls['reference']['peak_mb']:13.1f} {impls['native']['peak_mb']:6.1f}"
        )


def main():
    parser = ArgumentParser(__doc__, usage="python benchmarks/%(prog)s [options]")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="result file (default: results/upsample-loss-DEVICE.json)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"],
        help="where to measure (default: cuda where there is one)",
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timed rounds (default: 15)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out (default: off)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    args = parser.parse_args()
    path = args.json or pathlib.Path("results", f"upsample-loss-{device_slug(args.device)}.json")
    refuse_outputs([("--json", path)], [], args.overwrite)
    os.environ["MGD_OPS"] = "native"
    kernels.load_kernels()
    torch.manual_seed(0)
    began = time.perf_counter()
    rows = []
    for case, shape in CASES[args.device].items():
        for form in FORMATS:
            rows += bench(args.device, case, shape, form, args.rounds, args.compile)
    print_table(rows)
    write_result(path, "upsample loss", rows, time.perf_counter() - began, kernels.backend())
    print(f"results: {path}")


if __name__ == "__main__":
    cli(main)
