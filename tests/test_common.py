import ast
import errno
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import NO_GPU, ROOT
from PIL import Image

import common
import datasets
import models
import run_folder
from common import UserError


def test_poly_lr_and_ramp_up_are_their_formulas():
    assert common.poly_lr(0, 100, 0.02) == 0.02
    assert common.poly_lr(75, 100, 0.02) == pytest.approx(0.02 * 0.25**0.9)
    assert common.ramp_up(29, 100, 0.3, 0.6) == 0
    assert common.ramp_up(45, 100, 0.3, 0.6) == pytest.approx(math.exp(-5 * 0.25))
    assert common.ramp_up(60, 100, 0.3, 0.6) == 1
    assert common.ramp_up(0, 100, 0.0, 0.0) == 1


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    decayed, free = common.parameter_groups(model, 5e-4)
    assert [p.ndim for p in decayed["params"]] == [4] and decayed["weight_decay"] == 5e-4
    assert len(free["params"]) == 3 and free["weight_decay"] == 0


def test_a_full_disk_is_one_clear_line(monkeypatch, capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit) as ended:
        common.cli(main)
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(
        "the disk is full; free some space and run the same command again\n"
    )


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="--device warp"):
        common.pick_device("warp")


@pytest.mark.parametrize("folder,limit,used,cached", [
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
])  # fmt: skip
def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch, folder, limit, used, cached):
    cpu = torch.device("cpu")
    monkeypatch.setattr(common, "CGROUP", str(tmp_path))
    machine = common.free_memory(cpu)
    assert machine > 10e6
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / limit).write_text("9000000\n")
    (tmp_path / folder / used).write_text("5000000\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 1\n{cached} 2000000\nactive_file 7\n")
    assert common.free_memory(cpu) == 6e6
    (tmp_path / folder / limit).write_text("max\n" if not folder else "9223372036854771712\n")  # no limit
    assert common.free_memory(cpu) > machine / 2


# ---- the line at the end of a script ----


def ended(main, capsys):
    """The exit code and the lines on stderr."""
    with pytest.raises(SystemExit) as stopped:
        common.cli(main)
    return stopped.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "message,line",
    [
        ("a.png: is odd", "a.png: is odd"),
        ("a.png: is odd\n  for two reasons\n", "a.png: is odd for two reasons"),
        (
            "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
            "common.UserError: a.png: is odd\n",
            "a.png: is odd",
        ),
        (
            "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
            "common.UserError: a.png: is odd\nfor two reasons\n",
            "a.png: is odd for two reasons",
        ),
    ],
)
def test_any_message_is_one_line(capsys, message, line):
    def main():
        raise UserError(message)

    code, lines = ended(main, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].endswith(f"error: {line}")


@pytest.mark.parametrize(
    "error",
    [
        UserError("a.png: is odd"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    ],
)
def test_tracebacks_are_shown_on_demand(capsys, monkeypatch, error):
    def culprit():
        raise error

    code, lines = ended(culprit, capsys)
    assert code == 2 and len(lines) == 1 and "culprit" not in lines[0]
    monkeypatch.setenv("MGD_DEBUG", "1")
    debugged, more = ended(culprit, capsys)
    assert debugged == 2 and more[-1] == lines[0] and any("in culprit" in line for line in more[:-1])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        OSError(errno.EACCES, "denied"),
        ValueError("x"),
        RuntimeError("c++ -I/opt/torch_extensions failed"),
        MemoryError(),
    ],
)
def test_no_other_exception_is_caught(error):
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        common.cli(main)
    assert raised.value is error


# PyTorch's own words, for a worker whose memory cannot be had at once, and for one that touches what cannot be had.
SHARED_MEMORY = [
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    "RuntimeError: unable to write to file </torch_331_31_0>: No space left on device (28)\n",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared "
    "memory. Please try to raise your shared memory limit.",
]


@pytest.mark.parametrize("message", SHARED_MEMORY)
def test_lack_of_shared_memory_names_both_ways_out(capsys, message):
    def main():
        raise RuntimeError(message)

    code, lines = ended(main, capsys)
    assert code == 2 and len(lines) == 1 and "shared memory" in lines[0]
    assert "--workers 0" in lines[0] and "--shm-size" in lines[0]


LOADS = """
import multiprocessing, os, signal, sys, time, types
import torch
import common, run_folder

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        with common.being_read(f"images/{i}.png"):
            if i == 9 and sys.argv[1] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return torch.ones(3, 512, 512, dtype=torch.uint8)

def main():
    args = types.SimpleNamespace(out=common.pathlib.Path("run"), steps=8)
    run_folder.check_folder("--out", args.out)
    workers = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}
    batches = common.start_workers(torch.utils.data.DataLoader(Images(), batch_size=8, **workers))
    progress = run_folder.Progress(args, 0)
    for i in range(8):
        progress.next_batch(batches)
        time.sleep(0.1)  # a step, in which the signal of a lost worker arrives
        if i == 4 and sys.argv[1] == "stops":
            sys.exit(75)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    common.cli(main)
"""


