"""Trainings that can be killed and compared.

A training is a fork of this process, which has imported PyTorch already, so that it starts in a fraction of a second; or a
command as a user gives it. Two processes are started by torchrun's own agent. Linux only: it reads /proc.
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import common
import distill  # noqa: F401  (before the fork)
import train_teacher  # noqa: F401
from recipes import STUDENT_METHODS
from soak import small

ROOT = pathlib.Path(common.__file__).parent
# Seven resume points and three validations; step 21 has both.
SETTINGS = "--steps 24 --save-every 3 --val-every 7 --log-every 1 --batch 8 --crop 32 --head-width 16 --resume"
OPTIONS = {  # each of micro-batches and loader workers with some methods
    "sup": "--workers 0",
    "mt": "--workers 2 --grad-accum 2 --sup-only 0.2 --ramp-up 0.5",
    "cps": "--workers 1 --sup-only 0.2 --ramp-up 0.5",
    "mgd": "--workers 0 --grad-accum 2",
    "mgd+": "--workers 2 --refine 0.3 --ema-decay 0.99 --lambda-schedule decay",
    "kd": "--workers 2",
    "cwd": "--workers 1 --grad-accum 2",
}
FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # by torchrun to its ranks
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
TIMEOUT = 120.0  # seconds after which a training that is to end by itself counts as hung


class Ended(NamedTuple):
    code: int  # of the process; minus the signal that ended it
    output: str  # of this attempt, stdout and stderr


class Training:
    """One run folder, and the process that trains into it at the moment."""

    def __init__(self, method: str, out: pathlib.Path, processes: int = 1, settings: str = SETTINGS):
        shutil.rmtree(out, ignore_errors=True)
        self.out, self.processes = out, processes
        self.script = "distill" if method in STUDENT_METHODS else "train_teacher"
        words = ["--out", str(out), "--method", method, *OPTIONS[method].split(), *settings.split()]
        if self.script == "distill":
            words += ["--deep", str(teacher(out.parent, "deep")), "--wide", str(teacher(out.parent, "wide"))]
        self.arguments, self.said = words, out.with_suffix(".txt")
        given = settings.split()
        self.steps, self.save_every = (int(given[given.index(f"--{flag}") + 1]) for flag in ("steps", "save-every"))
        self.pid, self.status, self.log_before = 0, None, None

    # ---- the process ----

    def start(self, before: Callable[[], None] | None = None, command: bool = False):
        """Start the training; `before` runs in the new process first. With `command`, as a user starts it."""
        self.log_before, self.status = inode(self.out / "log.jsonl"), None
        self.said.parent.mkdir(parents=True, exist_ok=True)
        with open(self.said, "w") as said:
            if command:
                launch = ["-m", "soak.small"]
                if self.processes > 1:
                    launch = ["-m", "torch.distributed.run", "--standalone", "--signals-to-handle", FORWARDED]
                    launch += ["--nproc-per-node", str(self.processes), "-m", "soak.small"]
                words = [sys.executable, *launch, self.script, *self.arguments]
                child = subprocess.Popen(
                    words, cwd=ROOT, stdout=said, stderr=said, start_new_session=True, preexec_fn=die_with_parent
                )
                child.returncode = 0  # waited for below
                self.pid = child.pid
                return
            assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
            sys.stdout.flush()
            self.pid = os.fork()
            if self.pid == 0:
                self.become(said.fileno(), before)

    def become(self, said: int, before: Callable[[], None] | None):
        """In the fork: train, and exit as the script would."""
        code = 1
        try:
            os.setsid()
            die_with_parent()
            for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), said, said)):
                os.dup2(target, number)
            atexit._clear()
            small.install()
            if before:
                before()
            code = (
                run(self.script, self.arguments) if self.processes == 1 else launch(self.processes, self.script, self.arguments)
            )
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for its end. One that does not end is killed, and has the code -9 and the word "hung" in its output."""
        members, until = set(), time.monotonic() + timeout
        while not self.ended() and time.monotonic() < until:
            members |= {*descendants(self.pid)}
            time.sleep(0.01)
        hung = "" if self.ended() else "hung\n"
        if hung:
            self.kill(signal.SIGKILL, [self.pid, *descendants(self.pid)])
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.kill(signal.SIGKILL, members)  # loader workers and ranks that outlive it for a moment
        return Ended(self.status, hung + self.said.read_text(errors="replace"))

    def kill(self, number: int, pids):
        """Send a signal to those of `pids` that are still there."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # ---- its files ----

    def finished(self) -> bool:
        """Whether all that is left is the end of the process."""
        return (self.out / "last.pt").exists() and not (self.out / "resume.pt").exists()

    def lines(self) -> int:
        """How many lines the present process has in the log; 0 until it has written its own log."""
        path = self.out / "log.jsonl"
        with contextlib.suppress(FileNotFoundError):
            if inode(path) != self.log_before:
                return path.read_bytes().count(b"\n")
        return 0

    def log(self) -> list[dict]:
        """The entries of the log, without times and rates; a line that was cut off is left out."""
        entries = []
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            for line in (self.out / "log.jsonl").read_text().splitlines():
                entries.append({k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "data_wait")})
        return entries

    def resumed_after(self, output: str) -> int:
        """The step that an attempt continued after; 0 where it began anew, the last step where the run was finished."""
        found = re.search(r"continuing after step (\d+)", output)
        return int(found[1]) if found else self.steps if "this run is finished" in output else 0

    def saved_step(self) -> int:
        """The step of the newest checkpoint that must be there: the one that a file has, or that the log implies, since the
        step after it has begun."""
        logged = max((entry["step"] for entry in self.log() if "lr" in entry), default=0)
        found = [max(0, logged - 1) // self.save_every * self.save_every]
        for name in ("resume.pt", "resume-previous.pt", "last.pt"):
            with contextlib.suppress(Exception):
                found.append(torch.load(self.out / name, weights_only=True)["step"])
        return max(found)


def inode(path: pathlib.Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, its children first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parent = int(pathlib.Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found = sorted(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


# ---- in the new process ----


def die_with_parent():
    """Let the kernel kill this process when the one that started it ends, so that an interrupted soak leaves no training."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(script: str, arguments: list[str]) -> int:
    """A script's main as its command line runs it, with what happens at the end of a process; its exit code."""
    sys.argv, code = [f"{script}.py", *arguments], 1
    try:
        common.cli(importlib.import_module(script).main)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
    return code


