import argparse
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import backbones
import common
import datasets
import kernels
import models
import onnx_model
import prepare
import run_folder
import stop_signals
import train_teacher

ROOT = pathlib.Path(common.__file__).parent
TINY = ["--workers", "0", "--batch", "2", "--crop", "48", "--head-width", "16", "--lr", "0.02", "--log-every", "1"]
AVERAGED = ["--ema-decay", "0.99", "--lambda-schedule", "decay"]  # beside --method mgd+
NVCC = next(
    (p for p in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if p and pathlib.Path(p, "bin", "nvcc").exists()), None
)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and NVCC else [])]  # of the ops
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # environment of processes whose results are those of the CPU
EMULATED = os.environ.get("MGD_EMULATED")  # by test_cuda_on_cpu.py: the CUDA kernels, compiled for the CPU
LAYOUTS = ["contiguous", "channels_last", "sliced", "channel slice"]


@pytest.fixture(autouse=True)
def signal_handlers():
    """Trainings in this process catch signals, which are pytest's again afterwards."""
    handlers = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a stage in this process, as its command line would: script(module, *arguments) -> (exit code, stdout, stderr)."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        code = 0
        try:
            common.cli(module.main)
        except SystemExit as exit:
            code = exit.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A data set in the folder form: ten training images of which eight have a mask, three val images, three classes."""
    root = tmp_path / "mine"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rng = np.random.default_rng(0)
    names = [f"im{i:02d}" for i in range(13)]
    for i, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(root / "images" / f"{name}.png")
        if i not in (8, 9):
            mask = rng.integers(0, 3, (40, 56), np.uint8)
            mask[0] = 255
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    (root / "train.txt").write_text("\n".join(names[:10]) + "\n")
    (root / "val.txt").write_text("\n".join(names[10:]) + "\n")
    (root / "classes.txt").write_text("road\ntree\ncar\n")
    return root


def open_folder(folder, part="1", **more):
    """The data set and the partition, as a training opens them."""
    args = {"dataset": "folder", "data": folder, "part": part, "cache": None, "labeled_list": None, "unlabeled_list": None}
    return datasets.open_training_data(argparse.Namespace(**{**args, **more}), unlabeled=True)


class FewShapes(datasets.Shapes):
    """The embedded data set with eight val images."""

    def __init__(self, train=512, val=8):
        super().__init__(train, val)


@pytest.fixture
def ckpt(tmp_path, tiny_networks):
    """A checkpoint of a tiny network that was not trained."""
    args = {
        "dataset": "shapes",
        "data": None,
        "backbone": "resnet18",
        "scales": [1.0],
        "stem": "standard",
        "head_width": 16,
        "separable_head": False,
        "precision": "fp32",
        "image_scale": 1.0,
        "window": None,
    }
    data = datasets.Shapes()
    torch.manual_seed(0)
    model = models.build_model("r18", 6, head_width=16).eval()
    with torch.no_grad():  # so that no class wins everywhere
        model.classifier.bias -= model(torch.randn(1, 3, 64, 64)).logits.mean((0, 2, 3))
    row = {
        "method": "sup",
        "role": "student",
        "backbone": "resnet18",
        "partition": "1/8",
        "labeled": 64,
        "steps": 0,
        "seed": 0,
        "gmacs_model": 1.0,
        "mgd_ops": "torch",
    }
    run_folder.save_checkpoint(
        tmp_path / "last.pt",
        {"model": model.state_dict(), "args": args, "classes": data.classes, "palette": data.palette, "row": row},
    )
    return tmp_path / "last.pt"


@pytest.fixture(autouse=True, scope="session")
def small_few_threads_and_no_gpu():
    """Eight val images of the embedded data set, the threads of the smallest machine that tests run on, and, where a stage is
    not told --device, the CPU, on which runs repeat bit for bit."""
    torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 beside another busy program
    datasets.Shapes = FewShapes
    pick_device = common.pick_device
    common.pick_device = lambda name: pick_device(name or "cpu")


@pytest.fixture
def tiny_networks(monkeypatch):
    """Every backbone is a tiny one."""
    monkeypatch.setattr(backbones, "build_backbone", tiny.tiny_backbone)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Checkpoints of a tiny deep and a tiny wide teacher on `shapes`, hardly trained."""
    out = tmp_path_factory.mktemp("teachers")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backbones, "build_backbone", tiny.tiny_backbone)
        for role, backbone in (("deep", "r18"), ("wide", "mbv2")):
            run = f"--out {out / role} --role teacher_{role} --backbone {backbone} --steps 4 --sup-only 0.5 --ramp-up 0.5"
            argv = ["train_teacher.py", *run.split(), *TINY]
            monkeypatch.setattr("sys.argv", argv)
            train_teacher.main()
    return out / "deep" / "last.pt", out / "wide" / "last.pt"


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> pathlib.Path:
    """A data set in the folder form that a tiny network learns within seconds: eight 32x32 scenes of a red and a blue square on
    grey. The val images are copies of the training images."""
    root = tmp_path_factory.mktemp("few") / "few"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rng = np.random.default_rng(0)
    colours = np.array([(90, 90, 90), (200, 60, 60), (60, 60, 200)], np.uint8)
    for i in range(8):
        mask = np.zeros((32, 32), np.uint8)
        for label in (1, 2):
            y, x = rng.integers(0, 16, 2)
            mask[y : y + 14, x : x + 14] = label
        image = colours[mask] + rng.integers(0, 40, (32, 32, 3), np.uint8)
        for split in ("train", "val"):
            Image.fromarray(image).save(root / "images" / f"{split}{i}.png")
            Image.fromarray(mask).save(root / "masks" / f"{split}{i}.png")
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text("".join(f"{split}{i}\n" for i in range(8)))
    (root / "classes.txt").write_text("ground\nred\nblue\n")
    return root


