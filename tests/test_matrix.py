"""The runs of the paper's tables: which, in which order, at what cost, and what an interruption or a failure leaves."""

import pathlib
import re
import subprocess

import pytest
import torch
from conftest import TINY

import common
import distill
import recipes
import run_folder
from paper import matrix
from stop_signals import EXIT_CODE

STEPS = ["--steps", "2", "--save-every", "1", "--sup-only", "0", "--ramp-up", "0"]
SMALL = [
    f"--args={' '.join([*TINY, *STEPS[:4]])}",
    f"--teacher-args={' '.join(STEPS[4:])}",
    *("--deep", "r18", "--wide", "mbv2"),
    *("--rows", "kd", "mgd"),
]


@pytest.fixture(autouse=True)
def no_runs_yet(monkeypatch, tmp_path):
    """Finished runs are left out, those in the project's own folder too."""
    monkeypatch.chdir(tmp_path)


def plan(*options) -> dict[str, list[str]]:
    return {str(out): command for out, command in matrix.plan(matrix.parse_args(options)).items()}


def arguments(*options) -> dict:
    """The arguments of a plan's commands, as the scripts parse them, by the name of the run's folder."""
    return {pathlib.Path(out).name: matrix.arguments_of(command) for out, command in plan(*options).items()}


class Ended:
    """A process that has ended."""

    def __init__(self, command, code: int):
        self.code = code

    def wait(self) -> int:
        return self.code


class Processes:
    """Stands for `subprocess`: runs a training in this process, or none, and writes down what was started."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self, code_of=None, evaluation=0):
        self.trained, self.evaluated = [], None
        self.code_of, self.evaluation = code_of, evaluation

    def Popen(self, command, stdin):
        index = next(i for i, word in enumerate(command) if word.endswith(".py"))
        script, arguments = pathlib.Path(command[index]).name, command[index + 1 :]
        if script == "evaluate.py":
            self.evaluated = arguments
            return Ended(command, self.evaluation)
        out = pathlib.Path(arguments[arguments.index("--out") + 1])
        self.trained.append(out.name)
        if self.code_of is not None:
            return Ended(command, self.code_of(out))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [script, *arguments])
            try:
                matrix.SCRIPTS[script].main()
            except common.UserError as error:
                print(error)
                return Ended(command, 2)
        return Ended(command, 0)


def run_matrix(monkeypatch, *options, **processes) -> Processes:
    processes = Processes(**processes)
    monkeypatch.setattr(matrix, "subprocess", processes)
    try:
        matrix.main(options)
    finally:
        run_matrix.last = processes
    return processes


def finished(out: pathlib.Path) -> int:
    """A training that only leaves its checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "last.pt").touch()
    return 0


# ---- which runs ----


@pytest.mark.parametrize(
    "table,rows",
    [
        ("1", "sup sup-x2 sup-x3 mt cps kd cwd mgd mgd-plus"),
        ("4", "one-deep one-wide two-deep two-wide mgd"),
        ("5", "sup pixel pixel-image pixel-region both-levels labeled unlabeled mgd"),
        ("5a", "sup pixel pixel-image pixel-region both-levels mgd"),
        ("5b", "labeled unlabeled mgd"),
        ("6", "regions-3 regions-5 mgd regions-9 regions-11"),
        ("heads", "head-256 head-128 head-64 separable-256 separable-128 separable-64"),
    ],
)
def test_tables_are_made_of_their_rows_and_share_teachers(table, rows):
    options = ["--dataset", "voc", "--data", "x", "--student", "mbv2", "--seeds", "0", "1", "--teacher-part", "1"]
    runs = plan("--tables", table, *options)
    trained = {"sup", "sup-x2", "sup-x3", "mt", "cps"}
    expected = {
        f"runs/voc/1-8/{row}-mbv2{'' if row in trained else '-of-1'}{seed}" for row in rows.split() for seed in ("", "-s1")
    }
    teachers = {f"runs/voc/1/teacher-{kind}{seed}" for kind in ("deep", "wide") for seed in ("", "-s1")}
    if table == "4":
        teachers |= {f"runs/voc/1/teacher-{kind}{seed}" for kind in ("deep", "wide") for seed in ("-s10", "-s11")}
    assert {*runs} == expected | teachers
    seen = set()
    for out, command in runs.items():
        needed = {str(pathlib.Path(command[i + 1]).parent) for i, word in enumerate(command) if word in ("--deep", "--wide")}
        assert needed <= seen  # teachers come first
        seen.add(out)
        assert command[command.index("--part") + 1] == ("1" if out in teachers else "1/8")


