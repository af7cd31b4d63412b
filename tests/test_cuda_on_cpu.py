"""The CUDA kernels' own source, compiled for the CPU with blocks, warps and barriers emulated (cuda_on_cpu/cuda_runtime.h).

They pass the tests of test_region_op.py and test_upsample_op.py that state what kernels compute, without a GPU. What nvcc makes
of the source, and how fast it is, needs one.
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

HERE = pathlib.Path(__file__).parent
LAWS = "float64_reference low_precision finite_differences mixed_dtypes without_direction memory_format bit_by_bit counts "
LAWS += "without_a_label overflow minus_infinity equal_classes"


def translate(source: str) -> str:
    """CUDA -> C++ that registers the kernels for the CPU."""
    source, launches = re.subn(r"(\w+<[^;{}()]*?>)<<<(.+?)>>>\(", r"emulated::launch(\1, \2)(", source, flags=re.DOTALL)
    assert launches >= 5 and "<<<" not in source
    source = re.sub(r"extern __shared__ .*? (\w+)\[\];", r"unsigned char* const \1 = emulated::shared();", source)
    source = re.sub(r"const torch::stable::accelerator::DeviceGuard guard\(.*?\);", "", source)
    return source.replace("STABLE_TORCH_LIBRARY_IMPL(mgd, CUDA, m)", "STABLE_TORCH_LIBRARY_IMPL(mgd, CPU, m)")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> pathlib.Path:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    sources = []
    for path in (ROOT / "csrc").glob("*_cuda.cu"):
        sources.append(folder / f"{path.stem}.cpp")
        sources[-1].write_text(translate(path.read_text()))
    assert len(sources) == 2
    # A misaligned vector would stop a GPU, and an overflowing index read elsewhere: here both end the process.
    checks = ["-fsanitize=alignment,signed-integer-overflow,bounds", "-fsanitize-undefined-trap-on-error"]
    command = [compiler, "-std=c++20", "-O2", "-march=native", "-fPIC", "-shared", "-w", *checks, "-DUSE_CUDA"]
    command += ["-U_FORTIFY_SOURCE"]  # which takes jumps between fibers for an attack
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE / 'cuda_on_cpu'}", f"-I{ROOT / 'csrc'}"]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()] + [*map(str, sources)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    done = subprocess.run([*command, "-o", folder / "kernels.so"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "kernels.so"


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("file", ["test_region_op.py", "test_upsample_op.py"])
def test_the_laws_of_the_kernels(library, file, order):
    laws = " or ".join(LAWS.split()) if order == "forward" else "float64_reference"
    command = [sys.executable, "-m", "pytest", "-q", HERE / file, "-k", f"({laws}) and not default"]
    env = {**os.environ, "MGD_EMULATED": str(library), "MGD_ORDER": order, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr
