"""Read thousands of damaged, lying and hostile files of every kind that this
project reads.

    python -m soak.fuzz --inputs 5000
    python -m soak.fuzz --inputs 200 --only checkpoint --first 3    # from its part 3 on

Each input is drawn by hypothesis: a small file that is made here, damaged byte
by byte or part by part, or plain values of which some are replaced. The readers
and scripts must take it, or refuse it with a UserError of one printable line.
Whatever else ends a call is counted and named: another exception, a call of
more than 60 seconds, a crash of a library, a process that is started, a file
that is written outside the run's folder, 1.5 GB of memory.

The inputs come in parts of 50. A part is a function of the seed (21), its kind
and its number, so --only KIND --first PART makes the same inputs again. Inputs
that fail are copied to OUT. All run in one process; where it dies, the next
part starts another.
"""

import argparse
import faulthandler
import functools
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import backbones
import readers
from common import ArgumentParser, UserError, cli
from soak.damage import tiny_backbone
from soak.kinds import KINDS, NETWORK, Place

SEED = 21
INPUTS = 5000
COUNTS = ("tried", "survived", "differing", "lost")
PART = 50  # inputs of one run of hypothesis
SECONDS = 60  # of one input; more is a hang
MEMORY = 1.5e9  # bytes that one input may add; an image of 2^28 pixels takes half of it

# ---- who watches ----

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOVES = {"os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"}  # the second path is written
CHANGES = {"os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.rename", "shutil.rmtree"}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn", "os.startfile"}


class Watch:
    """Python's audit events of writes outside a folder and of processes, while it is on."""

    def __init__(self, allowed: pathlib.Path):
        self.allowed, self.on, self.seen = (os.path.realpath(allowed), "/dev/null"), False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and isinstance(flags, int) and flags & WRITES:
                self.write(event, path)
        elif event in STARTS and not (event == "subprocess.Popen" and arguments[0] == "git"):  # the commit of a result
            self.seen.append(f"{event} {arguments[:2]}")
        if event in MOVES:
            self.write(event, arguments[1])
        if event in CHANGES:
            self.write(event, arguments[0])

    def fault_of(self, call: Callable) -> str | None:
        """What a call does that it must not do, or None."""
        self.seen, self.on = [], True
        try:
            call()
            fault = None
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "site-packages" not in frame.filename]
            at = ", from ".join(dict.fromkeys(f"{frame.filename}:{frame.lineno}" for frame in (frames[-1], ours[-1])))
            fault = f"{type(error).__name__}: {error} at {at}"
        finally:
            self.on = False
        return f"outside: {self.seen}" if self.seen else fault

    def write(self, event, path):
        path = os.fsdecode(path)
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # a link itself is moved
        if event in ("open", "os.mkdir"):
            real = os.path.realpath(path)
        if not any(f"{real}/".startswith(f"{folder}/") for folder in self.allowed):
            self.seen.append(f"{event} {path}")


