"""The Makefile: what `make -n` plans, what it refuses before anything is installed or trained, and what it says."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

import backbones
import recipes
from paper import matrix

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PHONY = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
VARIABLES = dict(re.findall(r"^([A-Z_]+) =(.*?)##", MAKEFILE, re.M))


@pytest.fixture(autouse=True)
def no_runs_yet(monkeypatch, tmp_path):
    """make leaves finished runs out, those in the project's own folder too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    for name in ("pyproject.toml", "constraints.txt"):  # older than any environment made of them
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))


def call_make(*arguments, **environment):
    command = ["make", "--no-print-directory", *arguments]
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(command, capture_output=True, text=True, env=env | environment, stdin=subprocess.DEVNULL)


def plan(*arguments, **environment) -> list[list[str]]:
    """The words of each command that would be run."""
    done = call_make("-n", "VENV=", "PYTHON=python", *arguments, **environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def scripts(commands) -> list[str]:
    return [next(word for word in command if word.endswith(".py")) for command in commands]


def stand_in(tmp_path, script: str) -> list[str]:
    """A program in the place of python."""
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    return ["VENV=", "PYTHON=./python"]


def finish(tmp_path, *names):
    for name in names:
        (tmp_path / "runs/shapes/1-8" / name).mkdir(parents=True)
        (tmp_path / "runs/shapes/1-8" / name / "last.pt").touch()


# ---- what is planned ----


def test_distill_trains_missing_teachers_first():
    lines = plan("distill", "PART=1/8", "STUDENT=mbv2", "DATA=data/mine", "DATASET=folder", "SEEDS=2")
    run = "runs/mine/1-8"
    assert scripts(lines) == ["train_teacher.py", "train_teacher.py", "distill.py"]
    assert [after(line, "--out") for line in lines] == [
        f"{run}/teacher-deep-s2",
        f"{run}/teacher-wide-s2",
        f"{run}/mgd-mbv2-s2",
    ]
    assert after(lines[0], "--role") == "teacher_deep" and after(lines[1], "--role") == "teacher_wide"
    assert {after(line, "--seed") for line in lines} == {"2"} and after(lines[2], "--student") == "mbv2"
    assert {(after(line, "--part"), after(line, "--data"), after(line, "--dataset")) for line in lines} == {
        ("1/8", "data/mine", "folder")
    }
    assert after(lines[2], "--deep") == f"{run}/teacher-deep-s2/last.pt"
    assert after(lines[2], "--wide") == f"{run}/teacher-wide-s2/last.pt"


def test_arguments_are_passed_on_and_runs_repeated_for_each_seed():
    more = ("ARGS=--lr 1", "TEACHER_ARGS=--sup-only 0", "MGD_ARGS=--regions 3", "STUDENT_ARGS=--val-every 9", "SEEDS=0 1 2")
    *train, evaluation = plan("compare", "DATA=data/mine", "DATASET=folder", *more)
    assert len(train) == 15 and all(after(line, "--lr") == "1" for line in train)
    assert sum("--sup-only" in line for line in train) == 6 == sum("--role" in line for line in train)
    assert sum("--val-every" in line for line in train) == 9  # two Sup and one MGD per seed
    assert [line for line in train if "--regions" in line] == [line for line in train if "distill.py" in line] != []
    assert sum(word.endswith("last.pt") for word in evaluation) == 15
    assert after(evaluation, "--json") == "runs/mine/1-8/compare-r18.json"
    assert after(evaluation, "--panels") == "runs/mine/1-8/compare-r18.png"


def test_the_light_recipe_has_networks_of_its_own():
    """Whatever is given stays: the scripts have the defaults of the teachers, and the names of folders need the student's."""
    *train, evaluation = plan("compare", "DATASET=folder", "DATA=data/mine", "RECIPE=light")
    assert len(train) == 5 and all(after(line, "--recipe") == "light" for line in train) and "--recipe" not in evaluation
    args = {args.out.name: args for args in (matrix.arguments_of(line[1:]) for line in train)}
    assert {name: (args[name].backbone, args[name].head_width, args[name].separable_head) for name in args} == {
        "teacher-deep": ("efficientnet_lite2", 256, False), "teacher-wide": ("efficientnet_lite0", 256, False),
        **{f"{kind}-el0": ("efficientnet_lite0", 64, True) for kind in ("sup", "sup-x3", "mgd")},
    }  # fmt: skip
    assert matrix.parse_args(["--recipe", "light"]).student == "el0" and matrix.parse_args([]).student == "r18"
    *train, _ = plan("compare", "DATASET=folder", "DATA=data/mine", "RECIPE=light", "STUDENT=r18", "WIDE=r34")
    assert [matrix.arguments_of(line[1:]).backbone for line in train].count("resnet18") == 3
    assert [matrix.arguments_of(line[1:]).backbone for line in train].count("resnet34") == 1
    assert not any("--recipe" in line for line in plan("compare", "RECIPE=paper")) and not call_make("-n", "demo").stderr


def test_several_processes_run_under_torchrun():
    lines = plan("compare", "NPROC=4", "SEEDS=3", "PART=1/2")
    assert len(lines) == 6
    assert all(line[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"] for line in lines)


def test_demo_is_compare_on_the_embedded_data_set():
    _, *demo = plan("demo", "SEEDS=0 1", "REPORT=results/demo")
    assert demo == plan("compare", "PART=1/32", "SEEDS=0 1", "REPORT=results/demo")
    assert after(demo[-1], "--json") == "results/demo.json" and len(demo) == 11


def test_comparisons_of_two_methods_do_not_replace_each_other():
    named = [{word for word in plan("compare", f"METHOD={method}")[-1] if "/compare-" in word} for method in ("mgd", "mgd+")]
    assert len(named[0]) == len(named[1]) == 2 and not named[0] & named[1]


@pytest.mark.parametrize("more", [
    [], ["SEEDS=0 2 10", "STUDENT=mbv2"], ["METHOD=mgd+", "SEEDS=0 1", "TEACHER_PART=1", "MGD_ARGS=--refine 0"],
    ["TEACHER_PART=1", "DATASET=voc", "DATA=x", "SEEDS=1"], ["RUN=runs/short/x"],
    ["TEACHER_SEED=3", "SEEDS=0 1", "DEEP=r34", "WIDE=r18", "ARGS=--lr 1 --steps 9", "TEACHER_ARGS=--method sup"],
    ["WIDE_CKPT=good/a.pt", "MGD_ARGS=--regions 3"], ["DEEP_CKPT=runs/good/last.pt", "WIDE_CKPT=good/a.pt", "SEEDS=0 1"],
    ["DATASET=folder", "DATA=data/mine/", "PART=1/16", "STUDENT_ARGS=--steps 5 --scales 0.75 1"],
    ["DATASET=folder", "DATA=data/mine", "RECIPE=light"],
    ["DATASET=voc", "DATA=x", "RECIPE=light", "STUDENT=r18", "DEEP=el1"],
])  # fmt: skip
def test_rules_and_matrix_make_the_same_runs(tmp_path, more):
    """What `make distill` and `make sup` train is what the same rows of a table are, file for file."""
    for path in ("good/a.pt", "runs/good/last.pt"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    (command,) = plan("matrix", *(word for word in more if not word.startswith("METHOD=")))
    assert command[:3] == ["python", "-m", "paper.matrix"]
    args = matrix.parse_args([*command[3:], "--rows", "sup", "sup-x3", "mgd-plus" if "METHOD=mgd+" in more else "mgd"])
    expected = {str(out): vars(matrix.arguments_of(command)) for out, command in matrix.plan(args).items()}
    *made, evaluation = plan("compare", *more)
    assert len(made) == len(matrix.plan(args))
    assert {line[line.index("--out") + 1]: vars(matrix.arguments_of(line[1:])) for line in made} == expected
    for path in map(pathlib.Path, [word for word in evaluation if word.endswith(".pt")]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert {word for word in evaluation if word.endswith(".pt")} == {*matrix.to_evaluate(args)}


def test_matrix_hands_every_variable_on(tmp_path):
    (tmp_path / "a.pt").touch()
    flags = {f"{name}_ARGS": f"--{name.lower()} 1 2" for name in ("TEACHER", "STUDENT", "MT", "CPS", "KD", "CWD", "MGD")}
    given = {
        "DATASET": "folder", "DATA": "data/mine", "PART": "1/4", "RECIPE": "light", "STUDENT": "mbv2", "SEEDS": "1 2",
        "DEEP": "r34", "WIDE": "r50", "DEEP_CKPT": "a.pt", "WIDE_CKPT": "a.pt", "TEACHER_PART": "1", "TEACHER_SEED": "0",
        "TABLES": "1 5a",
        "RUN": "runs/x", "REPORT": "results/y", "NPROC": "2", "DRY": "1", "ARGS": "--lr 1", **flags,
    }  # fmt: skip
    (command,) = plan("matrix", *(f"{name}={value}" for name, value in given.items()))
    args = vars(matrix.parse_args(command[3:]))
    for name, value in given.items():
        key = {"ARGS": "every_args", "REPORT": "json", "DRY": "dry_run"}.get(name, name.lower())
        found = args[key]
        text = " ".join(map(str, found)) if isinstance(found, list) else str(found)
        assert text == {"REPORT": "results/y.json", "DRY": "True"}.get(name, value), name
    unused = {*VARIABLES} - {*given} - {"VENV", "PYTHON", "EXTRAS", "CKPT", "METHOD"}
    assert not unused  # a new variable is handed on too, or named here


def test_the_environment_is_not_read():
    given = dict.fromkeys(VARIABLES, "my data")
    for target in PHONY:
        found = call_make("-n", target, **given)
        assert found.returncode == 0 and found.stdout == call_make("-n", target).stdout, target


def test_venv_is_made_where_it_is_missing():
    made = call_make("-n", "test", "EXTRAS=test,voc").stdout.splitlines()
    assert made[0] == "python3 -m venv .venv" and "[test,voc]'" in made[2]
    run = "-m pytest -q -n auto --maxprocesses 4 --dist loadfile tests"
    assert made[-1] == f"OMP_NUM_THREADS=1 .venv/bin/python {run}"
    assert plan("test", "VENV=")[-1][-len(run.split()) - 1 :] == ["python", *run.split()]  # as it is
    pathlib.Path("venv/bin").mkdir(parents=True)
    pathlib.Path(f"venv/.installed-{VARIABLES['EXTRAS'].strip()}").touch()
    assert call_make("-n", "test", "VENV=venv").stdout.splitlines() == [f"OMP_NUM_THREADS=1 venv/bin/python {run}"]
    assert "-m pip install" in call_make("-n", "install", "VENV=venv", "EXTRAS=voc").stdout  # others than there are


def test_an_installation_leaves_nothing_beside_the_sources(tmp_path):
    """pip, for which a stand-in stands here, leaves build/ and *.egg-info in the folder of what it installs."""
    (tmp_path / "README.md").touch()
    venv = '[ "$2" != venv ] || { mkdir -p venv/bin && cp python venv/bin; exit; }'
    stand_in(tmp_path, f'{venv}\nfor what; do :; done\ncd "${{what%[*}}" && cat pyproject.toml README.md && touch build')
    before = {*os.listdir()}
    done = call_make("install", "VENV=venv", "PYTHON=./python")
    assert done.returncode == 0 and {*os.listdir()} == before | {"venv"}, done.stderr
    assert "Nothing to be done" in call_make("install", "VENV=venv").stdout


def test_ci_runs_what_a_contributor_runs():
    assert re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M) == ["lint", "test"]


# ---- what is said ----


def test_help_names_every_target_and_variable():
    text = call_make("help").stdout
    assert text == call_make().stdout and {"distill", "test-fast"} <= {*PHONY} and "DEEP_CKPT" in VARIABLES
    for target in PHONY:
        assert re.search(rf"^make {target} +\S.*$", text, re.M), target
    for name, value in VARIABLES.items():
        assert f"{name}={value.strip()}" in text, name
    allowed = {*re.findall(r"\w+", call_make("X=1").stderr.split("there are")[1].removesuffix(".  Stop.\n"))}
    assert allowed == {*VARIABLES}


@pytest.mark.parametrize("target,name,fix", [
    ("distill", "mgd-r18", "RUN="), ("sup", "sup-r18", "RUN="), ("teachers", "teacher-wide", "delete it"),
])  # fmt: skip
def test_a_finished_run_is_named_and_never_retrained(tmp_path, target, name, fix):
    finish(tmp_path, "teacher-deep", "teacher-wide", "mgd-r18", "sup-r18")
    done = call_make(target, *stand_in(tmp_path, "exit 1"), "ARGS=--steps 999")
    assert done.returncode == 0 and "Nothing to be done" not in done.stdout
    assert re.search(rf"^runs/shapes/1-8/{name}/last.pt: finished, never retrained; .*{fix}", done.stdout, re.M), done.stdout
    assert "never retrained" not in call_make("-n", target, "SEEDS=1", "VENV=").stdout  # not there yet


@pytest.mark.slow
@pytest.mark.parametrize("target", ["teacher-wide", "sup-r18", "mgd-r18"])
def test_a_finished_run_stays_when_make_is_interrupted(tmp_path, target):
    """With a stand-in for python, which finishes its run and then ends make: by SIGTERM, as SIGINT may be ignored here."""
    finish(tmp_path, *{"teacher-deep", "teacher-wide"} - {target})
    last = f"runs/shapes/1-8/{target}/last.pt"
    python = stand_in(tmp_path, "mkdir -p $3\necho done > $3/last.pt\nkill -TERM $PPID\nsleep 5")
    done = call_make(last, *python)
    assert done.returncode != 0 and (tmp_path / last).read_text() == "done\n", done.stderr


# ---- what is refused ----

WRONG = [
    ("STUDENT=vgg", "r18"), ("STUDENT=resnet18", "r18"), ("DEEP=foo", "r101"), ("WIDE=wide_resnet34", "wr34 ("),
    ("DATASET=camvid", "DATASET=folder DATA=data/camvid"), ("DATA=my data", "spaces"), ("DATASET=folder", "DATA="),
    ("PART=0.125", "1/8"), ("PART=1 / 8", "spaces"), ("PART=1/0", "1/8"), ("PART=1/", "1/8"), ("PART=/", "1/8"),
    ("PART=2/3", "1/8"), ("PART=", "empty"), ("TEACHER_PART=all", "1 for all"), ("SEEDS=0,1", "SEEDS=\"0 1 2\""),
    ("SEEDS=", "empty"), ("SEEDS=01", "whole"), ("SEEDS=-n", "whole"), ("TEACHER_SEED=-1", "whole"), ("NPROC=0", "4"),
    ("NPROC=two", "4"), ("RECIPE=fast", "paper or light"), ("RECIPE=", "empty"), ("DEEP_CKPT=absent.pt", "no such file"),
    ("WIDE_CKPT=a b.pt", "spaces"), ("RUN=my runs", "spaces"), ("RUN=/", "runs/mine"),
    ("REPORT=a b", "spaces"), ("VENV=a b", "spaces"), ("EXTRAS=voc test", "spaces"),
]  # fmt: skip


@pytest.mark.parametrize("given,fix", WRONG)
def test_wrong_values_are_refused_before_anything_is_installed(given, fix):
    for target in ("distill", "matrix"):
        done = call_make("-n", target, given)
        assert done.returncode == 2 and not done.stdout
        name = "DATA" if given == "DATASET=folder" else given.split("=")[0]
        assert f"*** {name}=" in done.stderr and fix in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_an_unknown_variable_is_refused_everywhere():
    for target in PHONY:
        done = call_make("-n", target, "STUDNET=mbv2")
        assert done.returncode == 2 and not done.stdout
        assert "STUDNET: no such variable; there are DATASET DATA PART RECIPE STUDENT" in done.stderr


@pytest.mark.parametrize("given", [
    "PART=1/8 ", "PART= 1/8", " STUDENT=r18", "STUDENT=r18 ", "DATASET=shapes ", "SEEDS= 0 ", "RUN= ", "RUN=",
    "TEACHER_PART=1/8 ", "DEEP= ", "DATA= ", "NPROC= 1 ", "REPORT= ", "TEACHER_SEED=", "ARGS= ", "DEEP_CKPT= ",
])  # fmt: skip
def test_spaces_around_a_value_change_nothing(given):
    name, value = given.split("=")
    assert plan("compare", f"{name.strip()}={value}") == plan("compare")


def test_runs_of_folders_with_odd_names_stay_below_runs(tmp_path):
    here = tmp_path.name
    for data, name in (("data/mine/", "mine"), (".", here), ("x/..", here), ("/a//b//", "b"), ("../" + here, here)):
        outs = {after(line, "--out") for line in plan("distill", "DATASET=folder", f"DATA={data}")}
        assert all(out.startswith(f"runs/{name}/1-8/") for out in outs), (data, outs)
    assert call_make("-n", "distill", "DATASET=folder", "DATA=/").returncode == 2


@pytest.mark.parametrize("name", ["a$(touch${IFS}bad)", "a`touch${IFS}bad`", "a;touch bad", "a'b", "a%b", "a:b", "a b"])
def test_a_name_that_dots_lead_to_is_not_run_either(tmp_path, name):
    folder = tmp_path / name
    (folder / "data").mkdir(parents=True)
    for data in (".", "data/.."):
        given = ["-f", ROOT / "Makefile", "distill", "DATASET=folder", f"DATA={data}", "VENV=", "PYTHON=true"]
        done = subprocess.run(["make", *given], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2 and f"DATA={data}: leads to a folder with" in done.stderr, done.stderr
    assert [path.name for path in folder.iterdir()] == ["data"]


@pytest.mark.parametrize("text", [
    "; touch bad", "$(shell touch bad)", "`touch bad`", "$$(touch bad)", "| touch bad", "& touch bad", "> bad", "\n touch bad",
    "' ; touch bad '", '" ; touch bad "', "x # y", "*", "~",
])  # fmt: skip
def test_no_variable_is_run_by_the_shell(tmp_path, text):
    python = stand_in(tmp_path, "exit 0")
    for name in VARIABLES:
        done = call_make("matrix", *(x for x in python if not x.startswith(f"{name}=")), f"{name}={text}")
        assert not (tmp_path / "bad").exists(), (name, text)
        if "\n" not in text:
            assert done.returncode == 2 and f"{name}=" in done.stderr, (name, done.stderr)


def test_what_scripts_take_make_takes():
    """Their lists stand in the Makefile once more, since it checks before there is a Python with torch."""
    for name in backbones.ALIASES:
        plan("distill", f"STUDENT={name}", f"DEEP={name}", f"WIDE={name}")
    for name in recipes.RECIPES:
        plan("distill", f"DATASET={name}", "DATA=data/mine")
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    assert sorted([*VARIABLES["EXTRAS"].strip().split(","), "imagenet"]) == sorted(re.findall(r"^(\w+) =", extras, re.M))
