"""Run the trainings that a table needs, one after the other: what `make matrix` does.

    make matrix TABLE="1 4" PART=1/8 SEEDS="0 1"            # reads the commands of make -n
    make matrix TABLE="1 4" PART=1/8 SEEDS="0 1" DRY=1      # what would be run, and how long it takes

Reads command lines on its standard input, in an order in which teachers come before their students, and runs those of
train_teacher.py and distill.py. A run that fails is named at the end, and the others go on; a student whose teacher failed
fails too. What is finished is not run again, since make leaves it out, and what was interrupted goes on at its last
resume.pt. The estimate counts the multiply-accumulates of each run, and measures the speed of this machine.
"""

import argparse
import datetime
import pathlib
import shlex
import subprocess
import sys
import time

import torch

import distill
import models
import train_teacher
from common import ArgumentParser, UserError, autocast, load_checkpoint, pick_device, pick_precision, run


def arguments_of(command: list[str]) -> argparse.Namespace:
    """What the script of a command makes of its arguments. Raises UserError for those that it would refuse."""
    index = next(i for i, word in enumerate(command) if word.endswith(".py"))
    script = {"train_teacher.py": train_teacher, "distill.py": distill}[command[index]]
    try:
        return script.parse_args(command[index + 1 :])
    except UserError as error:
        raise UserError(f"{command[command.index('--out') + 1]}: {error}") from None


def gmacs(args: argparse.Namespace) -> float:
    """Of one forward of one crop by the network of a run."""
    cost = models.measure(args.backbone, args.stem, args.head_width, args.separable_head)["model_gmacs_512"]
    return cost * args.crop[0] * args.crop[1] / 512**2


def cost_of(args: argparse.Namespace, runs: dict[pathlib.Path, argparse.Namespace]) -> float:
    """GMACs of a whole run; `runs` has the arguments of its teachers, by their checkpoint. A backward costs two forwards."""
    own, views = gmacs(args), 2 if args.cutmix else 1
    if args.method in ("sup", "mt", "cps"):
        # mt: network and average on labeled and unlabeled images; cps: both networks, with the pseudo labels' forward
        alone = {"sup": 3, "mt": 3, "cps": 6}[args.method]
        full = {"sup": 3, "mt": 6 + 1 + views, "cps": 2 * (6 + views)}[args.method]
        share = args.sup_only if args.method != "sup" else 0.0
        return args.steps * args.batch * own * (share * alone + (1 - share) * full)
    total = 0.0
    for role, path in (("T_D", args.deep), ("T_W", args.wide)):
        if path:
            labeled, clean, mixed = distill.inputs_of(distill.wanted(args, role), args.cutmix, args.mixed_terms)
            forwards = labeled + clean * views + mixed
            teacher = runs.get(path) or argparse.Namespace(**load_checkpoint(path)["args"])
            total += forwards * gmacs(argparse.Namespace(**{**vars(teacher), "crop": args.crop}))
    return args.steps * args.batch * (total + 3 * own * (1 + distill.uses_views(args)))


def seconds_per_gmac(args: argparse.Namespace) -> float:
    """Measured, by one process: a training step of the network of `args` on one batch."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    model = models.build_model(args.backbone, 8, "none", args.stem, args.head_width, args.separable_head).to(device).train()
    images = torch.randn(args.batch, 3, *args.crop, device=device).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        with autocast(device, precision):
            loss = model(images, upsample=False).logits.square().mean()
        loss.backward()
        float(loss.detach())  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times) / (3 * args.batch * gmacs(args))


def plan(trainings: list[argparse.Namespace]):
    """Print each run with an estimate of its time."""
    runs = {args.out / "last.pt": args for args in trainings}
    rate = seconds_per_gmac(min(trainings, key=gmacs)) if trainings else 0.0
    total = 0.0
    for args in trainings:
        seconds = rate * cost_of(args, runs)
        total += seconds
        print(f"{args.out!s:48} {args.method:4} {args.backbone:14} {args.steps:7d} steps  about "
              f"{datetime.timedelta(seconds=round(seconds))}")  # fmt: skip
    print(f"{len(trainings)} runs, about {datetime.timedelta(seconds=round(total))} in one process, besides validation; what "
          "is finished is not listed")  # fmt: skip


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and for how long")
    args = parser.parse_args()
    lines = [line for line in sys.stdin if "train_teacher.py" in line or "distill.py" in line]
    trainings = [arguments_of(shlex.split(line)) for line in lines]  # all are looked at before the first is run
    if args.dry_run:
        return plan(trainings)
    failed = []
    for i, (line, training) in enumerate(zip(lines, trainings, strict=True), 1):
        print(f"[{i}/{len(lines)}] {training.out}", flush=True)
        if subprocess.run(line, shell=True, stdin=subprocess.DEVNULL).returncode:  # as make would
            failed.append(str(training.out))
    if failed:
        sys.exit(f"matrix.py: {len(failed)} of {len(lines)} runs failed, the others are done: {', '.join(failed)}; see above, "
                 "mend it and give the same command again")  # exit code 1, and 2 where nothing was run  # fmt: skip


if __name__ == "__main__":
    run(main)
