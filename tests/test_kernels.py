"""How the native kernels are built, cached and loaded, as a user meets it."""

import contextlib
import os
import pathlib
import re
import shutil
import sys

import filelock
import pytest
import torch
from conftest import NO_GPU, NVCC, ROOT, python

import common
import kernels
import mgd_ops

LOAD = "import kernels; print(kernels.load_kernels(), kernels.load_kernels())"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache of a process that has loaded nothing; what it builds are two empty sources, which takes a second."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("region_cpu.cpp", "upsample_cpu.cpp"):
        (sources / name).write_text("")
    monkeypatch.setattr(kernels, "SOURCES", sources)
    monkeypatch.setattr(kernels, "state", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def builds(monkeypatch):
    """MGD_OPS=native builds and loads the kernels."""
    monkeypatch.setenv("MGD_OPS", "native")
    assert kernels.load_kernels() == kernels.load_kernels() == "native"


def falls_back(expected, monkeypatch, capsys):
    """MGD_OPS=auto prints one line and goes on with PyTorch, MGD_OPS=native ends with that line."""
    monkeypatch.setenv("MGD_OPS", "auto")
    assert kernels.load_kernels() == kernels.load_kernels() == "torch"
    out, err = capsys.readouterr()
    assert not out and err.startswith("kernels: cpu kernels not loaded") and expected in err and len(err.splitlines()) == 1
    monkeypatch.setenv("MGD_OPS", "native")
    with pytest.raises(common.UserError, match="MGD_OPS=native: cpu kernels not loaded") as error:
        kernels.load_kernels()
    assert expected in str(error.value)


def path_without(name, folder):
    """A PATH on which everything can be found but `name`: links in `folder` to all the rest."""
    folder.mkdir()
    for place in map(pathlib.Path, os.environ["PATH"].split(os.pathsep)):
        for file in place.iterdir() if place.is_dir() else ():
            if file.name != name and not (folder / file.name).is_symlink():
                (folder / file.name).symlink_to(file)
    return str(folder)


@pytest.fixture
def never_builds(monkeypatch):
    def build(device):
        raise AssertionError(f"{device} is built")

    monkeypatch.setattr(kernels, "build", build)


# ---- the command line ----


def test_help_and_wrong_arguments_build_nothing(script, never_builds):
    code, out, _ = script(kernels, "--help")
    assert code == 0 and "python kernels.py" in out
    code, _, err = script(kernels, "--hlep")
    assert code == 2 and err.startswith("kernels.py: error: unrecognized arguments: --hlep")
    code, _, err = script(kernels, "cpu")
    assert code == 2 and "unrecognized arguments: cpu" in err


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import mgd_ops", "import kernels, sys; assert 'mgd_ops' not in sys.modules"])
def test_importing_builds_nothing(code, tmp_path):
    done = python(f"{code}; import kernels; print(kernels.backend())", TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert done.stdout.split() == ["torch"] and not (tmp_path / "cache").exists(), done.stderr


@pytest.mark.slow
def test_mgd_ops_is_no_script(tmp_path):
    code = "import runpy, sys; sys.argv = ['mgd_ops.py', '--help']; runpy.run_path(sys.argv[0], run_name='__main__')"
    assert "__main__" not in (ROOT / "mgd_ops.py").read_text()
    done = python(f"import os; os.chdir({str(ROOT)!r}); {code}", TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0 and not (tmp_path / "cache").exists(), done.stderr


# ---- what is built where ----


def test_a_build_is_named_by_all_it_depends_on(monkeypatch, tmp_path):
    checkouts = [tmp_path / name / "csrc" for name in ("one", "two")]
    for checkout in checkouts:
        shutil.copytree(kernels.SOURCES, checkout)
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(kernels, "SOURCES", checkouts[0])
    digests = [kernels.digest("sm_90")]
    assert kernels.digest("sm_90") == digests[0]
    digests.append(kernels.digest("sm_100"))
    monkeypatch.setattr(kernels, "SOURCES", checkouts[1])  # another checkout, though its sources are equal
    digests.append(kernels.digest("sm_90"))
    for path in sorted(checkouts[1].iterdir()):  # each file, headers too
        path.write_text(path.read_text() + "\n")
        digests.append(kernels.digest("sm_90"))
    monkeypatch.setenv("CXX", "c++ -m64")
    digests.append(kernels.digest("sm_90"))
    monkeypatch.setattr(torch, "__version__", "9.9")
    digests.append(kernels.digest("sm_90"))
    assert len(set(digests)) == len(digests) > 10


@pytest.mark.parametrize("value,command", [(None, ["c++"]), ("", ["c++"]), ("g++", ["g++"]), ("ccache g++", ["ccache", "g++"])])
def test_the_compiler_may_have_arguments(value, command, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    if value is not None:
        monkeypatch.setenv("CXX", value)
    assert kernels.compiler() == command


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["-fno-math-errno", "-DA='\"1 2\"'"])
def test_kernels_are_built_by_a_compiler_with_arguments(arguments, cache, monkeypatch):
    command = f"{kernels.compiler()[0]} {arguments}"
    monkeypatch.setenv("CXX", command)
    builds(monkeypatch)
    assert os.environ["CXX"] == command


@pytest.mark.slow
def test_ninja_of_an_environment_that_is_not_activated(cache, monkeypatch, tmp_path):
    if not pathlib.Path(sys.executable).with_name("ninja").exists():
        pytest.skip("ninja is not installed beside this Python")
    monkeypatch.setenv("PATH", path_without("ninja", tmp_path / "bin"))
    builds(monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME or /usr/local/cuda")
def test_cuda_source_compiles_links_and_loads():
    arch = {} if torch.cuda.is_available() else {"TORCH_CUDA_ARCH_LIST": "9.0"}
    done = python("import kernels; print(kernels.build('cuda'))", CUDA_HOME=NVCC, **arch)
    assert done.returncode == 0 and list(pathlib.Path(done.stdout.strip()).glob("mgd_cuda_*.so")), done.stderr


# ---- what can go wrong ----


def test_mgd_ops_torch_builds_nothing(monkeypatch, never_builds):
    monkeypatch.setattr(kernels, "state", {})
    monkeypatch.setenv("MGD_OPS", "torch")
    assert kernels.load_kernels() == "torch"


def test_an_unknown_value_of_mgd_ops_is_refused(monkeypatch, never_builds):
    monkeypatch.setenv("MGD_OPS", "fast")
    with pytest.raises(common.UserError, match="MGD_OPS=fast: unknown; choose auto, native or torch"):
        kernels.load_kernels()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "no-such-compiler -m64"])
def test_without_a_compiler_pytorch_computes_the_ops(compiler, cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", compiler)
    falls_back("no C++ compiler 'no-such-compiler'", monkeypatch, capsys)


@pytest.mark.slow
def test_a_compiler_that_fails(cache, monkeypatch, capsys, tmp_path):
    compiler = tmp_path / "broken-c++"
    versions = "*--version*|*-dumpfullversion*) echo 12.0.0;;"
    compiler.write_text(f"#!/bin/sh\ncase \"$*\" in {versions} *) echo 'x.cpp:1: error: no luck'; exit 1;; esac\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    falls_back("no luck", monkeypatch, capsys)


@pytest.mark.slow
def test_without_ninja_pytorch_computes_the_ops(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "build_environment", contextlib.nullcontext)
    monkeypatch.setenv("PATH", path_without("ninja", tmp_path / "bin"))
    falls_back("no ninja; install it", monkeypatch, capsys)


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(cache, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    falls_back("TORCH_EXTENSIONS_DIR", monkeypatch, capsys)


@pytest.mark.slow
def test_a_library_that_cannot_be_opened_is_to_be_deleted(cache):
    code = f"import kernels, pathlib; kernels.SOURCES = pathlib.Path({str(kernels.SOURCES)!r}); print(kernels.load_kernels())"
    assert python(code, MGD_OPS="native", **NO_GPU).stdout.split() == ["native"]
    (library,) = cache.glob("mgd_cpu_*/*.so")
    library.write_bytes(library.read_bytes()[:30])
    done = python(code, MGD_OPS="auto", **NO_GPU)
    assert done.stdout.split() == ["torch"] and len(done.stderr.splitlines()) == 1
    assert f"file too short; delete {library.parent}" in done.stderr and "TORCH_EXTENSIONS_DIR" not in done.stderr
    shutil.rmtree(library.parent)
    assert python(code, MGD_OPS="native", **NO_GPU).stdout.split() == ["native"]


def build_in(folder, baton=False):
    with kernels.lock(folder, baton):
        pass


def test_waiting_for_another_build_ends(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "LOCK_TIMEOUT", 0.1)
    path = re.escape(str(tmp_path / "build.lock"))
    for other in (filelock.FileLock(tmp_path / "build.lock"), kernels.lock(tmp_path, baton=False)):
        with other, pytest.raises(kernels.KernelError, match=f"{path} has been held for .*; end the build"):
            build_in(tmp_path)
    build_in(tmp_path)


def test_the_lock_of_a_build_that_was_killed_is_named_and_left_alone(tmp_path):
    (tmp_path / "lock").touch()
    with pytest.raises(kernels.KernelError, match=f"{re.escape(str(tmp_path / 'lock'))} was left .*; delete that file"):
        build_in(tmp_path, baton=True)
    assert (tmp_path / "lock").exists()
    build_in(tmp_path, baton=False)  # newer torch locks a file that stays


@pytest.mark.slow
def test_a_build_that_is_locked_falls_back(cache, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "LOCK_TIMEOUT", 0.1)
    folder = cache / f"mgd_cpu_{kernels.digest(kernels.processor())}"
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / "build.lock"):
        falls_back(f"{folder / 'build.lock'} has been held for", monkeypatch, capsys)


@pytest.mark.parametrize("mode", ["auto", "native"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_failure_lets_no_rank_wait(rank, mode, monkeypatch):
    """The first rank reaches the barrier after its build, whether that fails or not, and the others before theirs."""
    order = []

    def build(device):
        order.append("build")
        raise kernels.KernelError("no luck")

    monkeypatch.setattr(kernels, "build", build)
    monkeypatch.setattr(kernels, "state", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: order.append("barrier"))
    monkeypatch.setenv("MGD_OPS", mode)
    monkeypatch.setenv("LOCAL_RANK", rank)
    if mode == "native":
        with pytest.raises(common.UserError, match="no luck"):
            kernels.load_kernels()
    else:
        assert kernels.load_kernels() == "torch"
    assert order == (["build", "barrier"] if rank == "0" else ["barrier", "build"])


def main_prints(script, monkeypatch, **environment):
    """The lines of `python kernels.py`, without the CPU's."""
    from torch.utils import cpp_extension

    build = kernels.build
    monkeypatch.setattr(kernels, "build", lambda device: "folder" if device == "cpu" else build(device))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", NVCC)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = script(kernels)
    cpu, cuda = out.splitlines()
    assert code == 0 and not err and cpu.startswith("cpu: folder")
    return cuda


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME or /usr/local/cuda")
def test_an_unknown_architecture_is_one_line(script, monkeypatch, tmp_path):
    cuda = main_prints(script, monkeypatch, TORCH_CUDA_ARCH_LIST="99.9", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert cuda.startswith("cuda: not built: Unknown CUDA arch (99.9)")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_while_nvcc_is_there(script, monkeypatch):
    assert main_prints(script, monkeypatch, TORCH_CUDA_ARCH_LIST="").startswith("cuda: not built: no ")


# ---- constants in both Python and C++ ----


def test_constants_are_those_of_python():
    for file, name, value in (
        ("region_math.h", "kMinNorm", mgd_ops.MIN_NORM),
        ("upsample_math.h", "kIgnore", common.IGNORE_INDEX),
    ):
        (found,) = re.findall(rf"^constexpr \w+ {name} = ([^;]+);", (kernels.SOURCES / file).read_text(), re.MULTILINE)
        assert float(found) == value
