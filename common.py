"""What every script shares: the command line and its errors, devices, processes, and schedules."""

import argparse
import atexit
import contextlib
import datetime
import errno
import functools
import inspect
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import time
import traceback

import torch

IGNORE_INDEX = 255  # the label of pixels that take part neither in a loss nor in mIoU
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect


class UserError(Exception):
    """An error that the user can fix. The message is one printable line that names the file or flag, and the fix."""

    def __init__(self, message: str):
        lines = (line.strip() for line in message.splitlines())
        super().__init__(printable(" ".join(line for line in lines if line)))


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line for a wrong argument, and without abbreviated flags. Help shows the opening docstring as it
    stands, and lines of at most 80 columns whatever the terminal's width."""

    def __init__(self, description=None, **more):  # subcommands pass more
        form = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=26, width=80)
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **more)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def cli(main):
    """Run a script's `main`; a UserError, a full disk or a lost data worker becomes one line on stderr and exit code 2. With
    MGD_DEBUG=1 the traceback stands before that line."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no λ shows \\u03bb
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        except BaseException:
            expect_lost_workers()
            raise
    except UserError as error:
        # A DataLoader worker hands its exception over with the traceback inside the message; what follows the name is ours.
        stop(str(error).rpartition("common.UserError: ")[2])
    except RuntimeError as error:
        reason = lost_worker(f"{error} {error.__cause__ or ''}") or lost_rank(error)
        if reason is None:
            raise
        try:
            stop(reason or None)
        finally:
            end_workers()
            if torch.multiprocessing.active_children() or rank_and_size()[1] > 1:  # Python and PyTorch would wait for them
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            stop("the disk is full; free some space and run the same command again")
        if error.errno not in (errno.EIO, errno.EROFS, errno.ESTALE):
            raise
        file = f"{printable(error.filename)}: " if error.filename else ""
        stop(f"{file}the disk fails ({error.strerror}); run the same command again when it works")
    except KeyboardInterrupt:
        print("\ninterrupted; --resume (or the same make command) continues a training from resume.pt", file=sys.stderr)
        sys.exit(130)


def stop(reason: str | None):
    """End the script with one line, whatever lines `reason` has, or none without a reason, and exit code 2."""
    if os.environ.get("MGD_DEBUG") == "1":
        traceback.print_exc()
    if reason is not None:
        line = " ".join(part.strip() for part in reason.splitlines() if part.strip())
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
    if rank_and_size()[1] > 1:
        with contextlib.suppress(RuntimeError):
            report_end("said")
    sys.exit(2)


def lost_worker(message: str) -> str | None:
    """What to do about a RuntimeError that says that a DataLoader worker died, or that one could not hand its batch over; None
    for any other. PyTorch raises the former from a signal handler, anywhere in the main thread."""
    memory = "</torch_" in message  # how PyTorch calls each piece of shared memory
    if "ancdata" in message or (memory and "Too many open files" in message):
        return "the data workers need more open files; raise the limit (ulimit -n 65536), or add --workers 0"
    if memory or "killed by signal: Bus error" in message:
        return "a data worker ran out of shared memory; add --workers 0, or give the container more (docker run --shm-size 8g)"
    if LATE in message:
        files = files_being_read() or "no file"
        return f"{LATE} for {WORKER_TIMEOUT} s while they read {files}; see whether its disk still answers"
    if worker := re.search(r"DataLoader worker \(pid[^)]*\)+ (is killed by signal: [\w ]+)", message):
        how = worker[1].replace("is", "was", 1).strip()
    elif worker := re.search(r"DataLoader worker \(pid.*\) exited unexpectedly", message):
        how = "ended unexpectedly"
    else:
        return None
    files = files_being_read(re.findall(r"\d+", worker[0]))
    reading = f" while it read {files}" if files else ""
    return f"a data worker {how}{reading}; if memory ran out, lower --workers or --batch, or add --workers 0"


WORKER_TIMEOUT = 300  # seconds without a batch after which a run ends; a slow network disk reads some large images in less
LATE = "the data workers gave nothing"
ROW = 4096 + 32  # bytes for a process id and a path, which Linux and macOS limit to 4,096 bytes
ROWS: list = []  # in the main process: for each of its loaders, the rows that its workers write
own_row = None  # in a worker: its row


def start_workers(loader: torch.utils.data.DataLoader):
    """iter(loader). Raises UserError where its processes cannot be started."""
    try:
        if loader.num_workers:
            torch.multiprocessing.Lock()  # after a failure in the loader itself, PyTorch's clean-up writes a traceback
            rows = multiprocessing.RawArray("c", ROW * loader.num_workers)
            ROWS.append(rows)
            loader.worker_init_fn = functools.partial(begin_worker, rows)
        batches = iter(loader)
    except OSError as error:
        raise UserError(
            f"the {loader.num_workers} data workers cannot be started ({error.strerror or error}); add --workers 0, or give "
            "the container shared memory (docker run --shm-size 8g)"
        ) from None
    atexit.register(end_workers)
    return batches


@contextlib.contextmanager
def worker_timeout():
    """A block that waits for data workers. It ends with a RuntimeError after WORKER_TIMEOUT seconds, even where DataLoader's
    own would wait on: for a memory handle of a worker that has been stopped altogether."""

    def end(*_):
        raise RuntimeError(LATE)

    if not ROWS:
        yield
        return
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, WORKER_TIMEOUT)
    try:
        yield
    except (ConnectionError, EOFError) as error:  # the worker that made this batch is gone, and its memory handle with it
        raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def begin_worker(rows, worker: int):
    """In a new data worker: a signal to all processes of a training must not end the workers before the step."""
    global own_row
    own_row = memoryview(rows).cast("B")[worker * ROW : (worker + 1) * ROW]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def expect_lost_workers():
    """From now on a lost data worker raises no error, which PyTorch's signal handler does anywhere: also in a last message."""
    if ROWS:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_workers():
    """Kill the data workers that are left; they ignore PyTorch's SIGTERM, and one may hang."""
    workers = torch.multiprocessing.active_children()
    if workers:
        expect_lost_workers()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1)  # one that waits for a disk does not end


