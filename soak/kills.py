"""Kills: trainings of every method, in one process and in two, that are killed at moments spread evenly over the run and
resumed with the same command, and must end as a run that was left alone.

Half of the kills are SIGKILL, of all processes as when a machine is taken away, or of one of them. The others are SIGTERM,
SIGINT and SIGUSR1, to all processes as from a terminal, or to the first one as from a scheduler.
"""

import functools
import itertools
import pathlib
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from recipes import METHODS
from soak.trainings import TIMEOUT, Ended, Training, descendants, difference

KILLS = 17  # of each of fourteen runs: 238
IN_A_ROW = 3  # so many kills hit one run, before it may end
COMMANDS = (3, 10)  # these kills hit a process that a command started, and not a fork
GOLDEN = (5**0.5 - 1) / 2  # fractions of its multiples spread evenly, wherever they stop
EXIT_CODE = 75  # of a run that a signal stopped; torchrun has a code of its own
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Kill(NamedTuple):
    lines: int  # the kill comes `delay` seconds after the log has so many lines; 0 lines are the start of the process
    delay: float
    number: int  # of the signal
    everyone: bool  # all processes, or one
    command: bool  # see COMMANDS


def cases(folder: pathlib.Path) -> dict[str, Callable[[], dict]]:
    """{case: function that makes the kills of a row below `folder` and counts them}"""
    return {
        f"kill: {method}, {processes} process{'es' * (processes > 1)}": functools.partial(
            killed_and_resumed, folder, method, processes
        )
        for method in METHODS
        for processes in (1, 2)
    }


def quick(folder: pathlib.Path) -> dict[str, Callable[[], dict]]:
    return {"kill: sup, 1 process": functools.partial(killed_and_resumed, folder, "sup", 1, IN_A_ROW)}


def killed_and_resumed(folder: pathlib.Path, method: str, processes: int = 1, kills: int = KILLS) -> dict:
    """Kill and resume runs of one kind: {"tried", "survived", "differing", "lost"}, counts of kills. A kill that comes too late
    does not count, and another one takes its place."""
    whole = Training(method, folder / f"{method}-{processes}", processes)
    timeline, end = undisturbed(whole)
    counts = {"tried": 0, "survived": 0, "differing": 0, "lost": 0}
    planned = (kill(i, timeline, end) for i in itertools.count())
    for chain in range(4 * kills):
        in_a_row = min(IN_A_ROW, kills - counts["tried"])
        if in_a_row == 0:
            break
        training = Training(method, folder / f"{method}-{processes}-{chain}", processes)
        hit_in_turn(training, sorted(itertools.islice(planned, in_a_row)), whole, counts)
    return counts


def undisturbed(training: Training) -> tuple[list[float], float]:
    """Run a training without kills: the seconds after its start at which the log had 0, 1, 2, ... lines, and its end."""
    began, timeline = time.monotonic(), [0.0]
    training.start()
    while not training.ended():
        timeline += [time.monotonic() - began] * (training.lines() + 1 - len(timeline))
        time.sleep(0.001)
    end, ended = time.monotonic() - began, training.wait()
    assert ended.code == 0, f"{training.out}: {ended.output}"
    return timeline, end


def kill(i: int, timeline: list[float], end: float) -> Kill:
    """Kill `i` of a run whose log grew along `timeline`. One in six comes while the process starts; the others are spread over
    the time from the first step to the end."""
    fraction = GOLDEN * (i + 1) % 1
    at_start = i % 6 == 4
    seconds = fraction * timeline[1] if at_start else timeline[1] + fraction * (end - timeline[1])
    lines = max(k for k, when in enumerate(timeline) if when <= seconds)
    number = signal.SIGKILL if i % 2 == 0 else SIGNALS[i // 2 % len(SIGNALS)]
    return Kill(lines, seconds - timeline[lines], number, i % 4 < 2, i in COMMANDS)


def hit_in_turn(training: Training, kills: list[Kill], whole: Training, counts: dict):
    """Kill a run, resume it, kill it again, and at last let it end. Adds to `counts`, and says what went wrong."""
    if len(kills) > 1 and kills[0].lines == 0:  # the start that it hits is then that of a resumed run
        kills[:2] = kills[1::-1]
    made, survived, saved, problems = 0, 0, 0, []
    for planned in (*kills, None):
        training.start(command=planned is not None and planned.command)
        sent = planned is not None and send(training, planned)
        ended = training.wait()
        resumed = training.resumed_after(ended.output)
        if resumed < saved and (training.lines() or ended.code == 0):
            counts["lost"] += 1
            problems.append(f"continued after step {resumed}, but step {saved} was saved")
        saved = max(saved, training.saved_step())
        if sent and (ended.code != 0 or "stopping after" in ended.output):  # and not just after its end
            made += 1
            survived += answered(training, planned, ended, resumed)
            if not answered(training, planned, ended, resumed):
                problems.append(f"{planned} was answered with exit code {ended.code}:\n{ended.output}")
        if ended.code == 0:
            if differs := difference(training, whole):
                counts["differing"] += made
                problems.append(f"{differs} differ")
            break
        if not sent:
            survived = 0
            problems.append(f"ended with exit code {ended.code}:\n{ended.output}")
            break
    counts["tried"] += made
    counts["survived"] += survived
    for problem in problems:
        print(f"{training.out}: {problem}", flush=True)


def send(training: Training, planned: Kill) -> bool:
    """Wait for the moment of a kill and send its signal; False if the run ends before."""
    until = time.monotonic() + TIMEOUT
    while training.lines() < planned.lines:
        if training.ended() or time.monotonic() > until:
            return False
        time.sleep(0.001)
    time.sleep(planned.delay)
    below = descendants(training.pid)
    # The agent of ranks that are forks waits for ever for one that is killed after its work; torchrun's ranks are commands.
    if training.ended() or (training.processes > 1 and training.finished()):
        return False
    hits = [training.pid, *below]
    if not planned.everyone:  # of several ranks the last one; torchrun itself hands signals on
        alone = below[-1:] if training.processes > 1 and planned.number == signal.SIGKILL else []
        hits = alone or [training.pid]
    training.kill(planned.number, hits)
    return True


def answered(training: Training, planned: Kill, ended: Ended, resumed: int) -> bool:
    """Whether a run ended as it should: at once or with EXIT_CODE, and in no case with a traceback of its own. What the loader
    workers of a process that was killed still print is not its own."""
    if ended.code == 0:
        return True
    if training.processes > 1:  # torchrun describes its ranks in many lines
        return "hung" not in ended.output
    stepped = max((entry["step"] for entry in training.log()), default=0) > resumed
    if planned.number == signal.SIGKILL:
        return ended.code == -planned.number and "hung" not in ended.output
    allowed = {EXIT_CODE} if stepped else {EXIT_CODE, 130, -planned.number}  # before the first step
    return ended.code in allowed and not {"hung", "Traceback"} & {*ended.output.split()}
