"""One owner per run folder."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import run_owner
from common import UserError

OWN = "import sys, time, pathlib; import run_owner; run_owner.own_run(pathlib.Path(sys.argv[1])); print('mine', flush=True); "


@pytest.fixture(autouse=True)
def nothing_owned(monkeypatch):
    monkeypatch.setattr(run_owner, "OWNED", {})


def start(folder, code="time.sleep(60)"):
    """A process that tries to own `folder`."""
    command = [sys.executable, "-c", OWN + code, folder]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def owner(folder, **changed):
    """Write an owner.json as if another process had."""
    (folder / "owner.json").write_text(json.dumps({**run_owner.identity(), "id": "other", **changed}))


def test_a_living_owner_is_named_with_host_process_and_age(tmp_path):
    owner(tmp_path, since=time.time() - 3725)
    with pytest.raises(UserError) as refused:
        run_owner.own_run(tmp_path)
    for part in (str(tmp_path), f"process {os.getpid()}", socket.gethostname(), "1:02:05"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "changed",
    [{"started": "1"}, {"pid": 2**22 + 1, "started": None}, {"pid": None, "started": None}],
    ids=["the process id was given again", "no such process", "no process id"],
)
def test_a_dead_owner_on_this_host_is_replaced_at_once(tmp_path, changed):
    owner(tmp_path, **changed)
    run_owner.own_run(tmp_path)
    assert run_owner.read_owner(tmp_path / "owner.json")["pid"] == os.getpid()


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"boot": "another container"}, {"text": "cut off"}])
def test_another_hosts_owner_is_judged_by_its_last_touch(tmp_path, changed):
    path = tmp_path / "owner.json"
    owner(tmp_path, **changed)
    if "text" in changed:
        path.write_text('{"host": "els')
    now = time.time()
    os.utime(path, (now - run_owner.STALE + 5,) * 2)
    with pytest.raises(UserError):
        run_owner.own_run(tmp_path)
    os.utime(path, (now - run_owner.STALE - 5,) * 2)
    run_owner.own_run(tmp_path)
    assert run_owner.read_owner(path)["pid"] == os.getpid()


def test_a_touched_file_is_younger_than_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(run_owner, "HEARTBEAT", 0.02)
    run_owner.own_run(tmp_path)
    path = tmp_path / "owner.json"
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime > time.time() - 60
    owner(tmp_path)  # another one's file is not touched
    time.sleep(0.1)
    os.utime(path, (1, 1))
    time.sleep(0.2)
    assert path.stat().st_mtime == 1


@pytest.mark.parametrize("since", ["long ago", None, float("nan"), 1e300, [1]])
def test_a_wrong_age_is_still_one_line(tmp_path, since):
    owner(tmp_path, since=since)
    with pytest.raises(UserError, match=r"has been training into it for .*; wait for it"):
        run_owner.own_run(tmp_path)


@pytest.mark.parametrize("name", [".owner.lock", "owner.json"])
def test_a_folder_that_cannot_be_owned_is_one_line(tmp_path, name):
    (tmp_path / name).mkdir()
    os.utime(tmp_path / name, (1, 1))
    with pytest.raises(UserError, match=r"cannot be owned \(.*\); .* give another --out"):
        run_owner.own_run(tmp_path)


def test_an_owner_that_ends_while_it_is_judged_is_no_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(run_owner, "read_owner", lambda path: {"host": "elsewhere"})  # and then the file is gone
    run_owner.own_run(tmp_path)
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


def test_what_a_dead_owner_was_writing_is_removed(tmp_path):
    """A killed process leaves its temporary file, which is as large as a checkpoint, and a run may be killed many times."""
    owner(tmp_path, pid=2**22 + 1, started=None)
    cut_off, of_another = (tmp_path / f".mgd-{pid}-7.tmp" for pid in (2**22 + 1, os.getppid()))
    cut_off.write_bytes(b"half")
    of_another.write_bytes(b"half")
    run_owner.own_run(tmp_path)
    assert not cut_off.exists() and of_another.exists()


def test_whoever_lost_its_folder_does_not_write(tmp_path):
    run_owner.refuse_lost(tmp_path)  # not owned: others may write
    run_owner.own_run(tmp_path)
    run_owner.refuse_lost(tmp_path)
    owner(tmp_path)
    with pytest.raises(UserError, match="taken it over"):
        run_owner.refuse_lost(tmp_path)
    (tmp_path / "owner.json").unlink()
    with pytest.raises(UserError, match="taken it over"):
        run_owner.refuse_lost(tmp_path)


@pytest.mark.slow
def test_of_many_that_start_at_once_one_wins(tmp_path):
    owner(tmp_path, started="1")  # a dead one, which all of them may replace
    processes = [start(tmp_path) for _ in range(6)]
    try:
        deadline = time.monotonic() + 120
        while sum(process.poll() is None for process in processes) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        alive = [process for process in processes if process.poll() is None]
        assert len(alive) == 1
        assert run_owner.read_owner(tmp_path / "owner.json")["pid"] == alive[0].pid
        for process in processes:
            if process is not alive[0]:
                assert f"process {alive[0].pid} on" in process.stderr.read()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    run_owner.own_run(tmp_path)  # the killed owner is dead


@pytest.mark.slow
def test_an_owner_that_ends_leaves_no_owner(tmp_path):
    process = start(tmp_path, "pass")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "mine\n"), err
    assert not (tmp_path / "owner.json").exists()