@pytest.mark.parametrize("table,dataset", [("2", "voc-few"), ("3", "cityscapes")])
def test_tables_2_and_3_are_table_1_for_their_data_sets(table, dataset):
    data = ["--data", "x", "--dataset"]
    assert plan("--tables", table, *data, dataset) == plan("--tables", "1", *data, dataset)
    with pytest.raises(common.UserError, match=f"--tables {table}: belongs to {dataset}; give --dataset {dataset}"):
        plan("--tables", table, *data, "voc")


def test_runs_of_several_tables_are_trained_once():
    both = plan("--tables", "1", "4", "5")
    assert both.keys() == plan("--tables", "1").keys() | plan("--tables", "4").keys() | plan("--tables", "5").keys()


D, W, D2, W2 = "teacher-deep", "teacher-wide", "teacher-deep-s10", "teacher-wide-s10"
ALL = "sup pixel image:T_D region:T_W"


@pytest.mark.parametrize(
    "row,deep,wide,expected",
    [
        ("kd", D, W, {"method": "kd"}),
        ("cwd", D, W, {"method": "cwd"}),
        ("mgd", D, W, {"method": "mgd", "losses": ALL, "logit_adjustment": None}),
        ("mgd-plus", D, W, {"method": "mgd+", "losses": ALL, **recipes.OF_METHOD["mgd+"]}),
        ("one-deep", D, None, {"losses": "sup pixel image:T_D region:T_D"}),
        ("two-deep", D, D2, {"losses": ALL}),
        ("one-wide", None, W, {"losses": "sup pixel image:T_W region:T_W"}),
        ("two-wide", W, W2, {"losses": ALL}),
        ("pixel", D, W, {"losses": "sup pixel"}),
        ("pixel-image", D, W, {"losses": "sup pixel image:T_D"}),
        ("pixel-region", D, W, {"losses": "sup pixel region:T_W"}),
        ("labeled", D, W, {"losses": "sup pixel:labeled"}),
        ("both-levels", D, W, {"losses": "sup pixel image:T_D image:T_W region:T_D region:T_W"}),
        ("unlabeled", D, W, {"losses": "sup pixel:unlabeled image:T_D region:T_W"}),
        ("regions-3", D, W, {"regions": 3, "losses": ALL}),
        ("regions-11", D, W, {"regions": 11, "losses": ALL}),
        ("head-128", D, W, {"head_width": 128, "separable_head": False}),
        ("separable-64", D, W, {"head_width": 64, "separable_head": True}),
    ],
)
def test_rows_are_what_they_are_called(row, deep, wide, expected):
    """Also where the flags passed on contradict it."""
    args = arguments("--rows", row, "--args=--head-width 32", "--student-args=--regions 5")[f"{row}-r18"]
    assert [path and path.parent.name for path in (args.deep, args.wide)] == [deep, wide]
    expected = {"head_width": 32, "regions": 5, "seed": 0, **expected}
    for key, value in expected.items():
        assert getattr(args, key) == (value.split() if key == "losses" else value), key


@pytest.mark.parametrize(
    "row,expected",
    [
        ("sup", {"method": "sup", "steps": 10}),
        ("sup-x2", {"method": "sup", "steps": 20}),
        ("cps", {"method": "cps"}),
        ("sup-x3", {"method": "sup", "steps": 30}),
        ("mt", {"method": "mt", "mt_weight": 5.0}),
    ],
)
def test_baselines_are_what_they_are_called(row, expected):
    more = ["--student-args=--steps 10", "--mt-args=--mt-weight 5", "--seeds", "3", "--student", "mbv2"]
    args = arguments("--rows", row, *more)[f"{row}-mbv2-s3"]
    for key, value in {"steps": 10, "seed": 3, "backbone": "mobilenetv2", "role": "student", **expected}.items():
        assert getattr(args, key) == value, key


def test_flags_go_to_the_runs_that_they_are_for():
    runs = arguments(
        "--args=--lr 1",
        "--teacher-args=--sup-only 0.2",
        "--student-args=--steps 7",
        "--mgd-args=--regions 3",
        "--kd-args=--temperature 2",
        "--cps-args=--cps-weight 9",
    )
    assert {args.lr for args in runs.values()} == {1.0}
    assert [name for name, args in runs.items() if getattr(args, "sup_only", None) == 0.2] == ["teacher-deep", "teacher-wide"]
    assert {args.steps for name, args in runs.items() if "teacher" not in name} == {7, 14, 21}
    assert {name for name, args in runs.items() if getattr(args, "regions", 7) == 3} == {"mgd-r18", "mgd-plus-r18"}
    assert {name for name, args in runs.items() if getattr(args, "temperature", 4) == 2} == {"kd-r18"}
    assert {name for name, args in runs.items() if getattr(args, "cps_weight", 1) == 9} == {"cps-r18"}


