"""A signal stops a training after its step, and the same command continues it to the same result."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import NO_GPU, ROOT, TINY, log, same_weights

import stop_signals
from stop_signals import EXIT_CODE, SIGNALS, StopSignals

RUN = [
    "train_teacher.py",
    *TINY,
    "--steps",
    "40",
    "--save-every",
    "7",
    "--val-every",
    "11",
    "--backbone",
    "r18",
    "--method",
    "sup",
]


def start(out, *more, launch=()):
    """A training in a process of its own."""
    command = [sys.executable, *launch, *RUN, "--out", out, *more]
    environment = {**os.environ, **NO_GPU, "MGD_OPS": "torch", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(out, step, process):
    """Wait until a training has logged `step`."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "log.jsonl").exists() and f'"step": {step},' in (out / "log.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_not_the_end(number, capfd):
    signals = StopSignals()
    assert not signals.requested()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # within two seconds of the first: the same request
    assert signals.requested() and signals.requested()
    assert capfd.readouterr().err.count("stopping after this step") == 1
    with pytest.raises(SystemExit) as ended:
        signals.exit()
    assert ended.value.code == EXIT_CODE


def test_a_later_signal_ends_the_process_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(stop_signals, "SAME_REQUEST", 0.05)
    StopSignals()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)
    assert codes == [128 + signal.SIGINT]


def test_a_validation_is_interrupted(capsys):
    signals = StopSignals()
    with signals.may_interrupt():
        pass
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended, signals.may_interrupt():
        time.sleep(5)
    assert ended.value.code == EXIT_CODE and time.monotonic() - began < 3
    with pytest.raises(SystemExit), signals.may_interrupt():  # asked before it began
        raise AssertionError("not reached")


@pytest.mark.slow
def test_a_stopped_run_ends_as_if_it_had_not_stopped(tmp_path):
    whole = start(tmp_path / "whole")
    text = whole.communicate()[0]
    assert whole.returncode == 0, text
    for number, step in zip(SIGNALS, (3, 11, 23), strict=True):  # one in a validation, perhaps
        process = start(tmp_path / "cut", "--resume")
        wait_for_step(tmp_path / "cut", step, process)
        process.send_signal(number)
        text = process.communicate(timeout=60)[0]
        assert process.returncode == EXIT_CODE and number.name in text and "Traceback" not in text, text
        assert (tmp_path / "cut" / "resume.pt").exists() and not (tmp_path / "cut" / "owner.json").exists()
    text = (process := start(tmp_path / "cut", "--resume")).communicate()[0]
    assert process.returncode == 0, text
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"last.pt", "log.jsonl", ".owner.lock"}


@pytest.mark.slow
def test_all_ranks_stop_after_the_same_step_when_one_is_signalled(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = ["--batch", "4", "--resume"]
    process = start(tmp_path / "cut", *more, launch=launch)
    wait_for_step(tmp_path / "cut", 3, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train_teacher"], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGUSR1)
    text = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "SIGUSR1" in text, text
    text = (process := start(tmp_path / "cut", *more, launch=launch)).communicate()[0]
    assert process.returncode == 0, text
    text = (process := start(tmp_path / "whole", *more, launch=launch)).communicate()[0]
    assert process.returncode == 0, text
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
