import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
import datasets
import mgd_ops

ROOT = pathlib.Path(common.__file__).parent
TINY = ["--workers", "0", "--batch", "2", "--crop", "48", "--head-width", "16", "--lr", "0.02", "--log-every", "1"]
NVCC = next(
    (p for p in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if p and pathlib.Path(p, "bin", "nvcc").exists()), None
)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() and NVCC else [])]  # of the ops
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # environment of processes whose results are those of the CPU
EMULATED = os.environ.get("MGD_EMULATED")  # by test_cuda_on_cpu.py: the CUDA kernels, compiled for the CPU
LAYOUTS = ["contiguous", "channels_last", "sliced", "channel slice"]


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a stage in this process, as its command line would: script(module, *arguments) -> (exit code, stdout, stderr)."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        code = 0
        try:
            common.run(module.main)
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


@pytest.fixture(autouse=True, scope="session")
def small_few_threads_and_no_gpu():
    """Eight val images of the embedded data set, the threads of the smallest machine that tests run on, and, where a stage is
    not told --device, the CPU, on which runs repeat bit for bit."""
    torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 beside another busy program
    datasets.Shapes.__init__.__defaults__ = (512, 8)
    pick_device = common.pick_device
    common.pick_device = lambda name: pick_device(name or "cpu")


@pytest.fixture(scope="session")
def native_kernels():
    """The kernels are loaded, or the test skipped where there is no compiler."""
    if EMULATED:
        torch.ops.load_library(EMULATED)
        torch.use_deterministic_algorithms(True)  # what is allocated starts as nan
        return
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    if torch.cuda.is_available() and not NVCC:
        mgd_ops.build("cpu")
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MGD_OPS", "native")
        assert mgd_ops.load_kernels() == "native"


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
