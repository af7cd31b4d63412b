"""Run plumbing that every stage shares: arguments, device, schedules, files, checkpoints and the log.

Functions only: no loop lives here, and nothing here sees a loss.
"""

import argparse
import atexit
import contextlib
import datetime
import errno
import inspect
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import threading
import time
import traceback
import warnings

import torch
import torchvision
from tqdm import tqdm

IGNORE_INDEX = 255  # the label of pixels that take part neither in a loss nor in mIoU


class UserError(Exception):
    """Something the user can mend. The message is one line that names the file or flag, and the fix."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The opening docstring as it stands, and defaults that say something; None is often the data set's recipe."""

    def _get_help_string(self, action):
        silent = action.default is None or isinstance(action.default, bool)
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line for a wrong argument."""

    def __init__(self, description=None, **more):  # subcommands pass more
        super().__init__(description=description, formatter_class=HelpFormatter, **more)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def run(main):
    """Run a script's `main`; a UserError, a full disk or a lost data worker becomes one line on stderr and exit code 2. With
    MGD_DEBUG=1 the traceback stands before that line."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no λ shows \\u03bb
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        # A DataLoader worker hands its exception over with the traceback inside the message; what follows the name is ours.
        stop(str(error).rpartition("common.UserError: ")[2])
    except RuntimeError as error:
        reason = lost_worker(f"{error} {error.__cause__ or ''}")
        if reason is None:
            raise
        stop(reason)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        stop("the disk is full; make room, then run the same again")
    except KeyboardInterrupt:
        print("\ninterrupted; with --resume (or make) a training goes on from its last resume.pt", file=sys.stderr)
        sys.exit(130)


def stop(reason: str):
    """End the script with one line, whatever lines `reason` has, and exit code 2."""
    if os.environ.get("MGD_DEBUG") == "1":
        traceback.print_exc()
    line = " ".join(part.strip() for part in reason.splitlines() if part.strip())
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


def lost_worker(message: str) -> str | None:
    """What to do about a RuntimeError that says that a DataLoader worker died, or that one could not hand its batch over; None
    for any other. PyTorch raises the former from a signal handler, anywhere in the main thread."""
    memory = "</torch_" in message  # how PyTorch calls each piece of shared memory
    if "ancdata" in message or (memory and "Too many open files" in message):
        return "the data workers need more open files; raise the limit (ulimit -n 65536), or add --workers 0"
    if memory or "killed by signal: Bus error" in message:
        return "a data worker ran out of shared memory; add --workers 0, or give the container more (docker run --shm-size 8g)"
    if worker := re.search(r"DataLoader worker \(pid[^)]*\)+ (is killed by signal: [\w ]+)", message):
        how = worker[1].replace("is", "was", 1)
    elif re.search(r"DataLoader worker \(pid.*\) exited unexpectedly", message):
        how = "ended unexpectedly"
    else:
        return None
    return f"a data worker {how}; if memory ran out, lower --workers or --batch, or add --workers 0"


def start_workers(loader: torch.utils.data.DataLoader):
    """iter(loader). Raises UserError where its processes cannot be started."""
    try:
        if loader.num_workers:  # after a failure in the loader itself, PyTorch's clean-up writes a traceback
            torch.multiprocessing.Lock()
        return iter(loader)
    except OSError as error:
        raise UserError(f"the {loader.num_workers} data workers cannot be started ({error.strerror or error}); add "
                        "--workers 0, or give the container shared memory (docker run --shm-size 8g)") from None  # fmt: skip


# ---- arguments ----


def add_training_arguments(parser: argparse.ArgumentParser):
    """The arguments that all training stages share. Those left at None take the data set's recipe."""
    group = parser.add_argument_group("training")
    group.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run: last.pt, log.jsonl")
    group.add_argument("--resume", action="store_true", help="go on from OUT/resume.pt where it exists")
    group.add_argument("--seed", type=int, default=0, help="initialisation, order and augmentation; not the partition")
    group.add_argument("--steps", type=int, help="optimizer steps")
    group.add_argument("--schedule", type=float, default=1.0, metavar="FACTOR", help="multiplies the steps")
    group.add_argument("--batch", type=int, help="labeled images a step, over all processes; unlabeled views are added")
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="PARTS", help="compute a step in so many parts, to save memory"
    )
    group.add_argument("--lr", type=float, help="initial learning rate; decays as (1 - step / steps)^0.9. The default grows in "
                       "proportion to --batch")  # fmt: skip
    group.add_argument("--weight-decay", type=float, default=5e-4, help="not applied to norms and biases")
    group.add_argument("--crop", type=crop_size, help="crop side in pixels, or HEIGHTxWIDTH")
    group.add_argument("--ohem", action=argparse.BooleanOptionalAction, help="supervised loss on hard pixels only")
    group.add_argument("--no-cutmix", dest="cutmix", action="store_false", help="unlabeled views without CutMix")
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    group.add_argument("--workers", type=int, default=max(0, min(8, cores - 1)), help="processes of each data loader")
    group.add_argument("--device", help="cuda, cpu, ...; by default cuda where there is one")
    group.add_argument("--precision", choices=["bf16", "fp32"], help="autocast; by default bf16 where it is fast")
    group.add_argument("--compile", action="store_true", help="torch.compile the networks; worth its minutes on long runs")
    group.add_argument("--log-every", type=int, default=20, metavar="STEPS")
    group.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="how often OUT/resume.pt is written")
    group.add_argument("--val-every", type=int, default=0, metavar="STEPS", help="0: validate after the last step only")