LEARNING = shlex.split(
    "--dataset folder --part 1/2 --weights none --window whole --workers 0 --batch 4 --crop 32 --scales 1 --head-width 16 "
    "--lr 0.05 --steps 40 --log-every 1 --precision fp32"
)


@pytest.fixture(scope="session")
def learned_teachers(tmp_path_factory, few):
    """Two tiny teachers that have learned `few`."""
    out = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backbones, "build_backbone", tiny.tiny_backbone)
        for seed in ("0", "1"):
            argv = ["--out", str(out / seed), "--method", "sup", "--seed", seed, "--data", str(few), *LEARNING]
            monkeypatch.setattr("sys.argv", ["train_teacher.py", *argv])
            train_teacher.main()
    return out / "0" / "last.pt", out / "1" / "last.pt"


@pytest.fixture(scope="session")
def exports(tmp_path_factory, few, learned_teachers) -> pathlib.Path:
    """A folder with a checkpoint that has learned `few`, last.pt, and its exports: fp32.onnx as export.py writes it with
    fp32.json, int8.onnx, and labels.onnx."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import export

    out = tmp_path_factory.mktemp("exports")
    shutil.copy(learned_teachers[0], out / "last.pt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backbones, "build_backbone", tiny.tiny_backbone)
        monkeypatch.setattr("sys.argv", ["export.py", "--ckpt", str(out / "last.pt"), "--out", str(out / "fp32.onnx")])
        export.main()
    metadata = onnx_model.OnnxModel(out / "fp32.onnx").metadata
    seen = [datasets.Folder(few).image(f"train{i}")[None] for i in range(8)]
    export.quantize(out / "fp32.onnx", out / "int8.onnx", seen, metadata={**metadata, "precision": "int8"})
    export.add_labels(out / "fp32.onnx", out / "labels.onnx", {**metadata, "output": "labels"})
    return out


def assert_it_learns(out, terms, falls_to, miou):
    """Each term in the log falls to the fraction `falls_to` of its first value (means of three steps), and the images that the
    training saw are segmented with at least `miou` percent."""
    entries = [entry for entry in log(out) if "lr" in entry]
    for term in terms:
        values = [entry[term] for entry in entries if term in entry]
        assert np.mean(values[-3:]) < falls_to * np.mean(values[:3]), (term, values)
    assert log(out)[-1]["miou"] > miou, log(out)[-1]


def distill_args(out, teachers, *more):
    return ["--out", out, "--deep", teachers[0], "--wide", teachers[1], "--steps", "4", *TINY, *more]


def log(out):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("images_per_s", "data_wait")} for e in entries]


def refuse_constant(name):
    """For json.loads, which takes NaN and Infinity unless parse_constant refuses them."""
    raise ValueError(f"{name} is no JSON")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def errors(script, module, *arguments):
    """The one line that a script prints where it refuses its arguments."""
    code, _, err = script(module, *arguments)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err


def interrupt_at(monkeypatch, module, step):
    original = module.poly_lr

    def poly_lr(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return original(now, *rest)

    monkeypatch.setattr(module, "poly_lr", poly_lr)


def resume_equals_uninterrupted(script, module, arguments, tmp_path):
    assert script(module, "--out", tmp_path / "whole", *arguments)[0] == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, module, 5)
        assert script(module, "--out", tmp_path / "cut", *arguments)[0] == 130
    assert (tmp_path / "cut" / "resume.pt").exists() and not (tmp_path / "cut" / "last.pt").exists()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.Shapes, "has_mask", lambda self, name: name > "train-0100")
        code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--resume")
    assert code == 2 and "lists or masks have changed" in err
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments)
    assert (
        code == 2 and "resume.pt: belongs to an earlier run; pass --resume" in err and (tmp_path / "cut" / "resume.pt").exists()
    )
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--crop", "40", "--resume")
    assert code == 2 and "--crop [48, 48], not [40, 40]" in err
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--steps", "7", "--resume")
    assert code == 2 and "--steps 6, not 7" in err
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--part", "1/4", "--resume")
    assert code == 2 and "--part 1/8, not 1/4" in err
    assert script(module, "--out", tmp_path / "cut", *arguments, "--resume")[0] == 0
    assert not (tmp_path / "cut" / "resume.pt").exists()
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    code, out, _ = script(module, "--out", tmp_path / "cut", *arguments, "--resume")
    assert code == 0 and "this run is finished" in out
    assert script(module, "--out", tmp_path / "cut", *arguments)[0] == 2  # which would have replaced last.pt


@pytest.fixture(scope="session")
def native_kernels():
    """The kernels are loaded, or the test skipped where there is no compiler; with MGD_OPS=torch, PyTorch computes the ops."""
    if EMULATED:
        torch.ops.load_library(EMULATED)
        torch.use_deterministic_algorithms(True)  # what is allocated starts as nan
        return
    if os.environ.get("MGD_OPS") == "torch":
        return
    if shutil.which(kernels.compiler()[0]) is None:
        pytest.skip("no C++ compiler")
    if torch.cuda.is_available() and not NVCC:
        kernels.build("cpu")
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MGD_OPS", "native")
        assert kernels.load_kernels() == "native"


def features(shape, seed, device="cpu", dtype=torch.float64, layout="contiguous"):
    """Random features with an offset, as after a ReLU, in one of the layouts that callers have."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    if layout == "sliced":  # every second pixel and channel of a larger map
        feat = torch.rand(batch, 2 * channels, height, 2 * width, generator=generator, dtype=torch.float64) - 0.3
        return feat.to(device, dtype)[:, ::2, :, ::2]
    if layout == "channel slice":  # some channels of a channels_last map
        feat = torch.rand(batch, channels + 3, height, width, generator=generator, dtype=torch.float64) - 0.3
        return feat.to(device, dtype).contiguous(memory_format=torch.channels_last)[:, 1:-2]
    feat = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.3).to(device, dtype)
    return feat.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else feat


