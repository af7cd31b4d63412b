import argparse
import errno
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import common
from common import UserError


def test_poly_lr_and_ramp_up_are_their_formulas():
    assert common.poly_lr(0, 100, 0.02) == 0.02
    assert common.poly_lr(75, 100, 0.02) == pytest.approx(0.02 * 0.25**0.9)
    assert common.ramp_up(29, 100, 0.3, 0.6) == 0
    assert common.ramp_up(45, 100, 0.3, 0.6) == pytest.approx(math.exp(-5 * 0.25))
    assert common.ramp_up(60, 100, 0.3, 0.6) == 1
    assert common.ramp_up(0, 100, 0.0, 0.0) == 1


@pytest.mark.parametrize("text,expected", [("64", (64, 64)), ("96x128", (96, 128))])
def test_crop_size(text, expected):
    assert common.crop_size(text) == expected


@pytest.mark.parametrize("text", ["0", "1x2x3", "ten", "-5"])
def test_crop_size_refuses_nonsense(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        common.crop_size(text)


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    decayed, free = common.parameter_groups(model, 5e-4)
    assert [p.ndim for p in decayed["params"]] == [4] and decayed["weight_decay"] == 5e-4
    assert len(free["params"]) == 3 and free["weight_decay"] == 0


def test_a_checkpoint_is_the_old_one_until_it_is_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "run" / "last.pt"
    row = {"model": {}, "args": {}, "classes": [], "row": {}}
    common.save_checkpoint(path, {**row, "step": 1})

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(common.os, "fsync", fails)
    with pytest.raises(UserError, match=r"last.pt: cannot be written \(disk full\)"):
        common.save_checkpoint(path, {**row, "step": 2})
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
    checkpoint = common.load_checkpoint(path)
    assert checkpoint["step"] == 1 and checkpoint["versions"]["torch"] == str(torch.__version__)


def test_a_checkpoint_that_does_not_fit_is_one_clear_line(tmp_path):
    """In a process whose files may have 100 kB."""
    save = "import pathlib, torch, common; common.save_checkpoint(pathlib.Path('last.pt'), {'model': torch.zeros(100_000)})"
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
        common.save_checkpoint(tmp_path / "last.pt", {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_line(monkeypatch, capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit) as ended:
        common.run(main)
    assert ended.value.code == 2 and capsys.readouterr().err.endswith("the disk is full; make room, then run the same again\n")


def test_what_is_no_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        common.load_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "noise.pt").write_bytes(b"\x80noise")
    with pytest.raises(UserError, match="cannot be read"):
        common.load_checkpoint(tmp_path / "noise.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of"):
        common.load_checkpoint(tmp_path / "other.pt")


def test_unknown_device():
    with pytest.raises(UserError, match="--device warp"):
        common.pick_device("warp")


def test_benchmarks_are_named_after_the_whole_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert common.device_slug("cuda") == "h100-80gb-hbm3" and common.device_slug("cpu") == "cpu"


def test_error_of_a_data_worker_is_one_line_in_a_real_process(folder):
    """An image breaks off in the middle, which no header shows; a worker process finds it during the first steps."""
    for path in (folder / "images").glob("im0[0-9].png"):
        path.write_bytes(path.read_bytes()[:3000])
    command = [sys.executable, "train_teacher.py", "--dataset", "folder", "--data", str(folder), "--part", "1", "--method",
               "sup", "--backbone", "r18", "--weights", "none", "--out", str(folder / "run"), "--steps", "2", "--batch", "2",
               "--crop", "32", "--head-width", "16", "--workers", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.pathlib.Path(common.__file__).parent)
    assert done.returncode == 2
    assert (
        len(done.stderr.strip().splitlines()) == 1
        and ".png: cannot be read as an image" in done.stderr
        and "Traceback" not in done.stderr
    )
