"""Build, cache and load the native kernels of the ops in `mgd_ops.py`.

    python kernels.py      # build the kernels of csrc/ ahead (make ext)
    TORCH_EXTENSIONS_DIR=build python kernels.py      # and keep them in build/

`load_kernels` builds the kernels where they are not built yet, and loads them.
With MGD_OPS=auto (the default) a failure is reported in one line, with its
reason, and PyTorch computes the ops. MGD_OPS=native raises instead, and
MGD_OPS=torch never tries. Builds are kept in TORCH_EXTENSIONS_DIR.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import sys
import time

import filelock  # of torch's own requirements
import torch

from common import ArgumentParser, UserError, cli, line_of

SOURCES = pathlib.Path(__file__).parent / "csrc"
LOCK_TIMEOUT = 120.0  # seconds; a build takes 20 to 40
state = {}  # device type -> "native", or the reason why its kernels are not loaded


class KernelError(Exception):
    """Why the kernels cannot be built or loaded, and the fix, in one line."""


def backend(device: str | None = None) -> str:
    """The path that computes the ops on a type of device, by default this machine's: `native` or `torch`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return "native" if state.get(device) == "native" else "torch"


def load_kernels() -> str:
    """Build the kernels where they are not built yet, load them, and return `backend()`.

    Call it once per process, before any torch.compile. Under torchrun the first rank of each machine builds while the others
    wait. A failure is remembered: with MGD_OPS=auto it is reported in one line on stderr and PyTorch takes over, with
    MGD_OPS=native it is raised as UserError.
    """
    mode = os.environ.get("MGD_OPS", "auto")
    if mode not in ("auto", "native", "torch"):
        raise UserError(f"MGD_OPS={mode}: unknown; choose auto, native or torch")
    if mode == "torch":
        return backend()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if distributed and not first:
        torch.distributed.barrier()  # the first rank has built
    try:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            load(device, mode)
    finally:  # also where it raises: the other ranks wait, and then fail by themselves
        if distributed and first:
            torch.distributed.barrier()
    return backend()


def load(device: str, mode: str):
    """Build and load the kernels of a type of device, unless that has been tried before."""
    if device not in state:
        try:
            build(device)
            state[device] = "native"
        except KernelError as error:
            state[device] = str(error)
            if mode == "auto":
                print(f"kernels: {device} kernels not loaded, PyTorch computes instead: {error}", file=sys.stderr)
    if mode == "native" and state[device] != "native":
        raise UserError(f"MGD_OPS=native: {device} kernels not loaded: {state[device]}")


def build(device: str) -> pathlib.Path:
    """Build and load the kernels of `cpu` or `cuda`; return the folder that holds them. Raises KernelError."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it prints where it found CUDA
    from torch.utils import cpp_extension  # takes a second, and only builds need it

    if shutil.which(compiler()[0]) is None:
        raise KernelError(f"no C++ compiler '{compiler()[0]}'; install one (such as Debian's g++), or set CXX")
    if device == "cuda":
        if cpp_extension.CUDA_HOME is None or not pathlib.Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists():
            raise KernelError("no nvcc; install the CUDA toolkit of torch's version, or set CUDA_HOME to its folder")
        names, target = ["region_cuda.cu", "upsample_cuda.cu"], os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if not target:
            if not torch.cuda.is_available():
                raise KernelError("no GPU to build for; set TORCH_CUDA_ARCH_LIST, such as 9.0, to build for another machine")
            target = str(torch.cuda.get_device_capability())
    else:
        names, target = ["region_cpu.cpp", "upsample_cpu.cpp"], processor()
    name = f"mgd_{device}_{digest(target)}"
    folder = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
    flags = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is read-only")
        with lock(folder, baton=not hasattr(cpp_extension, "FileLock")), build_environment(folder):
            if not cpp_extension.is_ninja_available():
                raise KernelError("no ninja; install it with pip install ninja")
            cpp_extension.load(
                name,
                [str(SOURCES / file) for file in names],
                extra_cflags=[*flags, "-march=native"],
                extra_cuda_cflags=[*flags, "-DUSE_CUDA", "-lineinfo", "--expt-relaxed-constexpr"],
                build_directory=str(folder),
                is_python_module=False,
                with_cuda=device == "cuda",
            )
    except OSError as error:
        if error.errno is None and error.__cause__ is not None:  # torch could not open the library that it had built
            raise KernelError(f"{one_line(error.__cause__)}; delete {folder}, and the next start builds it again") from None
        raise KernelError(f"{one_line(error)}; set TORCH_EXTENSIONS_DIR to a folder that can be written") from None
    except (RuntimeError, ValueError) as error:  # the latter for a TORCH_CUDA_ARCH_LIST that torch does not know
        raise KernelError(f"{one_line(error)}; fix it, or set MGD_OPS=torch to do without") from None
    return folder


def compiler() -> list[str]:
    """The command of the C++ compiler. CXX may hold arguments, such as `ccache g++`."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def digest(target: str) -> str:
    """A hash that names a build: of the kernels' sources and folder, so that checkouts never replace each other's build, and
    of torch, CUDA, the compiler and its target."""
    parts = [torch.__version__, str(torch.version.cuda), target, *compiler(), str(SOURCES.resolve())]
    parts += [f"{path.name}\n{path.read_text()}" for path in sorted(SOURCES.iterdir()) if path.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def processor() -> str:
    """A text about the processor that -march=native depends on."""
    return line_of("/proc/cpuinfo", "flags", "Features") or platform.machine() + platform.processor()


@contextlib.contextmanager
def build_environment(folder: pathlib.Path):
    """The variables as torch needs them: it takes CXX as the name of a program, so if that holds arguments, a script in
    `folder` has them; and PATH finds the ninja of this Python's environment even if that environment is not activated."""
    before = os.environ.copy()
    os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), before.get("PATH", "")])
    if len(compiler()) > 1:
        script = folder / "cxx"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler())} "$@"\n')
        script.chmod(0o755)
        os.environ["CXX"] = str(script)
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def lock(folder: pathlib.Path, baton: bool):
    """Hold the lock of a build's folder; after LOCK_TIMEOUT seconds of waiting, raise KernelError.

    torch has a lock of its own, `lock`, but waits for it without end. All builds take this one first, so that torch's is free,
    unless it is the file itself, as of older torch (`baton`), and its owner was killed. It is never deleted here.
    """
    try:
        held = filelock.FileLock(folder / "build.lock").acquire(timeout=LOCK_TIMEOUT)
    except filelock.Timeout as error:
        raise KernelError(
            f"{error.lock_file} has been held for {LOCK_TIMEOUT:.0f} s; end the build that holds it, or set MGD_OPS=torch"
        ) from None
    with held:
        if baton and (folder / "lock").exists():
            raise KernelError(f"{folder / 'lock'} was left by a build that was killed; delete that file, or set MGD_OPS=torch")
        yield


def one_line(error: BaseException) -> str:
    """The most informative line of a build's output: the first error of the compiler, or the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[-1] if len(lines) > 1 else lines[0])


def main():
    ArgumentParser(__doc__, usage="%(prog)s").parse_args()
    for device in ("cpu", "cuda"):
        began = time.perf_counter()
        try:
            folder = build(device)
            print(f"{device}: {folder} ({time.perf_counter() - began:.0f} s)")
        except KernelError as error:
            print(f"{device}: not built: {error}")


if __name__ == "__main__":
    cli(main)