def test_teachers_of_one_seed_have_students_of_their_own():
    runs = arguments("--rows", "mgd", "--seeds", "1", "2", "--teacher-seed", "0")
    assert [*runs] == ["teacher-deep", "teacher-wide", "mgd-r18-t0-s1", "mgd-r18-t0-s2"]
    assert [args.seed for args in runs.values()] == [0, 0, 1, 2]
    assert {(runs[name].deep.parent.name, runs[name].wide.parent.name) for name in [*runs][2:]} == {(D, W)}


def test_students_in_a_folder_of_their_own_share_the_teachers():
    options = ["--rows", "mgd", "--run", "runs/short", "--student-args=--steps 5"]
    teacher, _, student = plan(*options).values()
    assert teacher[:3] == ["train_teacher.py", "--out", "runs/shapes/1-8/teacher-deep"] and "--steps" not in teacher
    assert student[:3] == ["distill.py", "--out", "runs/short/mgd-r18"]
    assert student[student.index("--deep") + 1] == "runs/shapes/1-8/teacher-deep/last.pt"
    assert str(matrix.parse_args(options).json) == "runs/short/matrix-mgd-r18.json"


def test_teachers_named_by_file_are_not_trained_and_have_students_of_their_own(tmp_path):
    finished(tmp_path / "runs/a/sup-r18")
    named = "runs/a/sup-r18/last.pt"
    usual = plan("--tables", "1", "4")
    swapped = plan("--tables", "1", "4", "--wide-ckpt", named)
    assert not any(out.endswith("/teacher-wide") for out in swapped)
    assert {*swapped} & {*usual} == {out for out in usual if not re.search(r"/(kd|cwd|mgd|one|two|teacher-wide$)", out)} | {
        "runs/shapes/1-8/teacher-deep",
        "runs/shapes/1-8/teacher-deep-s10",
        "runs/shapes/1-8/teacher-wide-s10",
    }
    student = swapped["runs/shapes/1-8/mgd-r18-wide-a-sup-r18"]
    assert student[student.index("--deep") + 1 : student.index("--seed")] == [f"runs/shapes/1-8/{D}/last.pt", "--wide", named]
    both = plan("--rows", "two-wide", "--deep-ckpt", named, "--wide-ckpt", named)  # the second one is trained
    assert [*both] == ["runs/shapes/1-8/teacher-wide-s10", "runs/shapes/1-8/two-wide-r18-deep-a-sup-r18-wide-a-sup-r18"]
    assert both["runs/shapes/1-8/two-wide-r18-deep-a-sup-r18-wide-a-sup-r18"][5:9] == [
        "--deep",
        named,
        "--wide",
        "runs/shapes/1-8/teacher-wide-s10/last.pt",
    ]
    assert {*plan("--rows", "mgd", "--deep-ckpt", named)} != {*plan("--rows", "mgd", "--wide-ckpt", named)}


@pytest.mark.parametrize(
    "options,expected",
    [
        ("--tables 7", "--tables: invalid choice: '7'"),
        ("--rows kdd", "--rows: invalid choice: 'kdd'"),
        ("--student resnet18", "--student: invalid choice: 'resnet18'"),
        ("--deep foo", "--deep: invalid choice: 'foo'"),
        ("--seeds 0,1", "separate several with spaces"),
        ("--seeds -1", "--seeds"),
        ("--part 0.125", "expected 1/K"),
        ("--part 1/0", "expected 1/K"),
        ("--teacher-part 2/3", "expected 1/K"),
        ("--nproc 0", "--nproc 0: must be"),
        ("--dataset voc", "--dataset voc: give --data DIR too"),
        ("--data x", "--dataset shapes: give --dataset folder too"),
        ("--dataset folder --data /", "--data /: has no name"),
        ("--dataset camvid", "invalid choice: 'camvid'"),
        ("--wide-ckpt absent.pt", "absent.pt: no such checkpoint"),
        ("--args=--out=x", "--out is set by the plan"),
        ("--deep-ckpt junk.pt", "junk.pt: cannot be read"),
        ("--args=--no-such-flag", "sup-r18: unrecognized arguments"),
        ("--args='--lr", "--args"),
    ],
)
def test_wrong_options_are_one_line_and_run_nothing(monkeypatch, tmp_path, options, expected):
    (tmp_path / "junk.pt").write_text("words")
    with pytest.raises(common.UserError) as failed:
        run_matrix(monkeypatch, *options.split(), code_of=finished)
    assert expected in str(failed.value) and len(str(failed.value).splitlines()) == 1
    assert not run_matrix.last.trained and not (tmp_path / "runs").exists()