def loads(tmp_path, how, *before):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "loads.py").write_text(LOADS)
    command = f"{sys.executable} loads.py {how}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", " && ".join([*before, command])] if before else command.split(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("run:")]  # the progress bar
    return done.returncode, lines


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_lost_worker_is_one_line_that_names_the_file(tmp_path, start_method):
    code, lines = loads(tmp_path, f"dies {start_method}")
    assert code == 2 and len(lines) == 1, lines
    ended = "(was killed by signal: Killed|ended unexpectedly)"
    assert re.match(f"loads.py: error: a data worker {ended} while it read images/9.png;", lines[0]), lines
    assert "--workers 0" in lines[0]


@pytest.mark.slow
def test_workers_ignore_signals_and_end_with_the_script(tmp_path):
    began = time.monotonic()
    code, lines = loads(tmp_path, "stops fork")
    assert code == 75 and not lines, lines
    assert time.monotonic() - began < 40  # most of it for importing PyTorch on a busy machine; it would wait for ever


class Hangs(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        with common.being_read(f"images/{i}.png"):
            if i == 5:
                os.kill(os.getpid(), signal.SIGSTOP)
        return i


@pytest.fixture
def own_sigchld():
    """Puts back the handler of SIGCHLD, which a script resets when it ends with data workers."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("own_sigchld")
def test_a_worker_that_hangs_ends_the_run_with_the_file_named(capsys, monkeypatch):
    monkeypatch.setattr(common, "WORKER_TIMEOUT", 2)

    def main():
        batches = common.start_workers(torch.utils.data.DataLoader(Hangs(), num_workers=2))
        for _ in range(8):
            with common.worker_timeout():
                next(batches)

    code, lines = ended(main, capsys)
    assert code == 2 and len(lines) == 1 and "gave nothing for 2 s while they read images/5.png;" in lines[0], lines
    assert not torch.multiprocessing.active_children()


@pytest.mark.usefixtures("own_sigchld")
def test_a_worker_that_ends_while_it_hands_over_its_batch_is_one_line(capsys, monkeypatch):
    """PyTorch gives the error of its socket where the process has not quite ended yet. Its signal comes a moment later."""
    monkeypatch.setattr(common, "ROWS", [b""])

    def main():
        signal.signal(signal.SIGCHLD, lambda *_: 1 / 0)  # as PyTorch's, it raises an error anywhere
        with common.worker_timeout():
            raise ConnectionResetError(104, "Connection reset by peer")

    explain = common.lost_worker

    def interrupted(message):
        os.kill(os.getpid(), signal.SIGCHLD)
        return explain(message)

    monkeypatch.setattr(common, "lost_worker", interrupted)
    code, lines = ended(main, capsys)
    assert code == 2 and len(lines) == 1 and "error: a data worker ended unexpectedly; if memory ran out" in lines[0], lines


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=1m", "ro"])
def test_a_container_with_little_or_no_shared_memory_is_one_line(tmp_path, options):
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    if subprocess.run(["sh", "-c", f"unshare -m {mount}"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    code, lines = loads(tmp_path, "lives fork", mount)
    assert code == 2 and len(lines) == 1, lines
    assert "shared memory" in lines[0] and "--workers 0" in lines[0] and "--shm-size" in lines[0]


@pytest.mark.slow
def test_error_of_a_data_worker_is_one_line_in_a_real_process(folder):
    """An image breaks off in the middle, which no header shows; a worker process finds it during the first steps."""
    for path in (folder / "images").glob("im0[0-9].png"):
        path.write_bytes(path.read_bytes()[:3000])
    data = f"--dataset folder --data {folder} --part 1 --out {folder / 'run'}"
    options = f"{data} --method sup --backbone r18 --weights none --steps 2 --batch 2 --crop 32 --head-width 16 --workers 1"
    command = [sys.executable, "train_teacher.py", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.pathlib.Path(common.__file__).parent)
    assert done.returncode == 2
    assert (
        len(done.stderr.strip().splitlines()) == 1
        and ".png: cannot be read as an image" in done.stderr
        and "Traceback" not in done.stderr
    )


RANKS = """
import os, signal, sys, time
import torch
import common

def main():
    common.RANK_TIMEOUT, common.REPORT_SECONDS = 4, 1
    common.init_distributed("cpu")
    for step in range(3):
        if os.environ["RANK"] == "1" and step == 2:
            time.sleep(0.5)  # the other rank waits
            if sys.argv[1] == "fails":
                raise common.UserError("it fails")
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        common.mean_over_ranks(torch.ones(1))

common.cli(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_hangs_ends_the_others_and_is_named(start_ranks, how):
    first, _ = start_ranks(RANKS, how)
    _, err = first.communicate(timeout=100)
    lines = [line for line in err.splitlines() if line.startswith("ranks.py")]
    assert first.returncode == 2 and len(lines) == 1 and "rank 1 hangs or has ended" in lines[0], err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_rank_that_says_why_it_ends_is_the_only_one_to_say_so(start_ranks):
    first, second = start_ranks(RANKS, "fails")
    errors = [process.communicate(timeout=100)[1] for process in (first, second)]
    assert first.returncode == second.returncode == 2 and "it fails" in errors[1], errors
    assert "error:" not in errors[0] and "Traceback" not in errors[0], errors


# ---- help and terminals ----


def scripts() -> list[str]:
    files = sorted(path for folder in (".", "benchmarks", "paper") for path in ROOT.glob(f"{folder}/*.py"))
    return [str(path.relative_to(ROOT)) for path in files if '__name__ == "__main__"' in path.read_text()]


ASCII = {
    "PYTHONIOENCODING": "ascii",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "COLUMNS": "80",
    "MGD_OPS": "torch",
    **NO_GPU,
}


def on_ascii_terminal(file, *arguments, cwd=ROOT):
    module = file.removesuffix(".py").replace("/", ".")  # a script below the root may be a module
    command = ["-m", module] if file.startswith("paper/") else [str(ROOT / file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **ASCII}
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("file", scripts())
def test_help_shows_the_commands_of_the_docstring_on_any_terminal(file):
    began = time.monotonic()
    done = on_ascii_terminal(file, "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    assert time.monotonic() - began < 20  # importing PyTorch on a busy machine takes most of them; a build takes longer
    text = done.stdout.decode("ascii")
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text()), clean=False) or ""
    commands = [line.strip() for line in docstring.splitlines() if re.match(r"\s+(\w+=\S+ )*(python|torchrun) ", line)]
    assert len(commands) >= 2 and all(line in text for line in commands), text
    check_options(text)
    for command in re.findall(r"[{,](\w+)(?=[,}])", text.splitlines()[0]):  # such as prepare.py {check,voc,masks}
        check_options(on_ascii_terminal(file, command, "--help").stdout.decode("ascii"))


def check_options(text: str):
    """Help fits 80 columns, begins with a usage of at most two lines, and gives the default of each flag outside the usage."""
    text = re.sub(r"\\u[0-9a-f]{4}|\\x[0-9a-f]{2}", "?", text)  # one character, such as λ, where the terminal has it
    assert max(map(len, text.splitlines())) <= 80, text
    usage = text.split("\n\n")[0]
    assert usage.startswith("usage: ") and len(usage.splitlines()) <= 2, text
    options = re.findall(r"^  (-.*(?:\n {3,}.*)*)", text, re.MULTILINE)
    required = re.findall(r"--\w[\w-]*", usage)
    assert options
    for option in options:
        if not option.startswith(("-h", *(f"{flag} " for flag in required))):
            assert "default:" in option, option


@pytest.mark.slow
def test_messages_and_tables_are_printed_on_a_terminal_that_has_ascii_alone(tmp_path):
    done = on_ascii_terminal("models.py", "--head-width", "0x")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"Traceback" not in done.stderr
    done = on_ascii_terminal("evaluate.py", "--ckpt", tmp_path / "b\xe4r.pt")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"no such checkpoint" in done.stderr
    data, net = datasets.Shapes(), models.build_model("r18", 6, head_width=16)
    data.classes = ["\u9053\u8def", *data.classes[1:-1], "\u03bb"]
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "masks").mkdir()
    for i in range(2):
        Image.fromarray(data.image(f"val-{i}")).save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray(data.mask(f"val-{i}")).save(tmp_path / "data" / "masks" / f"{i}.png")
    for name, lines in (("train", ["0"]), ("val", ["1"]), ("classes", data.classes)):
        (tmp_path / "data" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    args = {
        "dataset": "folder",
        "data": str(tmp_path / "data"),
        "backbone": "resnet18",
        "scales": [1.0],
        "stem": "standard",
        "head_width": 16,
        "separable_head": False,
        "precision": "fp32",
        "image_scale": 1.0,
        "window": None,
    }
    rows = [
        {
            "method": "sup",
            "role": "student",
            "backbone": "resnet18",
            "partition": "1/8",
            "labeled": 64,
            "steps": 0,
            "seed": seed,
            "gmacs_model": 1.0,
            "mgd_ops": "torch",
        }
        for seed in (0, 1)
    ]
    for row in rows:
        run_folder.save_checkpoint(
            tmp_path / f"{row['seed']}.pt",
            {"model": net.state_dict(), "args": args, "row": row, "classes": data.classes, "palette": data.palette},
        )
    files = [tmp_path / name for name in ("0.pt", "1.pt")]
    pictures = ["--panels", tmp_path / "p.png", "--confusion", tmp_path / "c.png"]
    done = on_ascii_terminal("evaluate.py", "--ckpt", *files, "--device", "cpu", *pictures)
    assert done.returncode == 0 and b"\\u9053" in done.stdout and b"\\xb1" in done.stdout, done.stderr
    assert len(done.stderr.splitlines()) == 1 and b"no font here can draw '\\u9053" in done.stderr


def test_a_message_is_one_printable_line():
    error = common.UserError("a\nb\x1b[2J: caf\xe9\n   wrong \udcff\u2028; fix it\n")
    assert str(error).isprintable() and str(error) == "a b\\x1b[2J: caf\xe9 wrong \\udcff ; fix it"
