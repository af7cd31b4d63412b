"""What a training writes: checkpoints, the log and its folder."""

import argparse
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, refuse_constant
from PIL import Image

import common
import result_files
import run_folder
from common import UserError

# ---- writing ----


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.png"
    result_files.save_png(path, Image.new("RGB", (3, 2)))
    before = path.read_bytes()

    class Breaks:
        def save(self, file, **_):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a.png: cannot be written \(No space left on device\)"):
        result_files.save_png(path, Breaks())
    with pytest.raises(KeyboardInterrupt), run_folder.atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_a_link_stays_a_link_and_long_names_fit(tmp_path):
    (tmp_path / "disk").mkdir()
    link, long = tmp_path / "r.json", tmp_path / ("x" * 250 + ".json")
    link.symlink_to(tmp_path / "disk" / "r.json")
    for path in (link, long):
        result_files.write_result(path, "evaluation", [], 0.0, "torch")
    assert link.is_symlink() and (tmp_path / "disk" / "r.json").is_file() and long.is_file()


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*run: cannot be written to \(Not a directory\)"):
        run_folder.check_folder("--out", tmp_path / "file" / "run")

    def refuses(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuses)
    with pytest.raises(UserError, match=r"--out .*: cannot be written to \(Read-only file system\)"):
        run_folder.check_folder("--out", tmp_path)


@pytest.mark.slow
def test_a_real_read_only_disk_is_one_line(tmp_path):
    """To root too, whom permissions do not stop."""
    code = "import pathlib, common, run_folder; common.cli(lambda: run_folder.check_folder('--out', pathlib.Path('disk')))"
    command = f'mount -t tmpfs -o ro tmpfs {tmp_path}/disk && {sys.executable} -c "{code}"'
    (tmp_path / "disk").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    can = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")]
    if not shutil.which("unshare") or subprocess.run(can, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    line = "-c: error: --out disk: cannot be written to (Read-only file system); give another folder\n"
    assert (done.returncode, done.stderr) == (2, line)


# ---- checkpoints ----


def test_a_checkpoint_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "run" / "last.pt"
    row = {"model": {}, "args": {}, "classes": [], "row": {}}
    run_folder.save_checkpoint(path, {**row, "step": 1})

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(common.os, "fsync", fails)
    with pytest.raises(UserError, match=r"last.pt: cannot be written \(disk full\)"):
        run_folder.save_checkpoint(path, {**row, "step": 2})
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
    checkpoint = run_folder.load_checkpoint(path)
    assert checkpoint["step"] == 1 and checkpoint["versions"]["torch"] == str(torch.__version__)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_one_clear_line(tmp_path):
    """In a process whose files may have 100 kB."""
    checkpoint = "{'model': torch.zeros(100_000)}"
    save = f"import pathlib, torch, run_folder; run_folder.save_checkpoint(pathlib.Path('last.pt'), {checkpoint})"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{limit}; {save}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "last.pt: cannot be written (File too large)" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_error_of_torch_save_that_is_no_failed_write_stays_itself(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("cannot be serialized")

    monkeypatch.setattr(common.torch, "save", fails)
    with pytest.raises(RuntimeError, match="cannot be serialized"):
        run_folder.save_checkpoint(tmp_path / "last.pt", {})
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_one_clear_line(tmp_path, recwarn):
    with pytest.raises(UserError, match="no such checkpoint"):
        run_folder.load_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "noise.pt").write_bytes(b"\x80noise")
    with pytest.raises(UserError, match="cannot be read"):
        run_folder.load_checkpoint(tmp_path / "noise.pt")
    assert not recwarn.list  # which would be more lines on stderr
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of"):
        run_folder.load_checkpoint(tmp_path / "other.pt")


# ---- the folder of a training ----


def resumes(out, resume=False, data=None):
    args = argparse.Namespace(out=out, resume=resume, data=data)
    return run_folder.load_for_resume(args, types.SimpleNamespace(classes=[]), types.SimpleNamespace(hash="aaa"))


@pytest.mark.parametrize("name", ["log.jsonl", "last.pt", "resume.pt"])
@pytest.mark.parametrize("resume", [False, True, "alone"])
def test_a_training_never_replaces_somebody_elses_file(tmp_path, name, resume):
    (tmp_path / name).write_text("precious")
    if resume is True and name == "last.pt":
        run_folder.save_checkpoint(tmp_path / "resume.pt", {"model": {}, "args": {}, "classes": [], "row": {}})
    with pytest.raises(UserError, match=name):
        resumes(tmp_path, resume)
    assert (tmp_path / name).read_text() == "precious"


def test_a_training_does_not_write_among_its_data(folder):
    before = sorted(folder.rglob("*"))
    for out in ("masks/..", "masks", "images", "images/runs/a"):
        with pytest.raises(UserError, match="is the folder of the data, or lies among its images or masks"):
            resumes(folder / out, data=folder)
    assert sorted(folder.rglob("*")) == before
    resumes(folder / "runs", data=folder)


def test_a_log_goes_on_where_its_last_line_was_cut_off(tmp_path):
    lines = ['{"step": 1, "lr": 1, "images_per_s": 1, "data_wait": 0}', '{"step": 3, "miou": 1}', '{"step": 2, "mi']
    for end in ("", "\n", "\x00\x00"):
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + end)
        progress = run_folder.Progress(types.SimpleNamespace(out=tmp_path, steps=4), 2)
        progress.write(step=3)
        progress.close()
        assert (tmp_path / "log.jsonl").read_text() == lines[0] + '\n{"step": 3}\n'