# ---- what happens to them ----


@pytest.mark.slow
def test_interrupted_and_continued_equals_uninterrupted(monkeypatch, tmp_path):
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    expected = ["teacher-deep", "teacher-wide", "kd-r18", "mgd-r18"]
    assert run_matrix(monkeypatch, *SMALL).trained == expected
    assert run_matrix(monkeypatch, *SMALL).trained == []  # nothing is left

    monkeypatch.chdir(tmp_path / "cut")
    original = distill.poly_lr

    def interrupt(step, *rest):
        if step == 1:
            raise KeyboardInterrupt
        return original(step, *rest)

    monkeypatch.setattr(distill, "poly_lr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_matrix(monkeypatch, *SMALL)
    assert run_matrix.last.evaluated is None
    monkeypatch.setattr(distill, "poly_lr", original)
    assert run_matrix(monkeypatch, *SMALL).trained == expected[2:]  # kd goes on after its first step
    for name in expected:
        whole, cut = (
            run_folder.load_checkpoint(tmp_path / folder / "runs/shapes/1-8" / name / "last.pt")["model"]
            for folder in ("whole", "cut")
        )
        assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole), name


def test_a_failed_run_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    """A student whose teacher failed fails too; finished runs are evaluated."""

    def code_of(out):
        failed = out.name == "teacher-deep" or (
            out.name == "one-deep-r18" and not (out.parent / "teacher-deep/last.pt").exists()
        )
        return 2 if failed else finished(out)

    with pytest.raises(SystemExit, match=r"2 of 5 runs failed.*: runs/shapes/1-8/teacher-deep, runs/.*/one-deep-r18;"):
        run_matrix(monkeypatch, "--rows", "sup", "one-deep", "one-wide", code_of=code_of)
    assert run_matrix.last.trained == ["sup-r18", "teacher-deep", "one-deep-r18", "teacher-wide", "one-wide-r18"]
    assert "[5/5] distill.py --out runs/shapes/1-8/one-wide-r18" in capsys.readouterr().out
    done = sorted(path.parent.name for path in (tmp_path / "runs/shapes/1-8").glob("*/last.pt"))
    assert done == ["one-wide-r18", "sup-r18", "teacher-wide"]
    assert [word.split("/")[-2] for word in run_matrix.last.evaluated if word.endswith("last.pt")] == done


def test_a_finished_run_is_never_retrained(monkeypatch, tmp_path):
    finished(tmp_path / "runs/shapes/1-8/teacher-deep")
    finished(tmp_path / "runs/shapes/1-8/mgd-r18")
    assert run_matrix(monkeypatch, "--rows", "mgd", "kd", code_of=finished).trained == ["teacher-wide", "kd-r18"]


@pytest.mark.parametrize("code,evaluation,expected", [(0, 0, None), (1, 0, "9 of 9 runs failed"), (0, 2, 2), (1, 2, 2)])
def test_what_is_finished_is_evaluated_and_exit_codes_tell_what_failed(monkeypatch, tmp_path, code, evaluation, expected):
    for name in ("kd-r18", "teacher-deep"):
        finished(tmp_path / "runs/shapes/1-8" / name)
    try:
        run_matrix(monkeypatch, "--nproc", "2", code_of=lambda out: code, evaluation=evaluation)
        raised = None
    except SystemExit as exit:
        raised = exit.code
    assert (expected in raised) if isinstance(expected, str) else raised == expected
    assert len(run_matrix.last.trained) == 9
    run, files = "runs/shapes/1-8", [word for word in run_matrix.last.evaluated if not word.startswith("--")]
    assert files == [f"{run}/kd-r18/last.pt", f"{run}/teacher-deep/last.pt", f"{run}/matrix-1-r18.json"]


