"""Train the runs that tables of the paper need, one after the other, and
evaluate them (`make matrix`).

    python -m paper.matrix --tables 1 4 --dataset voc --data data/voc --dry-run
    python -m paper.matrix --tables 1 4 --dataset voc --data data/voc \\
        --part 1/8 --seeds 0 1 2 --mt-args="--mt-weight 50"

Teachers are trained before their students, and all students share them. A
finished run (last.pt) is never retrained, and an interrupted one continues at
its last resume.pt: give the same command again. All commands are checked before
the first one runs. A run that fails is named at the end, and the others go on;
a student whose teacher failed fails too. The finished runs are then evaluated
into one result file. The exit code is 1 if runs failed.

--dry-run prints the plan and estimates its time. It counts the multiply-
accumulates of each run, and measures the speed of this machine.
"""

import argparse
import datetime
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import torch

import backbones
import distill
import distill_losses
import models
import recipes
import train_teacher
from common import ArgumentParser, UserError, autocast, cli, pick_device, pick_precision
from run_folder import load_checkpoint
from stop_signals import EXIT_CODE, SIGNALS

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = {"train_teacher.py": train_teacher, "distill.py": distill}


class Row(NamedTuple):
    """A student of a table: the flags and the method of its training, and the teachers for --deep and --wide; none: it is
    trained by train_teacher.py."""

    flags: str = ""
    method: str = "mgd"
    teachers: tuple[str | None, ...] = ("deep", "wide")


# By the name of the run's folder. "deep 2" is the second deep teacher, of another seed.
ROWS = {
    "sup": Row(method="sup", teachers=()),
    "sup-x2": Row("--steps-factor 2", "sup", teachers=()),
    "sup-x3": Row("--steps-factor 3", "sup", teachers=()),
    "mt": Row(method="mt", teachers=()),
    "cps": Row(method="cps", teachers=()),
    "kd": Row(method="kd"),
    "cwd": Row(method="cwd"),
    "mgd": Row(),
    "mgd-plus": Row(method="mgd+"),
    "one-deep": Row(teachers=("deep", None)),
    "one-wide": Row(teachers=(None, "wide")),
    "two-deep": Row(teachers=("deep", "deep 2")),
    "two-wide": Row(teachers=("wide", "wide 2")),
    "pixel": Row("--losses sup pixel"),
    "pixel-image": Row("--losses sup pixel image:T_D"),
    "pixel-region": Row("--losses sup pixel region:T_W"),
    "both-levels": Row("--losses sup pixel image:T_D image:T_W region:T_D region:T_W"),
    "labeled": Row("--losses sup pixel:labeled"),
    "unlabeled": Row("--losses sup pixel:unlabeled image:T_D region:T_W"),
    **{f"regions-{n}": Row(f"--regions {n}") for n in (3, 5, 9, 11)},
    **{f"head-{n}": Row(f"--head-width {n} --no-separable-head") for n in (256, 128, 64)},
    **{f"separable-{n}": Row(f"--head-width {n} --separable-head") for n in (256, 128, 64)},
}
METHODS = ["sup", "sup-x2", "sup-x3", "mt", "cps", "kd", "cwd", "mgd", "mgd-plus"]
LEVELS = ["sup", "pixel", "pixel-image", "pixel-region", "both-levels"]
HALVES = ["labeled", "unlabeled", "mgd"]
TABLES = {
    "1": METHODS,
    "2": METHODS,
    "3": METHODS,
    "4": ["one-deep", "one-wide", "two-deep", "two-wide", "mgd"],
    "5": [*LEVELS, *HALVES],
    "5a": [*LEVELS, "mgd"],
    "5b": HALVES,
    "6": ["regions-3", "regions-5", "mgd", "regions-9", "regions-11"],
    "heads": ["head-256", "head-128", "head-64", "separable-256", "separable-128", "separable-64"],
}
DATASET_OF = {"2": "voc-few", "3": "cityscapes"}  # Table 1 for another data set
METHOD_ARGS = ("mt", "cps", "kd", "cwd", "mgd")  # mgd: of MGD+ too


# ---- which runs ----


def rows_of(args) -> list[str]:
    return list(dict.fromkeys(args.rows or [row for table in args.tables for row in TABLES[table]]))


def seed_tag(seed: int) -> str:
    return f"-s{seed}" if seed else ""


def teacher_seed(args, teacher: str, seed: int) -> int:
    """The seed of a teacher of the student of `seed`; of `deep 2` it is 10 where that of `deep` is 0, 11 where it is 1, ..."""
    seed = seed if args.teacher_seed is None else args.teacher_seed
    return int(f"1{seed}") if teacher.endswith("2") else seed


