"""`make matrix`: what it runs, in which order, and what an interruption or a failure leaves."""

import io
import pathlib
import re
import shlex
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


@pytest.fixture(autouse=True)
def no_runs_yet(monkeypatch, tmp_path):
    """make leaves finished runs out, those in the project's own folder too."""
    monkeypatch.chdir(tmp_path)


class Processes:
    """Stands for `subprocess`: runs a stage in this process, and counts."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self):
        self.seen = []

    def run(self, line, shell, stdin):
        command = shlex.split(line)
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
    text = commands(("sup", "one-deep", "one-wide"))
    text = "\n".join(line + " --lr 1e30" if "teacher_deep" in line else line for line in text.splitlines())
    with pytest.raises(SystemExit, match=r"2 of 5 runs failed.*: runs/shapes/1-8/teacher-deep, runs/.*/one-deep-r18;"):
        run_matrix(monkeypatch, text)
    assert "[5/5] runs/shapes/1-8/one-wide-r18" in capsys.readouterr().out
    done = sorted(path.parent.name for path in (tmp_path / "runs/shapes/1-8").glob("*/last.pt"))
    assert done == ["one-wide-r18", "sup-r18", "teacher-wide"]


@pytest.mark.parametrize("code,evaluated", [(0, True), (1, True), (2, False), (130, False)])
def test_make_matrix_evaluates_what_is_there(tmp_path, code, evaluated):
    """With a stand-in for python, which says how it is called: matrix.py ends with `code`."""
    for name in ("kd-r18", "teacher-deep"):
        (tmp_path / "runs/shapes/1-8" / name).mkdir(parents=True)
        (tmp_path / "runs/shapes/1-8" / name / "last.pt").touch()
    stand_in = f'echo "called $*"; [ $1 != matrix.py ] || {{ cat > /dev/null; exit {code}; }}'
    (tmp_path / "python").write_text(f"#!/bin/sh\n{stand_in}\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    command = ["make", "matrix", "TABLE=1", "VENV=", "PYTHON=./python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == (code == 0)
    run = "runs/shapes/1-8"
    evaluation = f"called evaluate.py --ckpt {run}/kd-r18/last.pt --compare {run}/teacher-deep/last.pt --json"
    assert (evaluation in done.stdout) == evaluated and done.stdout.count("called") == 1 + evaluated, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["teacher-wide", "sup-r18", "mgd-r18"])
def test_make_leaves_a_finished_run_when_it_is_interrupted(tmp_path, target):
    """With a stand-in for python, which finishes its run and then ends make: by SIGTERM, as SIGINT may be ignored here."""
    for name in {"teacher-deep", "teacher-wide"} - {target}:
        (tmp_path / "runs/shapes/1-8" / name).mkdir(parents=True)
        (tmp_path / "runs/shapes/1-8" / name / "last.pt").touch()
    (tmp_path / "python").write_text("#!/bin/sh\nmkdir -p $3\necho done > $3/last.pt\nkill -TERM $PPID\nsleep 5\n")
    (tmp_path / "python").chmod(0o755)
    last = f"runs/shapes/1-8/{target}/last.pt"
    command = ["make", "-f", str(ROOT / "Makefile"), last, "VENV=", "PYTHON=./python"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and (tmp_path / last).read_text() == "done\n", done.stderr


def test_wrong_flags_are_named_before_anything_is_run(monkeypatch, tmp_path, capsys):
    text = commands(("sup", "kd"))
    with pytest.raises(common.UserError, match="runs/shapes/1-8/kd-r18: --temperature -1"):
        run_matrix(monkeypatch, "\n".join(line + " --temperature -1" * ("kd" in line) for line in text.splitlines()))
    assert not (tmp_path / "runs").exists()


def test_the_plan_runs_nothing_and_adds_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matrix, "seconds_per_gmac", lambda args: 3600.0)
    assert run_matrix(monkeypatch, commands(("mgd",)), "--dry-run") == [] and not (tmp_path / "runs").exists()
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0].split("/")[-1] for line in lines] == ["teacher-deep", "teacher-wide", "mgd-r18"]

    def seconds(line):
        days, clock = re.search(r"about (?:(\d+) days?, )?(\d+:\d+:\d+)", line).groups()
        hours, minutes, rest = map(int, clock.split(":"))
        return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + rest

    assert total.startswith("3 runs, ") and seconds(total) == pytest.approx(sum(map(seconds, lines)), abs=2)
    assert min(map(seconds, lines)) > 60


def test_the_cost_is_that_of_the_forwards(monkeypatch):
    """One GMAC a forward: Sup costs 3 an image; with two views CPS 2 · (3 + 2 + 3), MGD 6 of the student's and 4 of each
    teacher's, one fewer with clean terms; labels alone 3 and 1 of each teacher's."""
    monkeypatch.setattr(matrix, "gmacs", lambda args: 1.0)
    teacher = matrix.arguments_of(["train_teacher.py", "--out", "d"])
    runs = {pathlib.Path("d"): teacher, pathlib.Path("w"): teacher}
    train = "train_teacher.py --out x --backbone r18 --steps 10 --batch 2 --sup-only 0 --method"
    teach = "distill.py --out x --deep d --wide w --steps 10 --batch 2"
    for command, images in {
        f"{train} sup": 3, f"{train} cps": 16, f"{train} mt": 9, f"{train} cps --sup-only 0.5": 11,
        teach: 6 + 2 * 4, f"{teach} --mixed-terms clean": 6 + 2 * 3, f"{teach} --losses sup pixel:labeled": 3 + 2,
        f"{teach} --losses sup pixel": 6 + 2 * 3, f"{teach} --no-cutmix": 6 + 2 * 2, f"{teach} --method kd": 6 + 2 * 2,
    }.items():  # fmt: skip
        assert matrix.cost_of(matrix.arguments_of(command.split()), runs) == pytest.approx(20 * images), command


@pytest.mark.parametrize("table,rows", [
    ("1", "sup sup-x2 sup-x3 mt cps kd cwd mgd"), ("4", "one-deep one-wide two-deep two-wide mgd"),
    ("5", "sup pixel pixel-image pixel-region both-levels labeled unlabeled mgd"),
    ("6", "regions-3 regions-5 mgd regions-9 regions-11"),
    ("heads", "head-256 head-128 head-64 separable-256 separable-128 separable-64"),
])  # fmt: skip
def test_tables_are_made_of_their_rows_and_share_teachers(table, rows):
    more = ("DATASET=voc", "DATA=x", "STUDENT=mbv2", "SEEDS=0 1", "TEACHER_PART=1", f"TABLE={table}")
    matrix_line, evaluation, _ = make_n("matrix", *more).splitlines()[-3:]
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


D, W, D2, W2 = "teacher-deep", "teacher-wide", "teacher-deep-s10", "teacher-wide-s10"
ALL = "sup pixel image:T_D region:T_W"


@pytest.mark.parametrize("row,deep,wide,expected", [
    ("kd", D, W, {"method": "kd"}), ("cwd", D, W, {"method": "cwd"}), ("mgd", D, W, {"method": "mgd", "losses": ALL}),
    ("one-deep", D, None, {"losses": "sup pixel image:T_D region:T_D"}), ("two-deep", D, D2, {"losses": ALL}),
    ("one-wide", None, W, {"losses": "sup pixel image:T_W region:T_W"}), ("two-wide", W, W2, {"losses": ALL}),
    ("pixel", D, W, {"losses": "sup pixel"}), ("pixel-image", D, W, {"losses": "sup pixel image:T_D"}),
    ("pixel-region", D, W, {"losses": "sup pixel region:T_W"}), ("labeled", D, W, {"losses": "sup pixel:labeled"}),
    ("both-levels", D, W, {"losses": "sup pixel image:T_D image:T_W region:T_D region:T_W"}),
    ("unlabeled", D, W, {"losses": "sup pixel:unlabeled image:T_D region:T_W"}),
    ("regions-3", D, W, {"regions": 3, "losses": ALL}), ("regions-11", D, W, {"regions": 11, "losses": ALL}),
    ("head-128", D, W, {"head_width": 128, "separable_head": False}),
    ("separable-64", D, W, {"head_width": 64, "separable_head": True}),
])  # fmt: skip
def test_rows_are_what_they_are_called(row, deep, wide, expected):
    """Also where ARGS say otherwise."""
    line = make_n(f"runs/shapes/1-8/{row}-r18/last.pt", "ARGS=--head-width 32", "STUDENT_ARGS=--regions 5").splitlines()[-1]
    args = matrix.arguments_of(line.split())
    assert [path and path.parent.name for path in (args.deep, args.wide)] == [deep, wide]
    expected = {"head_width": 32, "regions": 5, "seed": 0, **expected}
    for key, value in expected.items():
        assert getattr(args, key) == (value.split() if key == "losses" else value), key


@pytest.mark.parametrize("row,expected", [
    ("sup", {"method": "sup", "steps": 10}), ("sup-x2", {"method": "sup", "steps": 20}), ("cps", {"method": "cps"}),
    ("sup-x3", {"method": "sup", "steps": 30}), ("mt", {"method": "mt", "mt_weight": 5.0}),
])  # fmt: skip
def test_baselines_are_what_they_are_called(row, expected):
    more = ("STUDENT_ARGS=--steps 10", "MT_ARGS=--mt-weight 5", "SEEDS=3", "STUDENT=mbv2")
    args = matrix.arguments_of(make_n(f"runs/shapes/1-8/{row}-mbv2-s3/last.pt", *more).splitlines()[-1].split())
    for key, value in {"steps": 10, "seed": 3, "backbone": "mobilenetv2", "role": "student", **expected}.items():
        assert getattr(args, key) == value, key


def test_teachers_of_one_seed_have_students_of_their_own():
    lines = make_n("distill", "SEEDS=1 2", "TEACHER_SEED=0").splitlines()
    assert len(lines) == 4 and all("teacher-deep/last.pt --wide runs/shapes/1-8/teacher-wide/last.pt" in x for x in lines[2:])
    assert [re.search(r"--out \S+/(\S+)", line)[1] for line in lines[2:]] == ["mgd-r18-t0-s1", "mgd-r18-t0-s2"]


def test_students_in_a_folder_of_their_own_share_the_teachers():
    teacher, _, student = make_n("distill", "RUN=runs/short", "STUDENT_ARGS=--steps 5").splitlines()
    assert "--out runs/shapes/1-8/teacher-deep " in teacher and "--steps" not in teacher
    assert "--out runs/short/mgd-r18 " in student and "--deep runs/shapes/1-8/teacher-deep/last.pt" in student
    assert "--json runs/short/matrix-1-r18.json" in make_n("matrix", "RUN=runs/short")


def test_an_unknown_table_is_refused():
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make_n("matrix", "TABLE=1 7")
    assert "TABLE=7: unknown; take some of 1 4 5 6 heads" in failed.value.stderr