@contextlib.contextmanager
def being_read(path: pathlib.Path | str):
    """A block that reads a file. If a data worker ends or hangs in it, the main process names the file."""
    if own_row is not None:
        note = f"{os.getpid()} ".encode() + os.fsencode(path)[: ROW - 32]
        own_row[: len(note) + 1] = note + b"\0"
    try:
        yield
    finally:
        if own_row is not None:
            own_row[0] = 0


def files_being_read(workers: list[str] | None = None) -> str:
    """The files that the data workers with these process ids are reading, or all of them; empty where there is none."""
    found = []
    for rows in ROWS:
        for start in range(0, len(rows), ROW):
            pid, _, path = rows[start : start + ROW].partition(b"\0")[0].partition(b" ")
            if path and (workers is None or pid.decode() in workers):
                found.append(printable(os.fsdecode(path)))
    return " and ".join(dict.fromkeys(found))


# ---- devices and processes ----


def pick_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]} Leave --device out for what is there") from None
    return torch.device(name)


def init_distributed(name: str | None) -> torch.device:
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
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=RANK_TIMEOUT))
    atexit.register(torch.distributed.destroy_process_group)
    return device


# Seconds that a rank waits for another one, after which the run ends. Building the kernels, compiling a network, and what is
# left of another rank's validation take less. It is longer than WORKER_TIMEOUT, so that a file that hangs is named first.
RANK_TIMEOUT = 600
REPORT_SECONDS = 3.0  # a rank that lives notices within this time that another one has ended


def report_end(how: str) -> torch.distributed.Store:
    """Tell the other ranks that this one ends: `how` is "said" if it has said why, or "lost" if it lost another one. The first
    report counts. Returns the store through which the ranks met, which torchrun holds, or else the first rank."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=2))
    store.compare_set(f"mgd/ended/{rank_and_size()[0]}", "", how)
    return store


def lost_rank(error: RuntimeError) -> str | None:
    """What to say about a RuntimeError of a rank that waited for another one in vain; empty where another rank says it, and
    None for any other error. Every rank that lives gets such an error and reports it, so the lost ones are the silent ones."""
    rank, size = rank_and_size()
    if size == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
        return None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, as soon as one rank has ended
    try:
        store = report_end("lost")
        time.sleep(REPORT_SECONDS)
        keys = [f"mgd/ended/{other}" for other in range(size)]
        reports = [store.get(key).decode() if store.check([key]) else "" for key in keys]
    except RuntimeError:
        reports = ["", *["lost"] * (size - 1)]  # the first rank held the store
    if reports.index("lost") != rank or ("" not in reports and "said" in reports):
        return ""
    lost = " and ".join(str(other) for other, report in enumerate(reports) if not report)
    who = f"rank {lost} hangs or has ended" if lost else f"the ranks lost each other ({str(error).splitlines()[0]})"
    return (
        f"{who}; another rank waited at most {RANK_TIMEOUT} s for it. See its last lines and its machine, and run the same "
        "command again"
    )


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def print0(text: str):
    """Print on the first rank alone."""
    if rank_and_size()[0] == 0:
        print(text, flush=True)


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
        print0("note: batch norm sees each rank's images alone, since SyncBatchNorm needs GPUs")
    # each rank has running statistics of its own; see `sync_buffers`
    parallel = torch.nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters  # in torch 2.15
    return parallel(model, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False})


def sync_buffers(model: torch.nn.Module):
    """Give every rank the first one's running statistics, so that all validate the network that is saved."""
    if rank_and_size()[1] > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def line_of(path: str, *begins: str) -> str:
    """The first line of a file of /proc that starts with one of `begins`; empty where there is none, as on macOS."""
    with contextlib.suppress(OSError):
        return next((line for line in pathlib.Path(path).read_text().splitlines() if line.startswith(begins)), "")
    return ""


