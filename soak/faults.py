"""Faults of the disk: every operation on the files of a run fails once, and a small file system runs full.

A clean run counts its operations: opening a file to write, writing, flushing to the disk, renaming. Then one run for each of
them has that one fail. It must go on, or end with one line; the same command then continues it from the last checkpoint to the
same result. In further runs the process is killed just before each operation.
"""

import builtins
import ctypes
import errno
import functools
import io
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable

from soak.trainings import Ended, Training, difference

SETTINGS = "--steps 5 --save-every 2 --log-every 1 --batch 4 --crop 32 --head-width 4 --resume"
LARGE = SETTINGS.replace("--head-width 4", "--head-width 32")  # for a file system, whose files have pages
OPERATIONS = ("open", "write", "fsync", "replace")
FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "short write": errno.ENOSPC, "SIGKILL": 0}
SIZES = 12  # of what the small file system has free
CLONE_NEWNS = 0x00020000  # from Linux's sched.h


class Disk:
    """The operations of this process on files below `folder`, which are counted from 0. The one with the number `fails` fails
    with `fault`. Each is a line in the file `record`, if there is one."""

    def __init__(self, folder: pathlib.Path, record: pathlib.Path | None = None, fails: int = -1, fault: str = ""):
        self.folder, self.record, self.fails, self.fault = str(folder), record, fails, fault
        self.count, self.names = 0, {}
        self.open, self.fsync, self.replace = builtins.open, os.fsync, os.replace

    def install(self):
        builtins.open = io.open = self.faulty_open
        os.fsync = self.faulty_fsync
        os.replace = self.faulty_replace

    def operation(self, name: str, path: str) -> bool:
        """Count an operation. Raises OSError where it is to fail; True where a write is to be short."""
        if not path.startswith(self.folder):
            return False
        number, self.count = self.count, self.count + 1
        if self.record:
            with self.open(self.record, "a") as file:
                file.write(f"{name} {path}\n")
        if number != self.fails:
            return False
        os.write(2, f"disk: {self.fault} at {name} of {path}\n".encode())  # which shows that the fault came
        if self.fault == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "short write":
            self.fails += 1  # a disk takes a part, and then no more
            self.fault = "ENOSPC"
            return True
        raise OSError(FAULTS[self.fault], os.strerror(FAULTS[self.fault]), path)

    def faulty_open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if isinstance(file, int) or not {*"wax"} & {*mode} or not str(file).startswith(self.folder):
            return self.open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        self.operation("open", str(file))
        raw = FaultyFile(self, str(file), mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def faulty_fsync(self, descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self.operation("fsync", os.readlink(f"/proc/self/fd/{number}"))
        self.fsync(descriptor)

    def faulty_replace(self, source, target):
        self.operation("replace", str(target))
        self.replace(source, target)


class FaultyFile(io.FileIO):
    """A file whose writes are operations of a `Disk`."""

    def __init__(self, disk: Disk, path: str, mode: str):
        super().__init__(path, mode)
        self.disk, self.path = disk, path

    def write(self, data) -> int:
        if self.disk.operation("write", self.path):
            data = memoryview(data).cast("B")[: max(1, len(data) // 2)]
        return super().write(data)


# ---- one operation that fails ----


def cases(folder: pathlib.Path) -> dict[str, Callable[[], dict]]:
    """{case: function that makes the faults of a row below `folder` and counts them}"""
    pairs = [(operation, fault) for operation in OPERATIONS for fault in ("ENOSPC", "EIO", "SIGKILL")]
    found = {
        f"fault: {fault} at {operation}": functools.partial(each_fails_once, folder, operation, fault)
        for operation, fault in [*pairs, ("write", "short write")]
    }
    return {**found, "fault: file system full": functools.partial(full_file_system, folder)}


def quick(folder: pathlib.Path) -> dict[str, Callable[[], dict]]:
    pairs = (("write", "ENOSPC"), ("fsync", "EIO"), ("write", "short write"), ("replace", "SIGKILL"))
    found = {
        f"fault: {fault} at {operation}": functools.partial(each_fails_once, folder, operation, fault, 1)
        for operation, fault in pairs
    }
    return {**found, "fault: file system full": functools.partial(full_file_system, folder, 1)}


def each_fails_once(folder: pathlib.Path, operation: str, fault: str, at_most: int | None = None) -> dict:
    """Let each operation of one kind fail once, or `at_most` of them, spread evenly. Returns a row's counts."""
    whole, operations = counted(folder)
    numbers = [i for i, name in enumerate(operations) if name == operation]
    if at_most is not None and len(numbers) > at_most:
        numbers = [numbers[(2 * i + 1) * len(numbers) // (2 * at_most)] for i in range(at_most)]
    counts = {"tried": 0, "survived": 0, "differing": 0, "lost": 0}
    for number in numbers:
        training = Training("sup", folder / "faults", settings=SETTINGS)
        disk = Disk(training.out, fails=number, fault=fault)
        one_fault(training, whole, disk.install, counts, f"{fault} at {operation} {number}", killed=fault == "SIGKILL")
    return counts


@functools.cache
def counted(folder: pathlib.Path) -> tuple[Training, list[str]]:
    """A run without a fault, and the names of its operations in turn."""
    whole, record = Training("sup", folder / "faults-whole", settings=SETTINGS), folder / "operations.txt"
    record.unlink(missing_ok=True)
    whole.start(Disk(whole.out, record).install)
    ended = whole.wait()
    assert ended.code == 0, ended.output
    return whole, [line.split()[0] for line in record.read_text().splitlines()]


def one_fault(training: Training, whole: Training, before, counts: dict, what: str, killed: bool = False, after=lambda: None):
    """Run a training with a fault, repair it with `after`, and run its command again. A disk that did not run full is no
    fault."""
    training.start(before)
    first = training.wait()
    saved = training.saved_step()
    after()
    if before is None and first.code == 0:
        return
    training.start()
    second = training.wait()
    counts["tried"] += 1
    problems = []
    if before and "disk: " not in first.output:
        problems.append("the fault did not come")
    if not (first.code == -signal.SIGKILL if killed and first.code else ended_with_one_line(first)):
        problems.append(f"ended with exit code {first.code}:\n{first.output}")
    if second.code != 0:
        problems.append(f"did not continue, exit code {second.code}:\n{second.output}")
    counts["survived"] += not problems
    if training.resumed_after(second.output) < saved:
        counts["lost"] += 1
        problems.append(f"continued after step {training.resumed_after(second.output)}, but step {saved} was saved")
    if second.code == 0 and (differs := difference(training, whole)):
        counts["differing"] += 1
        problems.append(f"{differs} differ")
    for problem in problems:
        print(f"{what}: {problem}", flush=True)


def ended_with_one_line(ended: Ended) -> bool:
    """Whether a run went on to its end, or says in one line what is wrong."""
    said = [line for line in ended.output.splitlines() if "error: " in line]
    return "Traceback" not in ended.output and (ended.code == 0 or (ended.code == 2 and len(said) == 1))


# ---- a file system that runs full ----


def full_file_system(folder: pathlib.Path, sizes: int = SIZES) -> dict | None:
    """Let trainings run into a file system with more and more free space, then free the rest and run them again. None where
    this process may not mount one. It is mounted in a namespace of a process of its own, so that no other process sees it."""
    result = folder / "full.json"
    result.unlink(missing_ok=True)
    whole = Training("sup", folder / "full-whole", settings=LARGE)
    whole.start()
    ended = whole.wait()
    assert ended.code == 0, ended.output
    with tempfile.TemporaryDirectory(dir=folder) as place:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                result.write_text(json.dumps(fill(pathlib.Path(place), whole, sizes) if mount(place) else None))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(pid, 0)
    counts = json.loads(result.read_text())
    if counts is None:
        print("fault: file system full: not run, since this process may not mount one (that needs root)", flush=True)
    return counts


def mount(place: str) -> bool:
    """Mount a file system of 16 MB for this process and its children alone; False where that is not allowed."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    commands = ["mount --make-rprivate /", f"mount -t tmpfs -o size=16m tmpfs {shlex.quote(place)}"]
    return all(subprocess.run(shlex.split(command), capture_output=True).returncode == 0 for command in commands)


def fill(place: pathlib.Path, whole: Training, sizes: int) -> dict:
    """Trainings in `place`, which has space for up to five checkpoints; most need space for three."""
    counts = {"tried": 0, "survived": 0, "differing": 0, "lost": 0}
    checkpoint, ballast = (whole.out / "last.pt").stat().st_size, place / "ballast"
    for i in range(sizes):
        training = Training("sup", place / "run", settings=LARGE)
        training.said = whole.said  # outside of the full file system
        disk = os.statvfs(place)
        ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - round((i + 0.5) / sizes * 5 * 2 * checkpoint)))
        one_fault(training, whole, None, counts, f"file system full, size {i}", after=ballast.unlink)
        ballast.unlink(missing_ok=True)
    return counts
