"""A training of 10,000 steps: its memory stays flat, it opens no more files and processes, and it does not slow down.

The speed is that of an otherwise idle machine. A run that is interrupted begins again, since it is one process that is watched.
"""

import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

from soak.trainings import Training, descendants

STEPS = 10_000
EVERY = 1_000  # steps of a window; the first one is left out
IMAGES = 8 * 3  # of a step: labeled ones, and two views of unlabeled ones
SETTINGS = (
    "--workers 1 --grad-accum 1 --save-every 500 --val-every 500 --log-every 50 --batch 8 --crop 48 --head-width 16 --resume"
)
MEMORY, SPEED = 2.0, 5.0  # percent that they may differ by
PAGE = os.sysconf("SC_PAGE_SIZE")


def cases(folder: pathlib.Path) -> dict[str, Callable[[], dict]]:
    return {f"long run: {STEPS:,} steps": functools.partial(watched, folder)}


def watched(folder: pathlib.Path, steps: int = STEPS) -> dict:
    """Train and watch: the counts of a row, and what was measured."""
    training = Training("mgd", folder / "long", settings=f"--steps {steps} {SETTINGS}")
    training.start(command=True)
    samples = []  # (step, bytes of memory, open files, processes)
    while not training.ended():
        entries = training.log()
        if entries:
            samples.append((entries[-1]["step"], *held(training.pid)))
        time.sleep(1)
    ended = training.wait()
    if ended.code != 0:
        print(f"{training.out}: ended with exit code {ended.code}:\n{ended.output}", flush=True)
        return {"tried": 1, "survived": 0, "differing": 0, "lost": 0}
    return judged(samples, [json.loads(line) for line in (training.out / "log.jsonl").read_text().splitlines()])


def held(pid: int) -> tuple[int, int, int]:
    """The resident memory, the open files and the number of a process and all below it."""
    memory = files = processes = 0
    for each in (pid, *descendants(pid)):
        try:
            memory += int(pathlib.Path(f"/proc/{each}/statm").read_text().split()[1]) * PAGE
            files += len(os.listdir(f"/proc/{each}/fd"))
            processes += 1
        except OSError:  # it has just ended
            continue
    return memory, files, processes


def judged(samples: list[tuple], log: list[dict]) -> dict:
    """A row: `memory_percent` is how far the medians of the windows of memory lie apart, `files` and `processes` how many more
    there are in the last window than in the first, `speed_percent` how much faster the last window is."""
    windows: dict[int, list] = {}
    for step, *values in samples:
        windows.setdefault(step // EVERY, []).append(values)
    last = max(step for step, *_ in samples) // EVERY
    last = last if last * EVERY < log[-1]["step"] else last - 1  # the last step begins no window
    of_memory = [statistics.median(memory for memory, *_ in windows[w]) for w in range(1, last + 1) if w in windows]
    files, processes = (max(values[k] for values in windows[last]) - max(values[k] for values in windows[1]) for k in (1, 2))
    rates = [(entry["step"], entry["images_per_s"]) for entry in log if "lr" in entry]
    before = statistics.median(rate for step, rate in rates if EVERY < step <= 2 * EVERY)
    after = statistics.harmonic_mean([rate for step, rate in rates if step > log[-1]["step"] - EVERY])
    row = {
        "memory_percent": round(100 * (max(of_memory) / min(of_memory) - 1), 2),
        "memory_mb": round(of_memory[-1] / 1e6, 1),
        "files": files,
        "processes": processes,
        "images_per_s": round(before, 1),
        "speed_percent": round(100 * (after / before - 1), 2),
    }
    flat = row["memory_percent"] <= MEMORY and files <= 0 and processes <= 0
    kept = flat and abs(row["speed_percent"]) <= SPEED
    return {"tried": 1, "survived": int(kept), "differing": 0, "lost": 0, **row}