def test_no_log_holds_nan(tmp_path):
    progress = run_folder.Progress(types.SimpleNamespace(out=tmp_path, steps=2, log_every=1, save_every=9, lr=1e30), 0)
    progress.step(0, 1, 1e30, {"sup": torch.tensor(math.nan)}, torch.tensor(1.0))
    progress.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    skipped, entry = (json.loads(line, parse_constant=refuse_constant) for line in lines)
    assert skipped["skipped"]["losses"]["sup"] is None and entry["step"] == 1 and entry["sup"] is None
    assert run_folder.is_log(tmp_path / "log.jsonl")


# ---- resume points ----

CHECKPOINT = {"model": {"w": torch.arange(1000.0)}, "args": {}, "classes": ["a"], "row": {}, "partition": {"hash": "aaa"}}


def resume(out, **more):
    """What a run continues from."""
    args = argparse.Namespace(out=out, resume=True, data=None, **more)
    return run_folder.load_for_resume(args, types.SimpleNamespace(classes=["a"]), types.SimpleNamespace(hash="aaa"))


def save(out, step, **more):
    run_folder.save_checkpoint(
        out / "resume.pt", {**CHECKPOINT, "args": {"out": str(out), "resume": False}, "step": step, **more}
    )


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut off":
        content = content[: len(content) // 2]
    elif how == "one bit of the weights":
        content[content.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    elif how == "zeros":
        content = bytes(len(content))
    path.write_bytes(b"" if how == "empty" else content)


@pytest.mark.parametrize("how", ["cut off", "one bit of the weights", "zeros", "empty", "missing"])
def test_a_damaged_resume_point_falls_back_to_the_one_before_it(tmp_path, capsys, how):
    save(tmp_path, 3)
    save(tmp_path, 6)
    if how == "missing":
        (tmp_path / "resume.pt").unlink()
    else:
        damage(tmp_path / "resume.pt", how)
    assert resume(tmp_path)["step"] == 3
    assert "resume-previous.pt: continuing after step 3" in capsys.readouterr().out
    save(tmp_path, 9)  # does not displace the whole point by the damaged one before its own is written
    assert run_folder.load_checkpoint(tmp_path / "resume.pt")["step"] == 9
    damage(tmp_path / "resume.pt", "zeros")
    assert resume(tmp_path)["step"] == 3


def test_where_all_resume_points_are_damaged_nothing_is_lost(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 6)
    for name in ("resume.pt", "resume-previous.pt"):
        damage(tmp_path / name, "cut off")
    with pytest.raises(UserError, match=r"resume-previous.pt: cannot be read"):
        resume(tmp_path)
    assert {path.name for path in tmp_path.glob("*.pt")} == {"resume-damaged.pt", "resume-previous.pt"}


def test_all_differences_to_the_run_that_is_continued_are_listed(tmp_path, capsys):
    more = {"lr": 0.1, "crop": [64, 64], "window": [64, 64], "workers": 2}
    args = {"out": str(tmp_path), "resume": False, "data": None, **more}
    run_folder.save_checkpoint(tmp_path / "resume.pt", {**CHECKPOINT, "args": args, "step": 3, "classes": ["b"]})
    with pytest.raises(UserError) as refused:
        resume(tmp_path, **more | {"lr": 0.2, "crop": (32, 32), "window": (32, 32)})
    for part in ("--lr 0.1, not 0.2", "--crop [64, 64], not [32, 32]", "the classes b, not a", str(tmp_path / "resume.pt")):
        assert part in str(refused.value)
    assert "--window" not in str(refused.value)  # it follows the crop
    run_folder.save_checkpoint(tmp_path / "resume.pt", {**CHECKPOINT, "args": args, "step": 3})
    capsys.readouterr()
    assert resume(tmp_path, **more | {"workers": 0})["step"] == 3
    assert "resume.pt: was written with --workers 2, not 0\n" in capsys.readouterr().out


def test_a_checkpoint_that_fails_to_be_written_leaves_a_whole_one(tmp_path, monkeypatch):
    """Each write, flush and rename of the third checkpoint fails once."""
    save(tmp_path, 3)
    save(tmp_path, 6)
    failures = 0
    for name in ("fsync", "replace"):
        for when in range(4):
            calls, original = iter(range(9)), getattr(os, name)

            def fail(*args, calls=calls, original=original, when=when):
                if next(calls) == when:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return original(*args)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail)
                try:
                    save(tmp_path, 9)
                except UserError as error:
                    failures += 1
                    assert str(tmp_path / "resume.pt") in str(error) and "No space left" in str(error)
                    assert resume(tmp_path)["step"] in (3, 6, 9)
                    assert not list(tmp_path.glob(".mgd-*"))
            assert resume(tmp_path)["step"] >= 6
    assert failures >= 3


def test_no_process_writes_into_a_folder_that_another_one_owns(tmp_path):
    save(tmp_path, 3)
    resume(tmp_path)
    (tmp_path / "owner.json").write_text("{}")
    with pytest.raises(UserError, match="taken it over"):
        save(tmp_path, 6)
    assert run_folder.load_checkpoint(tmp_path / "resume.pt")["step"] == 3