def work(tasks: list, root: pathlib.Path, out: pathlib.Path):
    """Do the tasks (kind, part, inputs): one line of OUT/parts.jsonl each."""
    warnings.simplefilter("ignore")
    backbones.build_backbone = tiny_backbone
    backbones.expected_shapes = lambda name, stem: {}
    backbones.dilated_network = lambda name, stem: NETWORK
    torch.set_num_threads(1)
    place = Place(root)
    watch = Watch(place.run)
    for kind, part, inputs in tasks:
        began = time.perf_counter()
        counts = read_part(kind, part, inputs, place, watch, out)
        with open(out / "parts.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, **counts, "seconds": time.perf_counter() - began}) + "\n")


def read_part(kind: str, part: int, inputs: int, place: Place, watch: Watch, out: pathlib.Path) -> dict:
    """Read the inputs of a part. Faults are lines of OUT/faults.jsonl, and OUT/now says which input is being read."""
    counts = dict.fromkeys(COUNTS, 0)

    def one(data):
        place.fresh()
        call = KINDS[kind](data.draw, place)  # ends this call where hypothesis has drawn too much
        counts["tried"] += 1
        (out / "now").write_text(json.dumps([kind, part, counts]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        fault = watch.fault_of(call)
        faulthandler.cancel_dump_traceback_later()
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if fault is None and grown > MEMORY:
            fault = f"takes {grown / 1e9:.1f} GB"
        if fault is None:
            counts["survived"] += 1
            return
        counts["differing"] += fault.startswith("Differs")
        counts["lost"] += fault.startswith("outside")
        put_fault(out, kind, part, counts["tried"], fault)
        shutil.copytree(
            place.data, out / f"{kind}-{part}-{counts['tried']}", symlinks=True, ignore=no_pipes, dirs_exist_ok=True
        )

    options = {"database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
    numbered = SEED * 10**6 + list(KINDS).index(kind) * 10**4 + part
    seeded(numbered)(settings(max_examples=inputs, **options)(given(st.data())(one)))()
    return counts


def no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if pathlib.Path(folder, name).is_fifo()]


def put_fault(out: pathlib.Path, kind: str, part: int, number: int, fault: str):
    with open(out / "faults.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, "part": part, "input": number, "fault": fault}) + "\n")


# ---- the processes ----


def fuzz(inputs: dict[str, int], first: int, out: pathlib.Path) -> dict[str, dict]:
    """{kind: counts and seconds} of the number of inputs of each kind. Faults are left in OUT/faults.jsonl."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tasks = [(kind, first + i, min(PART, count - i * PART)) for kind, count in inputs.items() for i in range(-(-count // PART))]
    rows = {kind: {**dict.fromkeys(COUNTS, 0), "seconds": 0.0} for kind in inputs}
    while tasks:
        with tempfile.TemporaryDirectory(prefix="mgd-fuzz-") as root:
            environment = {**os.environ, "MPLCONFIGDIR": f"{root}/matplotlib", "PYTHONDONTWRITEBYTECODE": "1"}
            environment["PYTHONPATH"] = str(pathlib.Path(readers.__file__).parent)
            task = json.dumps([tasks, f"{root}/place", str(out)])
            done = subprocess.run(
                [sys.executable, "-m", "soak.fuzz", "--work", task], env=environment, capture_output=True, errors="replace"
            )
        parts = (out / "parts.jsonl").read_text().splitlines() if (out / "parts.jsonl").exists() else []
        (out / "parts.jsonl").unlink(missing_ok=True)
        for part in map(json.loads, parts):
            for key in (*COUNTS, "seconds"):
                rows[part["kind"]][key] += part[key]
        tasks = tasks[len(parts) :]
        if tasks:  # the process died while it read an input
            if not (out / "now").exists():
                raise UserError(f"the process that reads the inputs ended with {done.returncode}: {done.stderr[-1000:]}")
            kind, part, counts = json.loads((out / "now").read_text())
            put_fault(out, kind, part, counts["tried"], f"crash or hang, exit code {done.returncode}: {both_ends(done.stderr)}")
            for key in COUNTS:
                rows[kind][key] += counts[key]
            left = tasks[0][2] - counts["tried"]
            tasks = [*([(kind, part + 1000, left)] if left > 0 else []), *tasks[1:]]
    return rows


def both_ends(text: str) -> str:
    """The beginning of a long text, where faulthandler gives the reason, and its end."""
    return text if len(text) <= 2000 else f"{text[:1000]} [...] {text[-1000:]}"


def shares(inputs: int, kinds) -> dict[str, int]:
    return {kind: inputs // len(kinds) + (i < inputs % len(kinds)) for i, kind in enumerate(kinds)}


def count(inputs: dict[str, int], out: pathlib.Path) -> dict[str, int]:
    """The counts over all kinds; each fault is printed."""
    rows = fuzz(inputs, 0, out)
    print_faults(out)
    return {key: sum(row[key] for row in rows.values()) for key in COUNTS}


def print_faults(out: pathlib.Path):
    for line in (out / "faults.jsonl").read_text().splitlines() if (out / "faults.jsonl").exists() else []:
        print(line[:1000])


def cases(folder: pathlib.Path) -> dict[str, Callable]:
    """For `python -m soak`: one case per kind, 5,000 inputs in all."""
    return {
        f"fuzzed files: {kind}": functools.partial(count, {kind: number}, folder / "fuzz" / kind)
        for kind, number in shares(INPUTS, list(KINDS)).items()
    }


def quick(folder: pathlib.Path) -> dict[str, Callable]:
    """Five inputs of each kind."""
    return {"fuzzed files": functools.partial(count, shares(5 * len(KINDS), list(KINDS)), folder / "fuzz" / "quick")}


def main(argv=None):
    parser = ArgumentParser(__doc__, usage="python -m soak.fuzz [options]")
    parser.add_argument("--inputs", type=int, default=INPUTS, metavar="N", help=f"how many, over all kinds (default: {INPUTS})")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), metavar="KIND", help="some of the kinds (default: all)")
    parser.add_argument("--first", type=int, default=0, metavar="PART", help="number of each kind's first part (default: 0)")
    path = {"type": pathlib.Path, "metavar": "DIR", "default": pathlib.Path("runs/soak/fuzz/all")}
    parser.add_argument("--out", help="inputs that fail; emptied first (default: runs/soak/fuzz/all)", **path)
    parser.add_argument("--work", help=argparse.SUPPRESS)  # the process that reads the inputs
    args = parser.parse_args(argv)
    if args.work:
        tasks, root, out = json.loads(args.work)
        return work(tasks, pathlib.Path(root), pathlib.Path(out))
    rows = fuzz(shares(args.inputs, args.only or list(KINDS)), args.first, args.out.resolve())
    for kind, row in rows.items():
        print(f"{kind:12} " + ", ".join(f"{row[key]} {key}" for key in COUNTS) + f", {row['seconds']:.0f} s")
    print_faults(args.out)
    if (args.out / "faults.jsonl").exists():
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