# A container's limit of memory, what it uses, and which part of that holds files, in version 2 of Linux's control groups and 1.
CGROUP = "/sys/fs/cgroup"
CGROUP_FILES = (
    ("memory.max", "memory.current", ("memory.stat", "inactive_file ")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", ("memory/memory.stat", "total_inactive_file ")),
)


def free_memory(device: torch.device) -> float:
    """Bytes that a training on `device` can still have, in a container too; infinite where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    available = line_of("/proc/meminfo", "MemAvailable")
    free = [1024 * int(available.split()[1])] if available else []
    for limit, used, cached in CGROUP_FILES:
        numbers = [line_of(f"{CGROUP}/{file}", *begins).split() for file, *begins in ((limit, ""), (used, ""), cached)]
        if all(numbers) and numbers[0] != ["max"]:
            allowed, held, files = (int(words[-1]) for words in numbers)
            free.append(allowed - held + files)  # the kernel gives the memory of files back
    return min(free, default=float("inf")) / rank_and_size()[1]


def print_plan(args: argparse.Namespace, device: torch.device, partition, unlabeled: bool, needed: float, more: str = ""):
    """Print what a training will do. `needed` is an estimate of its memory in bytes, on the low side. Raises UserError where
    less is free."""
    images = f"{len(partition.labeled)} labeled and {len(partition.unlabeled) if unlabeled else 'no'} unlabeled images"
    free, sides = free_memory(device), "x".join(map(str, args.crop))
    if needed > free:
        raise UserError(
            f"--batch {args.batch}: crops of {sides} need {needed / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB free; "
            "raise --grad-accum, or lower --batch or --crop"
        )
    print0(
        f"{args.out}: {args.method} {args.backbone}, {images}{more}, {args.steps} steps of {args.batch} labeled images, lr "
        f"{args.lr:.2g}, on {device} in {args.precision}; about {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB"
    )


def compiled(model: torch.nn.Module, args: argparse.Namespace, device: torch.device, retain_graph=False) -> torch.nn.Module:
    """torch.compile of `model` with --compile, where this machine can compile; otherwise a line gives the reason. With
    `retain_graph` backward may run through a graph more than once."""
    if not args.compile:
        return model
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no compiler, no Triton, an unsupported Python
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        print0(f"note: --compile is not possible here, going on without: {lines[0]}")
        args.compile = False
        return model
    if retain_graph:
        torch._functorch.config.donated_buffer = False
    return torch.compile(model, dynamic=False)


def maybe_no_sync(model: torch.nn.Module, last: bool):
    """A context in which backward does not average gradients over ranks: for all micro-batches of a step but the last."""
    return contextlib.nullcontext() if last or rank_and_size()[1] == 1 else model.no_sync()


def pick_precision(name: str | None, device: torch.device) -> str:
    """bf16 where the hardware multiplies it natively, float32 elsewhere."""
    if name is not None:
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = {"avx512_bf16", "amx_bf16"} & {*line_of("/proc/cpuinfo", "flags").split()}
    return "bf16" if native and torch.backends.mkldnn.is_available() else "fp32"


def autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ---- schedules ----


def poly_lr(step: int, steps: int, lr: float) -> float:
    """Learning rate of step 0 <= step < steps: lr · (1 - step / steps)^0.9."""
    return lr * (1 - step / steps) ** 0.9


def ramp_up(step: int, steps: int, start: float, end: float) -> float:
    """Factor on an unsupervised loss: 0 before the fraction `start` of the steps, 1 from the fraction `end` on, and
    exp(-5 (1 - t)²) between (Laine & Aila 2017), where t goes from 0 to 1."""
    done = step / steps
    if done < start:
        return 0.0
    if done >= end:
        return 1.0
    t = (done - start) / (end - start)
    return float(torch.exp(torch.tensor(-5.0 * (1 - t) ** 2)))


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float):
    """Give every group of parameters its learning rate, and forget the last step's gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)


def due(step: int, every: int, steps: int) -> bool:
    """Whether something that is done every so many steps is due after step `step` (from 0); the last step has its own end."""
    return every > 0 and (step + 1) % every == 0 and step + 1 < steps


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weights of convolutions decay; norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def printable(text: pathlib.Path | str) -> str:
    """File names may hold line ends, other control characters and bytes that are not UTF-8; they are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
