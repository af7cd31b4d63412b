"""The CUDA kernels' own source, compiled for the CPU with blocks, warps and barriers emulated (cuda_on_cpu/cuda_runtime.h).

They pass the tests of test_region_op.py and test_upsample_op.py that are marked `kernel_law`, which state what kernels compute,
without a GPU. What nvcc makes of the source, and how fast it is, needs one.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.utils import cpp_extension

import kernels

pytestmark = pytest.mark.slow
HERE = pathlib.Path(__file__).parent


def translate(source: str) -> str:
    """CUDA -> C++ that registers the kernels for the CPU."""
    source, launches = re.subn(r"(\w+<[^;{}()]*?>)<<<(.+?)>>>\(", r"emulated::launch(\1, \2)(", source, flags=re.DOTALL)
    assert launches >= 5 and "<<<" not in source
    source = re.sub(r"extern __shared__ .*? (\w+)\[\];", r"unsigned char* const \1 = emulated::shared();", source)
    source = re.sub(r"const torch::stable::accelerator::DeviceGuard guard\(.*?\);", "", source)
    return source.replace("STABLE_TORCH_LIBRARY_IMPL(mgd, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(mgd, CPU, m)")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> pathlib.Path:
    compiler = kernels.compiler()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    # A misaligned vector would stop a GPU, and an overflowing index read elsewhere: here both end the process.
    checks = ["-fsanitize=alignment,signed-integer-overflow,bounds", "-fsanitize-undefined-trap-on-error"]
    flags = ["-std=c++20", "-O1", "-march=native", "-fPIC", "-w", *checks, "-DUSE_CUDA"]
    flags += ["-U_FORTIFY_SOURCE"]  # which takes jumps between fibers for an attack
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE / 'cuda_on_cpu'}", f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    builds = {}
    for path in (ROOT / "csrc").glob("*_cuda.cu"):
        source = folder / f"{path.stem}.cpp"
        source.write_text(translate(path.read_text()))
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        builds[source.with_suffix(".o")] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert len(builds) == 2
    for build in builds.values():
        _, errors = build.communicate()
        assert build.returncode == 0, errors
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    command = [*compiler, "-shared", *map(str, builds), *libraries, "-o", str(folder / "kernels.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "kernels.so"


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("file", ["test_region_op.py", "test_upsample_op.py"])
def test_properties_of_the_kernels(library, file, order):
    """All of them with threads in order, and the longest of all with threads the other way round too."""
    which = ["-k", "float64_reference and not default" if order == "reverse" else "not default"]
    command = [sys.executable, "-m", "pytest", "-q", HERE / file, "-m", "kernel_law", *which]
    env = {**os.environ, "MGD_EMULATED": str(library), "MGD_ORDER": order, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr
