"""make"""

import subprocess

import pytest
from conftest import ROOT


def make(*arguments):
    done = subprocess.run(["make", "--no-print-directory", "-n", "VENV=", "PYTHON=python", *arguments], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_make_distil_trains_missing_teachers_first(tmp_path):
    lines = make("distill", "PART=1/8", "STUDENT=mbv2", f"DATA={tmp_path}", "DATASET=folder", "SEEDS=2")
    run = f"runs/{tmp_path.name}/1-8"
    assert [line.split()[1] for line in lines] == ["train_teacher.py", "train_teacher.py", "distill.py"]
    assert f"--out {run}/teacher-deep-s2 --role teacher_deep --seed 2" in " ".join(lines[0].split())
    assert f"--out {run}/mgd-mbv2-s2 --student mbv2" in lines[2] and "--part 1/8" in lines[2]
    assert f"--deep {run}/teacher-deep-s2/last.pt --wide {run}/teacher-wide-s2/last.pt" in lines[2]


def test_make_passes_arguments_on_and_repeats_for_each_seed(tmp_path):
    more = ("ARGS=--lr 1", "TEACHER_ARGS=--sup-only 0", "MGD_ARGS=--regions 3", "STUDENT_ARGS=--seed 9", "SEEDS=0 1 2")
    lines = make("compare", f"DATA={tmp_path}", "DATASET=folder", *more)
    train = [line for line in lines if "train_teacher.py" in line]
    assert len(train) == 12 and all("--lr 1" in line for line in train)
    assert ["--sup-only 0" in line for line in train if "--role teacher" in line] == [True] * 6
    assert ["--seed 9" in line for line in lines if ".py --out" in line].count(True) == 9  # two Sup and one MGD a seed
    assert [line for line in lines if "--regions 3" in line] == [line for line in lines if "distill.py" in line] != []
    assert lines[-2].count("last.pt") == 15 and f"--json runs/{tmp_path.name}/1-8/compare-r18.json" in lines[-1]


def test_make_runs_several_processes():
    lines = make("compare", "NPROC=4", "SEEDS=3", "PART=1/2")
    scripts = [line for line in lines if ".py" in line]
    assert len(scripts) == 6 and all("-m torch.distributed.run --standalone --nproc-per-node 4" in line for line in scripts)


@pytest.mark.parametrize("arguments,expected", [("STUDENT=vgg", "STUDENT=vgg: unknown backbone"),
                                                ("DATASET=folder", "DATASET=folder: give its folder"),
                                                ("DATA=my data", "DATA=my data: make cannot")])  # fmt: skip
def test_make_refuses_what_is_wrong_before_it_trains_teachers(arguments, expected):
    done = subprocess.run(["make", "-n", "distill", arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and expected in done.stderr