def launch(processes: int, script: str, arguments: list[str]) -> int:
    """What torchrun does, with ranks that are forks instead of new interpreters."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        signals_to_handle=FORWARDED,
        max_restarts=0,
        monitor_interval=0.1,
    )
    elastic_launch(config, rank)(script, arguments)
    return 0


def rank(script: str, arguments: list[str]):
    atexit._clear()  # of the agent
    sys.stdout.flush()
    code = run(script, arguments)
    sys.stdout.flush()
    if code:
        sys.exit(code)


# ---- results ----


def teacher(folder: pathlib.Path, role: str) -> pathlib.Path:
    """The checkpoint of a teacher below `folder`, trained if it is missing."""
    path = folder / f"teacher-{role}" / "last.pt"
    if not path.exists():
        training = Training(
            "sup", path.parent, settings=f"--role teacher_{role} --steps 4 --save-every 4 --batch 8 --crop 32 --head-width 16"
        )
        training.start()
        ended = training.wait()
        assert ended.code == 0, ended.output
    return path


def difference(a: Training, b: Training) -> str:
    """What differs between two finished runs, apart from times, rates and the name of the folder; "" if nothing does."""
    if a.log() != b.log():
        return "the logs"
    first, second = (torch.load(training.out / "last.pt", weights_only=True) for training in (a, b))
    for checkpoint in (first, second):
        # the generator moves on with every start of a loader; no step draws from it
        del checkpoint["rng"], checkpoint["row"]["seconds"], checkpoint["args"]["out"]
    if first.keys() != second.keys():
        return "the keys of last.pt"
    return next((f"{key} in last.pt" for key in first if not same(first[key], second[key])), "")


def same(a, b) -> bool:
    """Whether two values of a checkpoint are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