def add_model_arguments(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("model")
    group.add_argument("--weights", help="of the backbone: imagenet, none, or a file with a torchvision state dict")
    group.add_argument("--stem", default="standard", help="standard, or deep for the paper's parameter counts")
    group.add_argument("--head-width", type=int, help="channels of ASPP and decoder")
    group.add_argument("--separable-head", action="store_true", help="depthwise separable ASPP and decoder")


def crop_size(text: str) -> tuple[int, int]:
    """`512` -> (512, 512); `96x128`, height by width -> (96, 128)."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHTxWIDTH, not '{text}'")
    return sides[0], sides[-1]


def fill_from_recipe(args: argparse.Namespace, recipe: dict, stage: str):
    """Give every argument that is still None its value of the recipe, and check what argparse cannot.

    `stage` is teacher or student. Raises UserError.
    """
    recipe = {**recipe, **recipe.get(stage, {}), **recipe.get("of", {}).get(args.backbone, {}),
              **({} if args.cutmix else recipe.get("no_cutmix", {}))}  # fmt: skip
    if args.batch is not None:  # the recipe's learning rate is that of its batch
        recipe["lr"] *= args.batch / recipe["batch"]
    for key, value in recipe.items():
        if getattr(args, key, 0) is None:
            setattr(args, key, args.crop if value == "crop" else value)
    if args.schedule > 0:  # what is not is refused below
        args.steps = round(args.steps * args.schedule)
    at_least = {"steps": 1, "batch": 2, "accumulate": 1, "log_every": 1, "save_every": 1, "head_width": 1, "seed": 0,
                "workers": 0, "val_every": 0, "weight_decay": 0, "cps_weight": 0, "mt_weight": 0, "kd_weight": 0,
                "lambda_image": 0, "lambda_region": 0, "regions": 1}  # batch norm needs two images  # fmt: skip
    above = {"lr": 0, "schedule": 0, "image_scale": 0, "temperature": 0}
    shares = ("sup_only", "ramp_up", "threshold")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in at_least and not value >= at_least[name]:
            raise UserError(f"{flag}: must be at least {at_least[name]}")
        if name in above and not value > above[name]:
            raise UserError(f"{flag}: must be above {above[name]}")
        if name in shares and not 0 <= value <= 1:
            raise UserError(f"{flag}: a share or probability, from 0 to 1")
    if not min(args.scales) > 0:
        raise UserError(f"--scales {min(args.scales)}: must be above 0")


# ---- device and schedules ----


def pick_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]} Leave --device out for what is there") from None
    return torch.device(name)


def start_ranks(name: str | None) -> torch.device:
    """This process's device; under torchrun it also joins the group of ranks, which ends when the process does."""
    if "RANK" not in os.environ or torch.distributed.is_initialized():
        return pick_device(name)
    if (name is None and torch.cuda.is_available()) or name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name and name.startswith("cuda:"):
        raise UserError(f"--device {name}: every process has a GPU of its own; give --device cuda, or none")
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    return device


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def say(text: str):
    """Print on the first rank alone."""
    if rank_and_size()[0] == 0:
        print(text, flush=True)


def finish(args: argparse.Namespace):
    """Remove OUT/resume.pt, now that last.pt is there."""
    if rank_and_size()[0] == 0:
        (args.out / "resume.pt").unlink(missing_ok=True)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of each entry over the ranks; one small collective, without reading anything on the host."""
    if rank_and_size()[1] > 1:
        torch.distributed.all_reduce(values)
        values /= rank_and_size()[1]
    return values


def distribute(model: torch.nn.Module) -> torch.nn.Module:
    """`model` as DistributedDataParallel where there are several ranks, with batch norm over all of them on GPUs."""
    if rank_and_size()[1] == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        say("note: batch norm sees each rank's images alone, since SyncBatchNorm needs GPUs")
    # running statistics are each rank's own (or equal); see `agree`
    parallel = torch.nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters  # in torch 2.15
    return parallel(model, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})


def agree(model: torch.nn.Module):
    """Give every rank the first one's running statistics, so that all validate the network that is saved."""
    if rank_and_size()[1] > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def device_slug(device: str) -> str:
    """What a benchmark's result file is named after: `cpu`, or the GPU, such as `h100-80gb-hbm3`."""
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ") if device == "cuda" else device
    return "-".join(name.lower().split())


def free_memory(device: torch.device) -> float:
    """Bytes that a training on `device` can still have; infinite where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1]) / rank_and_size()[1]
    except OSError:
        pass
    return float("inf")


def say_plan(args: argparse.Namespace, device: torch.device, images: str, needed: float):
    """Say what a training will do. `needed` is an estimate of its memory, in bytes, on the low side; raises UserError where
    there is less."""
    free, sides = free_memory(device), "x".join(map(str, args.crop))
    if needed > free:
        raise UserError(f"--batch {args.batch}: crops of {sides} need {needed / 1e9:.1f} GB, but {device} "
                        f"has {free / 1e9:.1f} GB free; add --accumulate, or lower --batch or --crop")  # fmt: skip
    say(f"{args.out}: {args.method} {args.backbone}, {images}, {args.steps} steps of {args.batch} labeled images, lr "
        f"{args.lr:.2g}, on {device} in {args.precision}; about {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB")  # fmt: skip


def valid_pixels(shares: list[list[torch.Tensor]]) -> torch.Tensor:
    """The mean number of pixels that are not 255 in a share of the joined batch, for each of the label maps (m, H, W) that
    every share has: what their cross entropies are divided by, so that a step does not depend on how its batch is shared."""
    counts = torch.stack([torch.stack([(label != IGNORE_INDEX).sum() for label in labels]) for labels in shares])
    return mean_over_ranks(counts.float().mean(0))


def compiled(model: torch.nn.Module, args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """torch.compile of `model` with --compile, where this machine can compile; a line says why where not."""
    if not args.compile:
        return model
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no compiler, no Triton, an unsupported Python
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        say(f"note: --compile is not possible here, going on without: {lines[0]}")
        args.compile = False
        return model
    if getattr(args, "grad_norms", False):
        torch._functorch.config.donated_buffer = False  # backward goes through a graph more than once
    return torch.compile(model, dynamic=False)


def gradients_stay(model: torch.nn.Module, last: bool):
    """A context in which backward leaves gradients to this rank: for all shares of its batch but the last."""
    return contextlib.nullcontext() if last or rank_and_size()[1] == 1 else model.no_sync()


def shares_of(args: argparse.Namespace) -> tuple[range, int]:
    """Which shares of a step's batch this rank computes, one after the other, and how many images one has.

    The batch is cut into ranks · --accumulate shares, in the order of its images, so that it holds the same images at any
    number of ranks. Raises UserError where it cannot be cut evenly.
    """
    rank, ranks = rank_and_size()
    total = ranks * args.accumulate
    if args.batch % total or args.batch // total < 2:
        raise UserError(f"--batch {args.batch}: is shared by {ranks} process(es) with --accumulate {args.accumulate}, so it "
                        f"must be a multiple of {total} and at least {2 * total}")  # fmt: skip
    return range(rank * args.accumulate, (rank + 1) * args.accumulate), args.batch // total


def pick_precision(name: str | None, device: torch.device) -> str:
    """bf16 where the hardware multiplies it natively, float32 elsewhere."""
    if name is not None:
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.backends.mkldnn.is_available() and cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def poly_lr(step: int, steps: int, lr: float) -> float:
    """Learning rate of step 0 <= step < steps: lr · (1 - step / steps)^0.9."""
    return lr * (1 - step / steps) ** 0.9


def ramp_up(step: int, steps: int, start: float, end: float) -> float:
    """Factor on an unsupervised loss: 0 before share `start` of the steps, 1 from share `end` on, and exp(-5 (1 - t)²)
    between (Laine & Aila 2017), where t goes from 0 to 1."""
    share = step / steps
    if share < start:
        return 0.0
    if share >= end:
        return 1.0
    t = (share - start) / (end - start)
    return float(torch.exp(torch.tensor(-5.0 * (1 - t) ** 2)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weights of convolutions decay; norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


# ---- files ----


@contextlib.contextmanager
def atomic_write(path: pathlib.Path):
    """A temporary name beside `path`, which replaces `path` when the block ends: `path` is at every moment either the old file
    or the whole new one. Nothing is left of a block that fails. Raises UserError where the file cannot be written."""
    target = pathlib.Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".mgd-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter while it handles the former
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"{printable(path)}: cannot be written ({reason.strerror or reason}); make room or give access, then "
                        "run the same again") from None  # fmt: skip
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def make_folder(flag: str, folder: pathlib.Path):
    """Make `folder` where it is missing, and write a file there for a moment. Raises UserError where either fails, so that a
    run ends before its work and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {printable(folder)}: cannot be made a folder ({error.strerror}); give another") from None
    try:  # permissions say little: not of a read-only disk, nor to root
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {printable(folder)}: cannot be written to ({error.strerror}); give another folder") from None


def without_nan(value):
    """`value` with None for every float that is not finite, in lists and dicts too: JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: pathlib.Path | str) -> str:
    """File names may hold bytes that are not UTF-8; they are shown as such."""
    return str(text).encode(errors="backslashreplace").decode()


# ---- checkpoints ----


def save_checkpoint(path: pathlib.Path, checkpoint: dict):
    """Write `checkpoint` so that `path` is at every moment either the old file or the whole new one; the first rank does.
    Raises UserError where it cannot be written."""
    if rank_and_size()[0] > 0:
        return
    checkpoint["rng"] = torch.get_rng_state()
    checkpoint["versions"] = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    make_folder("--out", path.parent)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: pathlib.Path | str) -> dict:
    """A checkpoint of any stage, on the CPU.

    Keys: `model` (state dict), `peer` (until the last step: CPS's second network, Mean Teacher's trained one), `optimizers`,
    `step`, `rng`, `args`, `classes`, `palette`, `partition`, `row` (the run's entry in result files), `teachers` (their rows),
    `versions`. Raises UserError.
    """
    try:
        with warnings.catch_warnings():  # about files that are no checkpoints, which the line below says
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train it first, or give the path of a last.pt") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the last.pt in it") from None
    except Exception:
        raise UserError(f"{path}: cannot be read as a checkpoint; it is damaged or of another program") from None
    if not isinstance(checkpoint, dict) or not {"model", "args", "classes", "row"} <= checkpoint.keys():
        raise UserError(f"{path}: not a checkpoint of train_teacher.py or distill.py")
    return checkpoint


def load_for_resume(args: argparse.Namespace, partition) -> dict | None:
    """Make OUT, and return OUT/resume.pt where --resume is given and it exists.

    Raises UserError where it stems from other arguments or images, where OUT holds a run but --resume is not given, so that
    none is lost, where OUT is the folder of the data or holds somebody else's files, and where it cannot be written to. Ends
    the script where the run is finished.
    """
    make_folder("--out", args.out)
    path, log = args.out / "resume.pt", args.out / "log.jsonl"
    if args.data and args.out.resolve() == pathlib.Path(args.data).resolve():
        raise UserError(f"--out {args.out}: is the folder of the data; give another")
    if log.exists() and not is_log(log):
        raise UserError(f"{log}: was not written by this project; give another --out, or remove it")
    if not args.resume:
        for found in (path, args.out / "last.pt"):
            if found.exists():
                raise UserError(f"{found}: is of an earlier run; add --resume to go on, give another --out, or remove it")
        return None
    if not path.exists():
        if (args.out / "last.pt").exists():
            say(f"{args.out / 'last.pt'}: this run is finished; remove the file to repeat it")
            sys.exit(0)
        return None
    checkpoint = load_checkpoint(path)
    if (args.out / "last.pt").exists():
        load_checkpoint(args.out / "last.pt")  # which is going to be replaced
    # What may change on the way, though the parts of --accumulate normalise by themselves; all else must be as it was.
    free = {"resume", "out", "workers", "device", "compile", "cache", "accumulate", "log_every", "save_every", "val_every",
            "grad_norms", "data"}  # fmt: skip
    for key, value in sorted(plain_args(args).items(), key=lambda item: item[0] == "window"):  # which follows the crop
        if key not in free and checkpoint["args"].get(key) != value:
            raise UserError(f"{path}: was trained with --{key.replace('_', '-')} {checkpoint['args'].get(key)}, not {value}; "
                            "give the same arguments or another --out, or remove it to start again")  # fmt: skip
    if checkpoint["partition"]["hash"] != partition.hash:
        raise UserError(f"{path}: was trained on partition {checkpoint['partition']['hash']}, which is now {partition.hash}; "
                        "the lists or masks have changed, so give another --out, or remove it to start again")  # fmt: skip
    say(f"{path}: going on after step {checkpoint['step']}")
    return checkpoint


def plain_args(args: argparse.Namespace) -> dict:
    """The arguments as plain types, for checkpoints that `torch.load(weights_only=True)` opens."""
    return {k: str(v) if isinstance(v, pathlib.Path) else list(v) if isinstance(v, tuple) else v
            for k, v in vars(args).items()}  # fmt: skip


# ---- the log ----


def is_log(path: pathlib.Path) -> bool:
    """Whether a file is empty or was written by `Progress`, by its first line."""
    try:
        with open(path, "rb") as file:
            first = file.readline(2**20)
        keys = json.loads(first).keys() if first else {"step", "miou"}
    except (OSError, ValueError, AttributeError):
        return False
    return keys == {"step", "miou"} or "grad_loss" in keys or {"step", "lr", "images_per_s", "data_wait"} <= keys


def logged_step(line: bytes) -> float:
    """The step of a line of a log; infinite where the line was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


class Progress:
    """One progress bar and OUT/log.jsonl. Metrics stay on the device until they are logged."""

    def __init__(self, args: argparse.Namespace, start: int):
        path = args.out / "log.jsonl"
        if rank_and_size()[0] > 0:
            path = os.devnull
        else:  # what a resumed run logged before its checkpoint stays; later lines are made again
            lines = path.read_bytes().splitlines() if start and path.exists() else []
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in lines if logged_step(line) <= start))
        self.file = open(path, "a")  # noqa: SIM115
        self.args, self.since, self.steps, self.waited = args, time.perf_counter(), 0, 0.0
        self.terms, self.first, self.began = 0, start, None  # the steps that the duration is measured over
        quiet = True if rank_and_size()[0] > 0 else None
        self.bar = tqdm(total=args.steps, initial=start, desc=args.out.name, disable=quiet, dynamic_ncols=True)

    def waiting(self, batches):
        """The next item of the iterator `batches`; the time it takes counts as waiting for data."""
        before = time.perf_counter()
        item = next(batches)
        self.waited += time.perf_counter() - before
        return item

    def step(self, step: int, images: int, lr: float, losses: dict[str, torch.Tensor]):
        """Count step `step` (from 0), which saw `images` images. Every `log_every` steps the losses are read and logged, and
        before a checkpoint is saved, so that a training that diverged ends before. Raises UserError."""
        self.steps += 1
        self.bar.update()
        done = step + 1
        if len(losses) != self.terms:  # at the first step, and where pseudo labels set in
            self.terms, self.first = len(losses), step
        if step - self.first in (1, 4):  # the first steps warm up
            float(next(iter(losses.values())))  # waits for the device
            now = time.perf_counter()
            if step - self.first == 4:
                left = self.args.steps - done
                duration = datetime.timedelta(seconds=round((now - self.began) / 3 * left))
                say(f"{self.args.out.name}: about {duration} for {left} more steps such as the last 3")
            self.began = now
        if done % self.args.log_every and done % self.args.save_every and done != self.args.steps:
            return
        means = mean_over_ranks(torch.stack([torch.as_tensor(loss).float() for loss in losses.values()])).tolist()
        means = dict(zip(losses, means, strict=True))
        now = time.perf_counter()
        elapsed, self.since = now - self.since, now
        speed = self.steps * images / elapsed
        data, self.steps, self.waited = self.waited / elapsed, 0, 0.0
        bad = [name for name, value in means.items() if value != value or abs(value) == float("inf")]
        self.write(step=step + 1, lr=lr, images_per_s=speed, data_wait=data, **means)
        if bad:
            raise UserError(f"{self.args.out}: loss '{bad[0]}' is not finite at step {step + 1}; start again "
                            f"with a lower --lr than {self.args.lr} (and remove resume.pt there)")  # fmt: skip
        text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        text += f" lr {lr:.2g} {speed:.1f} img/s data {data:.0%}"
        if self.bar.disable:  # not a terminal: lines instead of a bar
            eta = datetime.timedelta(seconds=round((self.args.steps - step - 1) * images / speed))
            say(f"{self.args.out.name} {step + 1}/{self.args.steps} {text} eta {eta}")
        self.bar.set_postfix_str(text)

    def validated(self, step: int, miou: float):
        """Log a validation after `step` steps; its time does not count as the next steps'."""
        self.write(step=step, miou=miou)
        say(f"{self.args.out.name} step {step}: {miou:.2f} mIoU")
        self.since, self.steps, self.waited = time.perf_counter(), 0, 0.0

    def write(self, **entry):
        self.file.write(json.dumps(without_nan(entry), allow_nan=False) + "\n")
        self.file.flush()

    def close(self):
        self.bar.close()
        self.file.close()
