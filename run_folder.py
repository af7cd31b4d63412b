"""The files of a run's folder: checkpoints and the log. Each is written whole or not at all."""

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import pathlib
import sys
import tempfile
import threading
import time

import torch
import torchvision
from tqdm import tqdm

from common import IGNORE_INDEX, UserError, due, print0, printable, rank_and_size, worker_timeout
from readers import open_tensors
from recipes import FLAGS, is_kind, wrong_argument, wrong_column
from run_owner import own_run, refuse_lost

# ---- files ----


@contextlib.contextmanager
def atomic_write(path: pathlib.Path):
    """Yields a temporary path beside `path`, which replaces `path` when the block ends: `path` is always the old file or the
    complete new one. The folder is made if it is missing. A block that fails leaves no file. Raises UserError if the file
    cannot be written."""
    target = pathlib.Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".mgd-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter while it handles the former
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(
            f"{printable(path)}: cannot be written ({reason.strerror or reason}); free some space or give access, then run the "
            "same command again"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_folder(flag: str, folder: pathlib.Path):
    """Raises UserError if no file can be written to `folder`, or to the folder that it is to be made in, so that a run ends
    before its work and not after it. It is made with its first file, so a run that fails before leaves nothing."""
    try:  # permissions do not tell: the disk may be read-only, and root may do all
        present = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        tempfile.TemporaryFile(dir=present).close()
    except OSError as error:
        raise UserError(f"{flag} {printable(folder)}: cannot be written to ({error.strerror}); give another folder") from None


def without_nan(value):
    """`value` with None for every float that is not finite, in lists and dicts too: JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- checkpoints ----

RESUME, PREVIOUS = "resume.pt", "resume-previous.pt"  # the last two resume points of a run


def save_checkpoint(path: pathlib.Path, checkpoint: dict):
    """Write `checkpoint` on the first rank, flushed to the disk, so that `path` is always the old file or the complete new one.
    The resume.pt before it stays as resume-previous.pt. Raises UserError if it cannot be written, or if another process has
    taken over the folder."""
    if rank_and_size()[0] > 0:
        return
    refuse_lost(path.parent)
    checkpoint["rng"] = torch.get_rng_state()
    checkpoint["ranks"] = rank_and_size()[1]
    checkpoint["versions"] = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == RESUME and path.exists():
            os.replace(path, path.with_name(PREVIOUS))
    flush_folder(path.parent)


def flush_folder(folder: pathlib.Path):
    """Write the names of a folder's files to the disk, where the system can, so that a rename survives a loss of power."""
    with contextlib.suppress(OSError):  # some network disks refuse it; they write names at once
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_or_stop(args: argparse.Namespace, step: int, save, progress, signals):
    """After step `step` (from 0), write a resume point where one is due, before a validation, and where a signal asks to stop,
    which then ends the process. `save(step, path)` writes a checkpoint after `step` steps."""
    stop = signals.requested()
    if stop or due(step, args.save_every, args.steps) or due(step, args.val_every, args.steps):
        progress.write_skipped()
        save(step + 1, args.out / RESUME)
    if stop:
        signals.exit()


def states(path: pathlib.Path, networks: dict[str, torch.nn.Module], optimizers: list) -> dict:
    """What the checkpoint at `path` holds of a training's networks and optimizers. A last.pt holds the `model` alone."""
    if path.name == "last.pt":
        networks, optimizers = {"model": networks["model"]}, []
    found = {key: network.state_dict() for key, network in networks.items()}
    return {**found, "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


def restore(checkpoint: dict | None, networks: dict[str, torch.nn.Module], optimizers: list) -> tuple[int, float]:
    """Put the `states` of a checkpoint back. Returns the step and the seconds that it was written after; without a checkpoint
    nothing changes, and both are 0."""
    if checkpoint is None:
        return 0, 0.0
    for key, network in networks.items():
        network.load_state_dict(checkpoint[key])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    torch.set_rng_state(checkpoint["rng"])
    return checkpoint["step"], checkpoint["row"]["seconds"]


def load_checkpoint(path: pathlib.Path | str) -> dict:
    """A checkpoint of any stage, on the CPU.

    Keys: `model` (state dict), `second` (until the last step: CPS's second network, or the one whose average is `model`),
    `optimizers`, `step`, `rng`, `args`, `classes`, `palette`, `partition`, `row` (the run's entry in result files), `teachers`
    (their rows), `versions`. Raises UserError.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give the last.pt in it")
    try:
        checkpoint = open_tensors(path, str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train it first, or give the path of a last.pt") from None
    if not isinstance(checkpoint, dict) or not {"model", "args", "classes", "row"} <= checkpoint.keys():
        raise UserError(f"{path}: not a checkpoint of train_teacher.py or distill.py")
    if wrong := wrong_part(checkpoint):
        raise UserError(f"{path}: holds {wrong}, as no run writes it; it is damaged, or changed by hand: train it again")
    return checkpoint


# What a checkpoint must hold to be evaluated, exported, or to teach.
NEEDED_ARGS = ("dataset", "backbone", "stem", "head_width", "separable_head", "image_scale", "precision")
NEEDED_COLUMNS = ("method", "role", "backbone", "partition", "labeled", "steps", "seed", "gmacs_model", "mgd_ops")


def load_network(path: pathlib.Path | str) -> dict:
    """`load_checkpoint` of a finished run's file, with all that the use of its network needs. Raises UserError."""
    checkpoint = load_checkpoint(path)
    if absent := absent_part(checkpoint):
        raise UserError(f"{path}: lacks {absent}, so it cannot be used; give another checkpoint")
    return checkpoint


def absent_part(checkpoint: dict) -> str | None:
    """The first thing that a checkpoint lacks for the use of its network, or None."""
    absent = [f"args.{name}" for name in NEEDED_ARGS if checkpoint["args"].get(name) is None]
    absent += [f"row.{name}" for name in NEEDED_COLUMNS if checkpoint["row"].get(name) is None]
    absent += ["palette"] * ("palette" not in checkpoint) + ["classes"] * (len(checkpoint["classes"]) < 2)
    return absent[0] if absent else None


def wrong_part(checkpoint: dict) -> str | None:
    """The first part of a checkpoint that is not of the kind that `save_checkpoint` is given, or None."""

    def is_state(state):
        return isinstance(state, dict) and all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
        )

    for key in ("model", "second"):
        if not is_state(checkpoint.get(key, {})):
            return f"a '{key}' that is no state dict"
    for key in ("args", "row"):
        if not isinstance(checkpoint[key], dict) or not all(isinstance(name, str) for name in checkpoint[key]):
            return f"'{key}' that are no named values"
    classes, palette = checkpoint["classes"], checkpoint.get("palette", [])
    if not is_kind(classes, [str]) or len({*classes}) != len(classes) or len(classes) > IGNORE_INDEX:
        return "'classes' that are not at most 255 different names"
    colours = isinstance(palette, (list, tuple)) and all(is_kind(colour, [int]) and len(colour) == 3 for colour in palette)
    if not colours or ("palette" in checkpoint and len(palette) != len(classes)):
        return "a 'palette' that is not one colour per class"
    if any(channel > 255 for colour in palette for channel in colour):
        return "a 'palette' with more than 255"
    named = checkpoint.get("partition", {})
    if not isinstance(named, dict) or not all(isinstance(named.get(key, ""), str) for key in ("name", "hash")):
        return "a 'partition' without a name and a hash"
    return wrong_argument(checkpoint["args"]) or wrong_column(checkpoint["row"])


def load_for_resume(args: argparse.Namespace, dataset, partition) -> dict | None:
    """Make OUT and become its owner, and return the newest whole resume point where --resume is given and there is one.

    Raises UserError if it was written with other arguments, classes or images, with all differences in one line; if OUT holds a
    run and --resume is not given, so that no run is lost; if another process trains into OUT; if OUT is the folder of the data,
    lies among its images or masks, or holds files of others; or if OUT cannot be written to. Ends the script if the run is
    finished.
    """
    points, last, log = [args.out / RESUME, args.out / PREVIOUS], args.out / "last.pt", args.out / "log.jsonl"
    out, data = args.out.resolve(), pathlib.Path(args.data or "").resolve()
    if args.data and (out == data or {data / "images", data / "masks"} & {out, *out.parents}):
        raise UserError(f"--out {args.out}: is the folder of the data, or lies among its images or masks; give another")
    check_folder("--out", args.out)
    if log.exists() and not is_log(log):
        raise UserError(f"{log}: was not written by this project; choose another --out, or remove it")
    found = [file for file in (*points, last) if file.exists()]
    if found and not args.resume:
        raise UserError(
            f"{found[0]}: belongs to an earlier run; pass --resume to continue it, choose another --out, or delete it"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    own_run(args.out)
    if last.exists():
        load_checkpoint(last)  # raises for one of another program
    if found == [last]:
        print0(f"{last}: this run is finished; delete the file to train it again")
        sys.exit(0)
    path, checkpoint = newest_whole([file for file in points if file.exists()])
    if checkpoint is None:
        return None
    refuse_differences(path, checkpoint, args, dataset, partition)
    print0(f"{path}: continuing after step {checkpoint['step']}")
    return checkpoint


def newest_whole(points: list[pathlib.Path]) -> tuple[pathlib.Path | None, dict | None]:
    """The first of `points` that can be read, and what it holds. A damaged resume.pt is kept under another name, so that it
    does not replace the resume point before it. Raises UserError if there are some and all are damaged."""
    for path in points:
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            if path is points[-1]:
                raise
            print0(f"{error}; going back to {points[-1].name}")
            if rank_and_size()[0] == 0:
                os.replace(path, path.with_name("resume-damaged.pt"))
    return None, None


def refuse_differences(path: pathlib.Path, checkpoint: dict, args: argparse.Namespace, dataset, partition):
    """Raise UserError with all differences between a checkpoint and the run that is to continue it. What changes no result may
    change, and is printed, and so may the number of micro-batches or processes, each of which batch norm sees by itself."""
    differences, changes = [], []
    for key, value in plain_args(args).items():
        before = checkpoint["args"].get(key)
        follows = key == "window" and value == plain_args(args)["crop"]  # its default
        if before != value and not (follows and before == checkpoint["args"].get("crop")):
            may_change = FLAGS[key].column is None or key in ("data", "grad_accum")
            (changes if may_change else differences).append(f"--{key.replace('_', '-')} {before}, not {value}")
    if checkpoint["classes"] != dataset.classes:
        differences.append(f"the classes {', '.join(checkpoint['classes'])}, not {', '.join(dataset.classes)}")
    if checkpoint["partition"]["hash"] != partition.hash:
        differences.append(
            f"partition {checkpoint['partition']['hash']}, not {partition.hash} (the lists or masks have changed)"
        )
    if differences:
        raise UserError(
            f"{path}: was trained with {'; '.join(differences)}: give the same again or another --out, or delete it to start "
            "again"
        )
    ranks = rank_and_size()[1]
    if checkpoint.get("ranks", ranks) != ranks:
        changes.append(f"{checkpoint['ranks']} process(es), not {ranks}")
    changed = [change for change in changes if not change.startswith("--resume ")]
    if changed:
        print0(f"{path}: was written with {'; '.join(changed)}")


def plain_args(args: argparse.Namespace) -> dict:
    """The arguments as plain types, for checkpoints that `torch.load(weights_only=True)` opens."""

    def plain(value):
        return str(value) if isinstance(value, pathlib.Path) else list(value) if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in vars(args).items()}


# ---- the log ----

MAX_SKIPPED = 20  # steps in a row: broken images are in a few steps of an epoch, but weights that have diverged never recover


def is_log(path: pathlib.Path) -> bool:
    """Whether a file is empty or was written by `Progress`, by its first line."""
    try:
        with open(path, "rb") as file:
            first = file.readline(2**20)
        keys = json.loads(first).keys() if first else {"step", "miou"}
    except (OSError, ValueError, AttributeError):
        return False
    return keys in ({"step", "miou"}, {"step", "skipped"}) or "grad_loss" in keys or {"step", "lr", "data_wait"} <= keys


def belongs_before(line: bytes, start: int) -> bool:
    """Whether a line of a log was written before a run saved its checkpoint after `start` steps. The validation after a step
    comes after its checkpoint. A line that was cut off does not count."""
    try:
        entry = json.loads(line)
        return entry["step"] < start or (entry["step"] == start and "miou" not in entry)
    except (ValueError, TypeError, KeyError):
        return False


def skipped_before(lines: list[bytes], step: int) -> int:
    """How many steps in a row, the last of them step number `step`, the lines of a log call skipped."""
    skipped = {entry["step"] for entry in map(json.loads, lines) if "skipped" in entry}
    return next(n for n in itertools.count() if step - n not in skipped)


class Progress:
    """One progress bar and OUT/log.jsonl, whose entries `events` gets too. Metrics stay on the device until they are logged.
    `images_of(step, images)` names the images of a step for the log."""

    def __init__(self, args: argparse.Namespace, start: int, images_of=lambda step, images: {}, events=None):
        path, quiet, lines = args.out / "log.jsonl", None, []  # None: the bar is for terminals
        if rank_and_size()[0] > 0:
            path, quiet = os.devnull, True
        else:  # a resumed run keeps the lines up to its checkpoint, and logs the later ones and its validation again
            lines = path.read_bytes().splitlines() if start and path.exists() else []
            lines = [line for line in lines if belongs_before(line, start)]
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in lines))
        self.file, self.events = open(path, "a"), events  # noqa: SIM115
        for entry in map(json.loads, lines) if events else ():
            if entry["step"] == start:  # a resumed board begins there
                events.entry(entry)
        self.args, self.since, self.steps, self.waited = args, time.perf_counter(), 0, 0.0
        self.terms, self.first, self.began = 0, start, None  # the steps that the duration is measured over
        self.images_of, self.unread, self.in_a_row = images_of, [], skipped_before(lines, start)
        self.bar = tqdm(total=args.steps, initial=start, desc=args.out.name, disable=quiet, dynamic_ncols=True)

    def next_batch(self, batches):
        """The next item of the iterator `batches`; the time it takes counts as waiting for data."""
        before = time.perf_counter()
        with worker_timeout():
            item = next(batches)
        self.waited += time.perf_counter() - before
        return item

    def step(self, step: int, images: int, lr: float, losses: dict[str, torch.Tensor], skipped: torch.Tensor):
        """Count step `step` (from 0), which saw `images` images. The losses, means over the ranks, and whether the step was
        `skipped` (see `finite_steps`) are read and logged every `log_every` steps, and before a checkpoint is saved. Raises
        UserError if more than MAX_SKIPPED steps in a row, or all of the run, were skipped, before a checkpoint of the last one
        is written."""
        self.steps += 1
        self.unread.append((step, images, losses, skipped))
        self.bar.update()
        done = step + 1
        if len(losses) != self.terms:  # at the first step, and where pseudo labels begin
            self.terms, self.first = len(losses), step
        if step - self.first in (1, 4):  # the first steps warm up
            float(next(iter(losses.values())))  # waits for the device
            now = time.perf_counter()
            if step - self.first == 4:
                left = self.args.steps - done
                duration = datetime.timedelta(seconds=round((now - self.began) / 3 * left))
                print0(f"{self.args.out.name}: estimated {duration} for the remaining {left} steps")
            self.began = now
        if done % self.args.log_every and done % self.args.save_every and done != self.args.steps:
            return
        self.write_skipped()
        means = dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True))
        now = time.perf_counter()
        elapsed, self.since = now - self.since, now
        speed = self.steps * images / elapsed
        data, self.steps, self.waited = self.waited / elapsed, 0, 0.0
        self.write(step=done, lr=lr, images_per_s=speed, data_wait=data, **means)
        terms = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        text = f"{terms} lr {lr:.2g} {speed:.1f} img/s data {data:.0%}"
        if self.bar.disable:  # not a terminal: lines instead of a bar
            eta = datetime.timedelta(seconds=round((self.args.steps - done) * images / speed))
            print0(f"{self.args.out.name} {done}/{self.args.steps} {text} eta {eta}")
        self.bar.set_postfix_str(text)

    def write_skipped(self):
        """Read which of the steps since the last call were skipped, and log each with its images and losses. Called before a
        checkpoint is written, since a resumed run counts the steps in a row by the log."""
        steps, self.unread = self.unread, []
        flags = torch.stack([skipped for *_, skipped in steps]).tolist() if steps else []
        for i, (step, images, losses, _) in enumerate(steps):
            self.in_a_row = self.in_a_row + 1 if flags[i] else 0
            if not flags[i]:
                continue
            values, names = {name: float(value) for name, value in losses.items()}, self.images_of(step, images)
            self.write(step=step + 1, skipped={"losses": values, **names})
            bad = next((f"loss '{name}'" for name, value in values.items() if not math.isfinite(value)), "the gradient")
            if not any(flags[:i]):
                print0(
                    f"{self.args.out.name}: {sum(flags):.0f} of the last {len(flags)} steps were skipped, the first at step "
                    f"{step + 1}, where {bad} was not finite; log.jsonl names their images"
                )
            if self.in_a_row > min(MAX_SKIPPED, self.args.steps - 1):  # of a short run: all of them
                some = ", ".join([name for group in names.values() for name in group][:3])
                raise UserError(
                    f"{self.args.out}: {bad} was not finite in {self.in_a_row} steps in a row, the last one step {step + 1}; "
                    f"none of them changed the network. Start again with a lower --lr than {self.args.lr} (and delete "
                    f"resume.pt there), or look at the images that log.jsonl names{f' ({some}, ...)' if some else ''}"
                )

    def validated(self, step: int, miou: float):
        """Log a validation after `step` steps. Its time does not count for the speed of the next steps."""
        self.write(step=step, miou=miou)
        print0(f"{self.args.out.name} step {step}: {miou:.2f} mIoU")
        self.since, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def write(self, **entry):
        self.file.write(json.dumps(without_nan(entry), allow_nan=False) + "\n")
        self.file.flush()
        if self.events:
            self.events.entry(entry)

    def close(self):
        self.bar.close()
        self.file.close()
