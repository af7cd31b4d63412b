"""`make matrix`: what it runs, in which order, and what an interruption or a failure leaves."""

import io
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

import common
import distill
import matrix
import train_teacher

ROWS = ("sup", "kd", "one-wide", "mgd")
STEPS = ["--steps", "3", "--save-every", "1", "--sup-only", "0", "--ramp-up", "0"]


def make_n(*more) -> str:
    command = ["make", "-f", str(ROOT / "Makefile"), "--no-print-directory", "-n", "VENV=", *more]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def commands(rows=ROWS):
    """As `make matrix` has them, in the folder that the test runs in; all networks tiny."""
    targets = [f"runs/shapes/1-8/{row}-r18/last.pt" for row in rows]
    flags = " ".join([*TINY, *STEPS[:4]])
    return make_n(*targets, f"ARGS={flags}", f"TEACHER_ARGS={' '.join(STEPS[4:])}", "DEEP=r18", "WIDE=mbv2")


class Processes:
    """Stands for `subprocess`: runs a stage in this process, and counts."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self):
        self.seen = []

    def run(self, command, stdin):
        script = next(word for word in command if word.endswith(".py"))
        self.seen.append(pathlib.Path(command[command.index("--out") + 1]).name)
        sys.argv = command[command.index(script) :]
        try:
            {"train_teacher.py": train_teacher, "distill.py": distill}[script].main()
        except common.UserError as error:
            print(error)
            return subprocess.CompletedProcess(command, 2)
        return subprocess.CompletedProcess(command, 0)


def run_matrix(monkeypatch, text, *options):
    processes = Processes()
    monkeypatch.setattr(matrix, "subprocess", processes)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(sys, "argv", ["matrix.py", *options])
    matrix.main()
    return processes.seen


def test_interrupted_and_continued_equals_uninterrupted(monkeypatch, tmp_path):
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    expected = ["sup-r18", "teacher-deep", "teacher-wide", "kd-r18", "one-wide-r18", "mgd-r18"]
    assert run_matrix(monkeypatch, commands()) == expected
    assert ".py" not in commands()  # nothing is left

    monkeypatch.chdir(tmp_path / "cut")
    original = distill.poly_lr

    def interrupt(step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return original(step, *rest)

    monkeypatch.setattr(distill, "poly_lr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_matrix(monkeypatch, commands())
    monkeypatch.setattr(distill, "poly_lr", original)
    assert run_matrix(monkeypatch, commands()) == expected[3:]  # kd goes on after its second step
    for name in expected:
        whole, cut = (common.load_checkpoint(tmp_path / folder / "runs/shapes/1-8" / name / "last.pt")["model"]
                      for folder in ("whole", "cut"))  # fmt: skip
        assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole), name


def test_a_failed_run_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    text = commands(("sup", "one-deep", "one-wide"))
    text = "\n".join(line + " --batch 1" if "teacher_deep" in line else line for line in text.splitlines())
    with pytest.raises(common.UserError, match=r"2 of 5 runs failed.*: runs/shapes/1-8/teacher-deep, runs/.*/one-deep-r18;"):
        run_matrix(monkeypatch, text)
    assert "[5/5] runs/shapes/1-8/one-wide-r18" in capsys.readouterr().out
    done = sorted(path.parent.name for path in (tmp_path / "runs/shapes/1-8").glob("*/last.pt"))
    assert done == ["one-wide-r18", "sup-r18", "teacher-wide"]


def test_the_plan_runs_nothing_and_adds_up(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matrix, "seconds_per_gmac", lambda args: 1.0)
    assert run_matrix(monkeypatch, commands(("mgd",)), "--dry-run") is not None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [
        f"runs/shapes/1-8/{n}" for n in ("teacher-deep", "teacher-wide", "mgd-r18")
    ]
    assert lines[3].startswith("3 runs, about") and not (tmp_path / "runs").exists()


def test_the_cost_is_that_of_the_forwards(monkeypatch):
    """One GMAC a forward: Sup costs 3 an image; with two views CPS 2 · (3 + 2 + 3), MGD 6 of the student's and 4 of each
    teacher's, one fewer with clean terms; labels alone 3 and 1 of each teacher's."""
    monkeypatch.setattr(matrix, "gmacs", lambda args, backbone: 1.0)
    train = "train_teacher.py --out x --backbone r18 --steps 10 --batch 2 --sup-only 0 --method"
    teach = "distill.py --out x --deep d --wide w --steps 10 --batch 2"
    for command, images in {
        f"{train} sup": 3, f"{train} cps": 16, f"{train} mt": 9, f"{train} cps --sup-only 0.5": 11,
        teach: 6 + 2 * 4, f"{teach} --mixed-terms clean": 6 + 2 * 3, f"{teach} --losses sup pixel:labeled": 3 + 2,
        f"{teach} --losses sup pixel": 6 + 2 * 3, f"{teach} --no-cutmix": 6 + 2 * 2, f"{teach} --method kd": 6 + 2 * 2,
    }.items():  # fmt: skip
        assert matrix.cost_of(matrix.arguments_of(command.split()), {}) == pytest.approx(20 * images), command


@pytest.mark.parametrize("table,rows", [
    ("1", "sup sup-x2 sup-x3 mt cps kd cwd mgd"), ("4", "one-deep one-wide two-deep two-wide mgd"),
    ("5", "sup pixel pixel-image pixel-region both-levels labeled unlabeled mgd"),
    ("6", "regions-3 regions-5 mgd regions-9 regions-11"),
    ("heads", "head-256 head-128 head-64 separable-256 separable-128 separable-64"),
])  # fmt: skip
def test_tables_are_made_of_their_rows_and_share_teachers(monkeypatch, tmp_path, table, rows):
    monkeypatch.chdir(tmp_path)
    more = ("DATASET=voc", "DATA=x", "STUDENT=mbv2", "SEEDS=0 1", "TEACHER_PART=1", f"TABLE={table}")
    matrix_line, evaluation = (line for line in make_n("matrix", *more).splitlines() if "last.pt" in line)
    targets = re.findall(r"\S+last\.pt", matrix_line)
    outs = re.findall(r"--out (\S+)", make_n(*targets, *more))
    trained = {"sup", "sup-x2", "sup-x3", "mt", "cps"}
    expected = {
        f"runs/voc/1-8/{row}-mbv2{'' if row in trained else '-of-1'}{seed}" for row in rows.split() for seed in ("", "-s1")
    }
    teachers = {f"runs/voc/1/teacher-{kind}{seed}" for kind in ("deep", "wide") for seed in ("", "-s1")}
    if table == "4":
        teachers |= {f"runs/voc/1/teacher-{kind}{seed}" for kind in ("deep", "wide") for seed in ("-s10", "-s11")}
    assert {*outs} == expected | teachers and len(outs) == len({*outs})
    assert evaluation.count("last.pt") == 2 * len(rows.split()) + 4


def test_a_row_goes_before_what_all_have():
    line = make_n("runs/shapes/1-8/separable-64-r18/last.pt", "ARGS=--head-width 32").splitlines()[-1]
    args = matrix.arguments_of(line.split())
    assert (args.head_width, args.separable_head, args.losses) == (64, True, ["sup", "pixel", "image:T_D", "region:T_W"])
    line = make_n("runs/shapes/1-8/both-levels-r18/last.pt", "STUDENT_ARGS=--steps 9", "MGD_ARGS=--regions 5").splitlines()[-1]
    args = matrix.arguments_of(line.split())
    assert (args.steps, args.regions, len(args.losses)) == (9, 5, 6)