def test_a_run_that_a_signal_stopped_stops_the_others(monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        run_matrix(monkeypatch, code_of=lambda out: EXIT_CODE)
    assert stopped.value.code == EXIT_CODE and len(run_matrix.last.trained) == 1


def test_nothing_finished_is_not_evaluated(monkeypatch):
    with pytest.raises(SystemExit):
        run_matrix(monkeypatch, code_of=lambda out: 1)
    assert run_matrix.last.evaluated is None


def test_several_processes_run_under_torchrun(monkeypatch):
    commands = []

    def keep(command, stdin):
        commands.append(command)
        return Ended(command, finished(pathlib.Path(command[command.index("--out") + 1])) if "--out" in command else 0)

    monkeypatch.setattr(matrix.subprocess, "Popen", keep)
    matrix.main(["--rows", "sup", "--nproc", "4"])
    assert [command[1:6] for command in commands] == [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    ] * 2


def test_wrong_flags_are_named_before_anything_is_run(monkeypatch, tmp_path):
    with pytest.raises(common.UserError, match="runs/shapes/1-8/kd-r18: --temperature -1"):
        run_matrix(monkeypatch, "--rows", "sup", "kd", "--kd-args=--temperature -1", code_of=finished)
    assert not (tmp_path / "runs").exists()


# ---- how long they take ----


def test_the_plan_runs_nothing_and_adds_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(matrix, "seconds_per_gmac", lambda args: 3600.0)
    monkeypatch.setattr(matrix, "gmacs", lambda args: 1.0)
    processes = run_matrix(monkeypatch, *SMALL[:-2], "mgd", "--dry-run")
    assert processes.trained == [] and processes.evaluated is None and not (tmp_path / "runs").exists()
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0].split("/")[-1] for line in lines] == ["teacher-deep", "teacher-wide", "mgd-r18"]

    def seconds(line):
        days, clock = re.search(r"about (?:(\d+) days?, )?(\d+:\d+:\d+)", line).groups()
        hours, minutes, rest = map(int, clock.split(":"))
        return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + rest

    assert total.startswith("3 runs, ") and seconds(total) == pytest.approx(sum(map(seconds, lines)), abs=2)
    assert min(map(seconds, lines)) > 60


@pytest.mark.slow
def test_the_speed_is_measured():
    args = matrix.arguments_of(["train_teacher.py", "--out", "x", "--backbone", "r18", *TINY])
    assert 0 < matrix.seconds_per_gmac(args) < 60


def test_the_cost_is_that_of_the_forwards(monkeypatch):
    """One GMAC per forward: Sup costs 3 per image; with two views CPS 2 · (3 + 2 + 3), MGD 6 of the student's and 4 of each
    teacher's, one fewer with clean terms; labels only 3 and 1 of each teacher's. --refine is as Sup."""
    monkeypatch.setattr(matrix, "gmacs", lambda args: 1.0)
    teacher = matrix.arguments_of(["train_teacher.py", "--out", "d"])
    runs = {pathlib.Path("d"): teacher, pathlib.Path("w"): teacher}
    train = "train_teacher.py --out x --backbone r18 --steps 10 --batch 2 --sup-only 0 --method"
    teach = "distill.py --out x --deep d --wide w --steps 10 --batch 2"
    for command, images in {
        f"{train} sup": 3,
        f"{train} cps": 16,
        f"{train} mt": 9,
        f"{train} cps --sup-only 0.5": 11,
        teach: 6 + 2 * 4,
        f"{teach} --mixed-terms clean": 6 + 2 * 3,
        f"{teach} --losses sup pixel:labeled": 3 + 2,
        f"{teach} --losses sup pixel": 6 + 2 * 3,
        f"{teach} --no-cutmix": 6 + 2 * 2,
        f"{teach} --method kd": 6 + 2 * 2,
        f"{teach} --refine 0.5": (6 + 2 * 4 + 3) / 2,
    }.items():
        assert matrix.cost_of(matrix.arguments_of(command.split()), runs) == pytest.approx(20 * images), command


@pytest.mark.parametrize("text", ["; touch made", "$(touch made)", "`touch made`", "' ; touch made '"])
def test_no_text_of_a_command_line_is_run_by_a_shell(monkeypatch, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    started = []

    def start(words, **more):
        assert isinstance(words, list) and not more.get("shell")
        started.append(words)
        return Ended(words, 0)

    monkeypatch.setattr(matrix.subprocess, "Popen", start)
    matrix.main(["--dataset", "folder", "--data", text, "--rows", "sup", "--run", f"runs/{text}"])
    assert started and all(words[words.index("--data") + 1] == text for words in started)
    assert not (tmp_path / "made").exists()