def python(code, *arguments, **environment):
    """Run code in a Python of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def start_ranks(tmp_path):
    """Start a program as two ranks without torchrun, which takes long to start and to end: start_ranks(program) -> processes.
    The first rank holds the store."""
    processes = []

    def start(program, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (tmp_path / "ranks.py").write_text(program)
        for rank in range(2):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = {**os.environ, **NO_GPU, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
            environment |= {key: str(value) for key, value in numbers.items()}
            command = [sys.executable, tmp_path / "ranks.py", *arguments]
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def save_jpeg(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(path)


def save_mask(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def saved(array, path, **more):
    """Save an array as an image, with options of Pillow; its path."""
    Image.fromarray(array).save(path, **more)
    return path


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def voc(tmp_path):
    """VOCdevkit with four training and two val images, beside SBD with masks of one of each and of four more images."""
    rng = np.random.default_rng(0)
    root, sbd = tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "benchmark_RELEASE" / "dataset"
    train, val, more = (
        ["2007_000001", "2007_000002", "2008_000003", "2008_000004"],
        ["2009_000005", "2009_000006"],
        ["2010_000007", "2010_000008", "2011_000009", "2011_000010"],
    )
    for name in train + val + more:
        save_jpeg(root / "JPEGImages" / f"{name}.jpg", rng)
    for name in train + val:
        save_mask(root / "SegmentationClass" / f"{name}.png", rng.choice([0, 1, 20, 255], (40, 56)))
    write_lines(root / "ImageSets" / "Segmentation" / "train.txt", train)
    write_lines(root / "ImageSets" / "Segmentation" / "val.txt", val)
    (sbd / "cls").mkdir(parents=True)
    for i, name in enumerate([train[0], val[0], *more]):
        # as SBD has it: a struct GTcls of fields Boundaries, Segmentation and CategoriesPresent
        entry = np.zeros((1, 1), dtype=[("Boundaries", "O"), ("Segmentation", "O"), ("CategoriesPresent", "O")])
        entry["Segmentation"][0, 0] = np.full((40, 56), i, np.uint8)
        pytest.importorskip("scipy.io").savemat(sbd / "cls" / f"{name}.mat", {"GTcls": entry})
    return tmp_path


# ---- masks of the fixture `folder` ----

COLOURS = np.array([(0, 0, 0), (128, 64, 128), (0, 128, 0)], np.uint8)  # of the three classes


def masks_of(root):
    return sorted((root / "masks").iterdir())


def rewrite(root, change, names=None):
    """Replace masks (of `names`, or all) by change(array)."""
    for path in masks_of(root):
        if names is None or path.stem in names:
            result = change(np.asarray(Image.open(path)))
            (result if isinstance(result, Image.Image) else Image.fromarray(result.astype(np.uint8))).save(path)


def blocks(root):
    """Masks as people draw them: two rectangles on a background, at another place in each."""
    for i, path in enumerate(masks_of(root)):
        mask = np.zeros((40, 56), np.uint8)
        mask[4 : 20 + i, 6:30] = 1
        mask[25:38, 20 + i : 50] = 2
        save_mask(path, mask)


def indexed(mask, order, palette=None):
    """A palette image of the classes `mask`, in which class order[i] has index i; its palette shows the same colours."""
    image = Image.fromarray(np.argsort(order)[mask].astype(np.uint8))
    image.putpalette((COLOURS[list(order)] if palette is None else np.array(palette)).ravel().tolist())
    return image


def rgb(mask):
    """The mask in colours; what is ignored is white."""
    return Image.fromarray(np.vstack([COLOURS, np.zeros((252, 3), np.uint8), [(255, 255, 255)]]).astype(np.uint8)[mask])


def classes_of(root):
    """The mask of each name, as an array."""
    return {path.stem: np.asarray(Image.open(path)) for path in masks_of(root)}


def check(script, root, *more):
    """Run `prepare.py check` with all labels: (exit code, stdout)."""
    code, out, err = script(prepare, "check", "--dataset", "folder", "--data", root, "--part", "1", *more)
    assert "Traceback" not in err
    return code, out
