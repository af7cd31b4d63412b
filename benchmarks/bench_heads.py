"""What do whole students cost with wide, narrow and depthwise separable heads?

    python benchmarks/bench_heads.py      # writes results/heads-DEVICE.json
    python benchmarks/bench_heads.py --device cpu --json heads.json

A 256-channel head costs more than the backbones it sits on. For both students
and each head this measures parameters, GMACs of the whole model, and the
latency of one 512x512 image up to the classifier, in float32 and with batch
norm folded. The models take turns, round by round, so that drift affects all
alike. The mIoU of these students comes from `make matrix TABLES=heads`.
"""

import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from device_name import device_slug

import models
from common import ArgumentParser, cli
from result_files import refuse_outputs, write_result

SIZE, CLASSES = 512, 21
STUDENTS = ("resnet18", "mobilenetv2")
HEADS = [(width, separable) for separable in (False, True) for width in (256, 128, 64)]


def main():
    parser = ArgumentParser(__doc__, usage="python benchmarks/%(prog)s [options]")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="result file (default: results/heads-DEVICE.json)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"],
        help="where to measure (default: cuda where there is one)",
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timed rounds (default: 15)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    args = parser.parse_args()
    path = args.json or pathlib.Path("results", f"heads-{device_slug(args.device)}.json")
    refuse_outputs([("--json", path)], [], args.overwrite)
    began, device = time.perf_counter(), torch.device(args.device)
    image = torch.randn(1, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    nets, rows = {}, {}
    for backbone in STUDENTS:
        for width, separable in HEADS:
            model = models.build_model(backbone, CLASSES, head_width=width, separable_head=separable).eval()
            folded = models.fold_batch_norm(model)
            with torch.inference_mode():  # checked before it is timed, on the CPU, since a GPU's float32 may be TF32
                torch.testing.assert_close(folded(image).logits, model(image).logits, rtol=1e-3, atol=1e-3)
            cost = models.measure(backbone, "standard", width, separable, CLASSES)
            name = f"{backbone} {'separable ' if separable else ''}{width}"
            nets[name] = folded.to(device)
            rows[name] = {
                "case": name,
                "impl": "folded",
                "device": args.device,
                "dtype": "float32",
                "pass": "fwd",
                "memory_format": "channels_last",
                "shape": list(image.shape),
                "backbone": backbone,
                "head_width": width,
                "separable_head": separable,
                "params_m": cost["model_params_m"],
                "gmacs_backbone": cost["gmacs_512"],
                "gmacs_model": cost["model_gmacs_512"],
            }
    image, times = image.to(device), {name: [] for name in nets}
    with torch.inference_mode():
        for i in range(2 + args.rounds):
            for name, net in nets.items():
                start = time.perf_counter()
                net(image)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if i >= 2:
                    times[name].append(1e3 * (time.perf_counter() - start))
    print(f"{'student and head':28} {'params M':>8} {'GMACs':>6} {'ms':>7}")
    for name, row in rows.items():
        quantiles = torch.tensor(times[name]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), quantiles, strict=True))
        print(f"{name:28} {row['params_m']:8.2f} {row['gmacs_model']:6.1f} {row['p50_ms']:7.1f}")
    write_result(path, "students by head", list(rows.values()), time.perf_counter() - began, "torch")
    print(f"results: {path} ({os.cpu_count()} cores)")


if __name__ == "__main__":
    cli(main)
