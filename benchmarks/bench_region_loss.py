"""How fast is the region loss, and how close to the lower bound?

    python benchmarks/bench_region_loss.py    # results/region-loss-DEVICE.json
    python benchmarks/bench_region_loss.py --no-compile --json region.json

For every shape, dtype and memory format the native op and torch.compile of the
reference are first checked against the reference in float64. Then reference,
compile and native are timed in turn, round by round, so that drift affects all
alike.

The lower bound (`floor`) is what every implementation must do: read both
feature maps once (fwd), and write one gradient (fwd+bwd). It is measured in
the same run, as sums over and a fill of buffers of the same size. On the CPU
the process keeps its pages, since otherwise the operating system's work on
fresh pages is measured; for that the script restarts itself. On a GPU the
times are those of CUDA-graph replays over rotating inputs larger than the
cache.
"""

import os
import pathlib
import sys
import time

if __name__ == "__main__" and os.environ.get("MALLOC_MMAP_MAX_") != "0":
    environment = {**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33), "KINETO_LOG_LEVEL": "99"}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from device_name import device_slug

import kernels
import mgd_ops
from common import ArgumentParser, UserError, cli
from result_files import refuse_outputs, write_result

CASES = {  # (B, C, H, W) of student and teacher
    "cpu": {"demo": (8, 64, 12, 12), "128": (4, 256, 128, 128)},
    "cuda": {"demo": (8, 64, 12, 12), "voc 512": (8, 256, 128, 128), "cityscapes 800": (8, 256, 200, 200)},
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CACHE = 2**28  # bytes of inputs to rotate over on a GPU, well above its cache


def timed_cpu(functions: dict, rounds: int) -> dict:
    """Milliseconds of each function in each round; the functions take turns."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function(0), function(0)
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function(0)
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def timed_cuda(functions: dict, rounds: int, rotation: int) -> dict:
    """As `timed_cpu`: device time of one call, from replays of a graph that calls the function on each rotating input."""
    graphs, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(rotation):
                function(i)
        stream.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for i in range(rotation):
                function(i)
        graphs[name].replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / rotation)
    return times


def peak_mb(function, device) -> float:
    """MB that one call allocates at its peak, beyond what was there before."""
    function(0)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(0)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(0)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 1e6


def check_loss(function, student, teacher, name):
    """Loss and gradient within the tolerance of the dtype, against the reference in float64."""
    got = student.detach().requires_grad_()
    loss = function(got, teacher)
    loss.backward()
    exact = student.detach().double().requires_grad_()
    expected = mgd_ops.region_loss_reference(exact, teacher.double())
    expected.backward()
    rtol = {torch.float32: 1e-3, torch.bfloat16: 2e-2}[student.dtype]
    loss, expected = loss.detach(), expected.detach()
    off = (got.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    if abs(loss - expected) > 1e-3 * expected or off > rtol:
        raise UserError(f"{name}: wrong by {float(abs(loss - expected) / expected):.1e} (loss), {float(off):.1e} (gradient)")


def bandwidths(device) -> dict:
    """GB/s of reading and of copying a large buffer on this device."""
    x, y = torch.rand(2**26, device=device), torch.empty(2**26, device=device)
    functions = {"read": lambda _: x.sum(), "copy": lambda _: y.copy_(x)}
    times = timed_cuda(functions, 20, 1) if device == "cuda" else timed_cpu(functions, 20)
    bytes_moved = {"read": x.nbytes, "copy": 2 * x.nbytes}
    return {name: bytes_moved[name] / sorted(t)[len(t) // 2] / 1e6 for name, t in times.items()}


def features(shape, device, dtype, form):
    """Features with regions that differ, as real ones do: coarse random structure under fine noise."""
    coarse = torch.randn(*shape[:2], 8, 8, device=device)
    feat = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear") + torch.rand(shape, device=device)
    return feat.to(dtype).contiguous(memory_format=FORMATS[form])


def bench(device, case, shape, dtype, form, rounds, with_compile) -> list[dict]:
    bytes_each = torch.Size(shape).numel() * dtype.itemsize
    rotation = 1 if device == "cpu" else max(1, -(-CACHE // (2 * bytes_each)))
    inputs = [[features(shape, device, dtype, form) for _ in range(2)] for _ in range(rotation)]
    for student, _ in inputs:
        student.requires_grad_()
    grads = [torch.empty_like(student) for student, _ in inputs]
    flat = [[t.detach().as_strided((t.numel(),), (1,)).view(torch.float32) for t in pair] for pair in inputs]
    flat_grads = [g.as_strided((g.numel(),), (1,)).view(torch.float32) for g in grads]

    losses = {"reference": mgd_ops.region_loss_reference, "native": mgd_ops.region_loss}
    if with_compile:
        torch._dynamo.reset()
        losses["compile"] = torch.compile(mgd_ops.region_loss_reference, dynamic=False)
    for name, loss in losses.items():
        if name != "reference":
            check_loss(loss, *inputs[0], f"{case} {dtype} {form} {name}")

    def forward(loss):
        def call(i):
            with torch.no_grad():
                loss(*inputs[i])

        return call

    def both(loss):
        return lambda i: torch.autograd.grad(loss(*inputs[i]), inputs[i][0])

    floors = {
        "fwd": lambda i: [t.sum() for t in flat[i]],
        "fwd+bwd": lambda i: [*(t.sum() for t in flat[i]), flat_grads[i].zero_()],
    }
    rows = []
    for name, wrap in (("fwd", forward), ("fwd+bwd", both)):
        functions = {**{impl: wrap(loss) for impl, loss in losses.items()}, "floor": floors[name]}
        times = timed_cuda(functions, rounds, rotation) if device == "cuda" else timed_cpu(functions, rounds)
        quantile = {impl: [float(torch.tensor(t).quantile(q)) for q in (0.2, 0.5, 0.8)] for impl, t in times.items()}
        for impl in losses:
            p20, p50, p80 = quantile[impl]
            rows.append(
                {
                    "case": case,
                    "impl": impl,
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "memory_format": form,
                    "shape": list(shape),
                    "pass": name,
                    "p20_ms": p20,
                    "p50_ms": p50,
                    "p80_ms": p80,
                    "peak_mb": peak_mb(functions[impl], device),
                    "floor_ms": quantile["floor"][1],
                    "bytes": (2 if name == "fwd" else 3) * bytes_each,
                }
            )
    return rows


def print_table(rows):
    print("case            dtype     format         pass     reference   compile    native     floor  ref/native  native/floor")
    cells = {}
    for row in rows:
        key = (row["case"], row["dtype"], row["memory_format"], row["pass"])
        cells.setdefault(key, {})[row["impl"]] = row
    for (case, dtype, form, name), impls in cells.items():
        reference, compiled, native = (impls.get(i, {}).get("p50_ms", float("nan")) for i in ("reference", "compile", "native"))
        floor = impls["native"]["floor_ms"]
        print(
            f"{case:15} {dtype:9} {form:14} {name:8} {reference:9.3f} {compiled:9.3f} {native:9.3f} {floor:9.3f}"
            f"{reference / native:11.1f}x{native / floor:13.2f}x"
        )


def main():
    parser = ArgumentParser(__doc__, usage="python benchmarks/%(prog)s [options]")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="result file (default: results/region-loss-DEVICE.json)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"],
        help="where to measure (default: cuda where there is one)",
    )
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="timed rounds (default: 25)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out (default: off)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    args = parser.parse_args()
    path = args.json or pathlib.Path("results", f"region-loss-{device_slug(args.device)}.json")
    refuse_outputs([("--json", path)], [], args.overwrite)
    os.environ["MGD_OPS"] = "native"
    kernels.load_kernels()
    began = time.perf_counter()
    speeds = bandwidths(args.device)
    print(f"{args.device}: reads {speeds['read']:.0f} GB/s, copies {speeds['copy']:.0f} GB/s (read + write)")
    rows = []
    for case, shape in CASES[args.device].items():
        for dtype in (torch.float32, torch.bfloat16):
            for form in FORMATS:
                rows += bench(args.device, case, shape, dtype, form, args.rounds, args.compile)
    for row in rows:
        row.update(read_gb_s=speeds["read"], copy_gb_s=speeds["copy"])
    print_table(rows)
    write_result(path, "region loss", rows, time.perf_counter() - began, kernels.backend())
    print(f"results: {path}")


if __name__ == "__main__":
    cli(main)
