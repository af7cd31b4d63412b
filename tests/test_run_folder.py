"""What a training writes: checkpoints, the log and its folder."""

import argparse
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
    return run_folder.load_for_resume(argparse.Namespace(out=out, resume=resume, data=data), types.SimpleNamespace(hash="aaa"))


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
