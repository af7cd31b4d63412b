"""A signal stops a training after its step, and the same command continues it to the same result."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import NO_GPU, ROOT, TINY, log, same_weights

import run_folder
import stop_signals
import train_teacher
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


def signal_at(monkeypatch, number, step):
    """Send a signal to this process when step `step` begins."""
    original = train_teacher.poly_lr

    def poly_lr(now, *rest):
        if now == step:
            os.kill(os.getpid(), number)
        return original(now, *rest)

    monkeypatch.setattr(train_teacher, "poly_lr", poly_lr)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sup", "cps", "mt"])
def test_a_stopped_run_ends_as_if_it_had_not_stopped(script, tiny_networks, tmp_path, method):
    run = [*TINY, "--method", method, "--steps", "6", "--save-every", "4", "--val-every", "3", "--resume", "--backbone", "r18"]
    assert script(train_teacher, "--out", tmp_path / "whole", *run)[0] == 0
    for number, step in zip(SIGNALS, (0, 2, 5), strict=True):  # before a checkpoint, before a validation, at the last step
        with pytest.MonkeyPatch.context() as monkeypatch:
            signal_at(monkeypatch, number, step)
            code, out, err = script(train_teacher, "--out", tmp_path / "cut", *run)
        assert code == EXIT_CODE and "stopped; the same command" in out, err
        assert run_folder.load_checkpoint(tmp_path / "cut" / "resume.pt")["step"] == step + 1
    assert script(train_teacher, "--out", tmp_path / "cut", *run)[0] == 0
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("resume*"))


@pytest.mark.slow
def test_all_ranks_stop_after_the_same_step_when_one_is_signalled(tmp_path):
    """Under the launch of `make`: a rank that went on alone would wait for the other one's gradients forever."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(tmp_path / "cut", "--batch", "4", "--val-every", "0", "--steps", "10000", launch=launch)
    wait_for_step(tmp_path / "cut", 3, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train_teacher"], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGUSR1)  # the second rank
    text = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "SIGUSR1" in text and f"exitcode  : {EXIT_CODE}" in text, text
    assert 4 <= run_folder.load_checkpoint(tmp_path / "cut" / "resume.pt")["step"] < 10000
