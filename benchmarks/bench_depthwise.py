"""How much faster than PyTorch's are the gradients of depthwise.py on a CPU?

    python benchmarks/bench_depthwise.py   # writes results/depthwise-cpu.json
    python benchmarks/bench_depthwise.py --rounds 3 --json depthwise.json

One forward and backward of 8 crops of 192x256, the labeled images of a step on
CamVid, in bfloat16, with PyTorch's gradients and with ours. The gradients are
compared before they are timed. All cases take turns, round by round, so that
drift affects all alike.
"""

import copy
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch

import depthwise
import models
from common import ArgumentParser, autocast, cli
from result_files import refuse_outputs, write_result

SHAPE, CLASSES, CPU = (8, 3, 192, 256), 11, torch.device("cpu")
NETWORKS = [("mobilenetv2", 64, True), ("efficientnet_lite0", 64, True), ("efficientnet_lite2", 256, False)]


def gradient(network, images):
    """Of the mean square of the logits, with respect to all weights, in one vector."""
    network.zero_grad()
    with autocast(CPU, "bf16"):
        logits = network(images).logits
    logits.square().mean().backward()
    return torch.cat([weight.grad.flatten() for weight in network.parameters()])


def main():
    parser = ArgumentParser(__doc__, usage="python benchmarks/%(prog)s [options]")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="result file (default: results/depthwise-cpu.json)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    args = parser.parse_args()
    path = args.json or pathlib.Path("results", "depthwise-cpu.json")
    refuse_outputs([("--json", path)], [], args.overwrite)
    began = time.perf_counter()
    torch.manual_seed(0)
    images = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    cases, rows, times = {}, {}, {}
    for backbone, width, separable in NETWORKS:
        network = models.build_model(backbone, CLASSES, head_width=width, separable_head=separable).train()
        networks = {"pytorch": network, "here": depthwise.speed_up(copy.deepcopy(network), CPU)}
        theirs, ours = (gradient(each, images) for each in networks.values())
        difference = float((ours - theirs).norm() / theirs.norm())
        assert difference < 0.05, f"{backbone}: {difference}"
        for impl, each in networks.items():
            key = backbone, impl
            cases[key], times[key] = each, []
            rows[key] = {
                "case": f"{backbone} {'separable ' if separable else ''}{width}",
                "impl": impl,
                "device": "cpu",
                "dtype": "bfloat16",
                "pass": "fwd+bwd",
                "memory_format": "channels_last",
                "shape": list(SHAPE),
                "difference": difference,
            }
    for _ in range(args.rounds):
        for key, network in cases.items():
            start = time.perf_counter()
            gradient(network, images)
            times[key].append(1e3 * (time.perf_counter() - start))
    print(f"{'network, head':34} {'PyTorch':>8} {'here':>8}  (ms)")
    for key, row in rows.items():
        quantiles = torch.tensor(times[key]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), quantiles, strict=True))
    for (backbone, impl), row in rows.items():
        if impl == "here":
            print(f"{row['case']:34} {rows[backbone, 'pytorch']['p50_ms']:8.0f} {row['p50_ms']:8.0f}")
    write_result(path, "gradients of depthwise convolutions", list(rows.values()), time.perf_counter() - began, "torch")
    print(f"results: {path} ({torch.get_num_threads()} threads of {os.cpu_count()} cores)")


if __name__ == "__main__":
    cli(main)