def teacher_folder(args, teacher: str, seed: int) -> pathlib.Path:
    return args.teacher_run / f"teacher-{teacher.split()[0]}{seed_tag(teacher_seed(args, teacher, seed))}"


def teacher_file(args, teacher: str, seed: int) -> pathlib.Path:
    named = {"deep": args.deep_ckpt, "wide": args.wide_ckpt}.get(teacher)
    return named or teacher_folder(args, teacher, seed) / "last.pt"


def student_folder(args, row: str, seed: int) -> pathlib.Path:
    """The folder of a student. Its name tells of teachers that have other labels or another seed, or are given by file."""
    of = ""
    if ROWS[row].teachers:
        if args.teacher_part != args.part:
            of += f"-of-{args.teacher_part.replace('/', '-')}"
        if args.teacher_seed is not None:
            of += f"-t{args.teacher_seed}"
        for kind, path in (("deep", args.deep_ckpt), ("wide", args.wide_ckpt)):
            if path:
                of += f"-{kind}-" + str(path).removesuffix("/last.pt").removeprefix("runs/").replace("/", "-")
    return args.run / f"{row}-{args.student}{of}{seed_tag(seed)}"


def plan(args) -> dict[pathlib.Path, list[str]]:
    """{folder of a run: its script and arguments}, with each teacher before its students."""
    data = ["--dataset", args.dataset, *(["--data", args.data] if args.data else [])]
    recipe = ["--recipe", args.recipe] if args.recipe != "paper" else []
    runs = {}

    def add(out: pathlib.Path, script: str, networks: list[str], seed: int, part: str, flags: list[str]):
        common = ["--seed", str(seed), *data, "--part", part, *recipe, "--resume"]
        runs.setdefault(out, [script, "--out", str(out), *networks, *common, *args.every_args, *flags])

    for row in rows_of(args):
        flags, method, teachers = ROWS[row]
        script = "distill.py" if teachers else "train_teacher.py"
        for seed in args.seeds:
            networks = ["--student" if teachers else "--backbone", args.student]
            for flag, teacher in zip(("--deep", "--wide"), teachers, strict=False):
                if not teacher:
                    continue
                path, folder = teacher_file(args, teacher, seed), teacher_folder(args, teacher, seed)
                networks += [flag, str(path)]
                if path == folder / "last.pt":
                    kind = teacher.split()[0]
                    backbone = getattr(args, kind)
                    teacher_network = ["--role", f"teacher_{kind}", *(["--backbone", backbone] if backbone else [])]
                    add(
                        folder,
                        "train_teacher.py",
                        teacher_network,
                        teacher_seed(args, teacher, seed),
                        args.teacher_part,
                        args.teacher_args,
                    )
            own = [
                *(["--method", method] if method != "mgd" else []),
                *getattr(args, f"{method.rstrip('+')}_args", []),
            ]  # sup has none
            more = [*args.student_args, *own, *flags.split()]
            add(student_folder(args, row, seed), script, networks, seed, args.part, more)
    return runs


def to_evaluate(args) -> list[str]:
    """The finished checkpoints among the students and the first two teachers of all seeds."""
    wanted = [student_folder(args, row, seed) / "last.pt" for row in rows_of(args) for seed in args.seeds]
    wanted += [teacher_file(args, kind, seed) for kind in ("deep", "wide") for seed in args.seeds]
    return sorted({str(path) for path in wanted if path.exists()})


def arguments_of(command: list[str]) -> argparse.Namespace:
    """The arguments of a command, as its script parses them. Raises UserError where the script would refuse them."""
    out = command[command.index("--out") + 1]
    try:
        args = SCRIPTS[command[0]].parse_args(command[1:])
    except UserError as error:
        raise UserError(f"{out}: {error}") from None
    if str(args.out) != out:
        raise UserError(f"{out}: --out is set by the plan; give --run DIR for another folder")
    return args


# ---- how long they take ----


def gmacs(args: argparse.Namespace) -> float:
    """GMACs of one forward pass of one crop by the network of a run."""
    cost = models.measure(args.backbone, args.stem, args.head_width, args.separable_head)["model_gmacs_512"]
    return cost * args.crop[0] * args.crop[1] / 512**2


def cost_of(args: argparse.Namespace, runs: dict[pathlib.Path, argparse.Namespace]) -> float:
    """GMACs of a whole run; `runs` has the arguments of its teachers, by their checkpoint. A backward costs two forwards."""
    own, views = gmacs(args), 2 if args.cutmix else 1
    if args.method in ("sup", "mt", "cps"):
        # mt: network and average on labeled and unlabeled images; cps: both networks, with the pseudo labels' forward
        alone = {"sup": 3, "mt": 3, "cps": 6}[args.method]
        full = {"sup": 3, "mt": 6 + 1 + views, "cps": 2 * (6 + views)}[args.method]
        fraction = args.sup_only if args.method != "sup" else 0.0
        return args.steps * args.batch * own * (fraction * alone + (1 - fraction) * full)
    total = 0.0
    for role, path in (("T_D", args.deep), ("T_W", args.wide)):
        if path:
            needed = distill_losses.needed_outputs(args.method, args.losses, role)
            labeled, clean, mixed = distill.needed_forwards(needed, args.cutmix, args.mixed_terms)
            forwards = labeled + clean * views + mixed
            teacher = runs.get(path) or argparse.Namespace(**load_checkpoint(path)["args"])
            total += forwards * gmacs(argparse.Namespace(**{**vars(teacher), "crop": args.crop}))
    alone = args.refine or 0.0  # the fraction of the steps that are on labeled images, without teachers
    full = total + 3 * own * (1 + distill_losses.uses_views(args.losses))
    return args.steps * args.batch * (alone * 3 * own + (1 - alone) * full)


def seconds_per_gmac(args: argparse.Namespace) -> float:
    """Measured with training steps of the network of `args` on one batch, in one process."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    model = models.model_from_args(vars(args), 8).to(device).train()
    images = torch.randn(args.batch, 3, *args.crop, device=device).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        with autocast(device, precision):
            loss = model(images).logits.square().mean()
        loss.backward()
        float(loss.detach())  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times) / (3 * args.batch * gmacs(args))


def print_plan(trainings: list[argparse.Namespace]):
    """Each run with an estimate of its time."""
    runs = {args.out / "last.pt": args for args in trainings}
    rate = seconds_per_gmac(min(trainings, key=gmacs)) if trainings else 0.0
    seconds = [rate * cost_of(args, runs) for args in trainings]
    for args, duration in zip(trainings, seconds, strict=True):
        print(
            f"{args.out!s:48} {args.method:4} {args.backbone:14} {args.steps:7d} steps  about "
            f"{datetime.timedelta(seconds=round(duration))}"
        )
    print(
        f"{len(trainings)} runs, about {datetime.timedelta(seconds=round(sum(seconds)))} in one process, validation not "
        "included; finished runs are not listed"
    )


# ---- command line ----


def fraction(text: str) -> str:
    if not re.fullmatch(r"1(/[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"expected 1/K with a whole number K, such as 1/8, or 1, not '{text}'")
    return text


def whole_number(text: str) -> int:
    if not re.fullmatch(r"0|[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number such as 0, not '{text}'; separate several with spaces")
    return int(text)


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}".lower()) from None


PATH, PASSED_ON = {"type": pathlib.Path, "metavar": "DIR"}, {"type": words, "default": "", "metavar": "FLAGS"}
RECIPES = recipes.FLAGS["recipe"].choices
FILE, BACKBONE = {**PATH, "metavar": "FILE"}, {"choices": list(backbones.ALIASES)}
STUDENTS = {"student": "all students", **{method: f"the students of {method}" for method in METHOD_ARGS}}
OPTIONS = {
    "options": {
        "--tables": {
            "nargs": "+",
            "choices": list(TABLES),
            "default": ["1"],
            "metavar": "TABLE",
            "help": f"of {', '.join(TABLES)}; 2 and 3 are Table 1 for voc-few and cityscapes (default: 1)",
        },
        "--rows": {
            "nargs": "+",
            "choices": list(ROWS),
            "metavar": "ROW",
            "help": f"single rows instead of tables: {', '.join(ROWS)} (default: none)",
        },
        "--dry-run": {"action": "store_true", "help": "print the plan and its time, and run nothing (default: off)"},
        "--json": {**FILE, "help": "result file (default: RUN/matrix-TABLES-STUDENT.json)"},
    },
    "runs": {
        "--dataset": {"default": "shapes", "choices": list(recipes.RECIPES), "help": "data set (default: shapes)"},
        "--data": {"metavar": "DIR", "help": "folder of the data set; needed by all but shapes (default: none)"},
        "--part": {
            "type": fraction,
            "default": "1/8",
            "metavar": "1/K",
            "help": "fraction of the training images that is labeled (default: 1/8)",
        },
        "--recipe": {"choices": RECIPES, "default": "paper", "help": "defaults of flags that are not given (default: paper)"},
        "--student": {**BACKBONE, "help": "backbone of the students (default: r18; el0 with --recipe light)"},
        "--seeds": {
            "type": whole_number,
            "nargs": "+",
            "default": [0],
            "metavar": "SEED",
            "help": "seeds of each run (default: 0)",
        },
        "--run": {**PATH, "help": "folder of the students (default: runs/DATASET/PART)"},
        "--nproc": {"type": int, "default": 1, "metavar": "N", "help": "processes (GPUs) per run, under torchrun (default: 1)"},
    },
    "teachers": {
        "--deep": {**BACKBONE, "help": "backbone of the deep teacher (default: by --dataset and --recipe)"},
        "--deep-ckpt": {**FILE, "help": "the deep teacher (default: it is trained)"},
        "--wide": {**BACKBONE, "help": "backbone of the wide teacher (default: by --dataset and --recipe)"},
        "--wide-ckpt": {**FILE, "help": "the wide teacher (default: it is trained)"},
        "--teacher-part": {"type": fraction, "metavar": "1/K", "help": "partition of the teachers (default: --part)"},
        "--teacher-seed": {"type": whole_number, "metavar": "SEED", "help": "seed of the teachers (default: the student's)"},
    },
    "flags to pass on, as --args='--lr 0.02'": {
        "--args": {**PASSED_ON, "dest": "every_args", "help": "to every training (default: none)"},
        "--teacher-args": {**PASSED_ON, "help": "to the teachers (default: none)"},
        **{f"--{name}-args": {**PASSED_ON, "help": f"to {who} (default: none)"} for name, who in STUDENTS.items()},
    },
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, usage="python -m paper.matrix [options]")
    for title, options in OPTIONS.items():
        group = parser if title == "options" else parser.add_argument_group(title)
        for flag, option in options.items():
            group.add_argument(flag, **option)
    args = parser.parse_args(argv)

    if (args.dataset == "shapes") != (args.data is None):
        fix = "--dataset folder" if args.data else "--data DIR"
        raise UserError(f"--dataset {args.dataset}: give {fix} too; only shapes, which is embedded, needs no --data")
    for table in args.tables:
        if DATASET_OF.get(table, args.dataset) != args.dataset:
            raise UserError(
                f"--tables {table}: belongs to {DATASET_OF[table]}; give --dataset {DATASET_OF[table]} or --tables 1"
            )
    if args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}: must be at least 1")
    name = os.path.basename(os.path.abspath(args.data)) if args.dataset == "folder" else args.dataset
    if not name:
        raise UserError(f"--data {args.data}: has no name for a folder in runs/; give the folder of the data set")
    args.student = args.student or ("r18" if args.recipe == "paper" else "el0")
    args.teacher_part = args.teacher_part or args.part
    args.teacher_run = pathlib.Path("runs", name, args.teacher_part.replace("/", "-"))
    args.run = args.run or pathlib.Path("runs", name, args.part.replace("/", "-"))
    args.json = args.json or args.run / f"matrix-{'-'.join(args.rows or args.tables)}-{args.student}.json"
    return args


def main(argv=None):
    args = parse_args(argv)
    for path in filter(None, (args.deep_ckpt, args.wide_ckpt)):
        load_checkpoint(path)  # raises UserError where it is not a checkpoint
    runs = {out: command for out, command in plan(args).items() if not (out / "last.pt").exists()}
    trainings = [arguments_of(command) for command in runs.values()]
    if args.dry_run:
        return print_plan(trainings)

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.nproc)]
    launch += ["--signals-to-handle", ",".join(["SIGHUP", *(number.name for number in SIGNALS)])]
    several = launch if args.nproc > 1 else []
    failed = []

    def start(command: list[str]) -> int:
        words = [sys.executable, *several, str(ROOT / command[0]), *command[1:]]
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        for number in SIGNALS:  # the training stops after its step, and then this script does
            signal.signal(number, lambda number, frame: child.send_signal(number))
        return child.wait()

    for i, (out, command) in enumerate(runs.items(), 1):
        print(f"[{i}/{len(runs)}] {shlex.join(command)}", flush=True)
        if (code := start(command)) == EXIT_CODE:
            sys.exit(code)
        if code:
            failed.append(str(out))
    found = to_evaluate(args)
    if found and (code := start(["evaluate.py", "--ckpt", *found, "--json", str(args.json)])):
        sys.exit(code)
    if failed:
        sys.exit(
            f"paper.matrix: {len(failed)} of {len(runs)} runs failed, the others are done: {', '.join(failed)}; fix the "
            "errors above and run the same command again"
        )  # exit code 1


if __name__ == "__main__":
    cli(main)
