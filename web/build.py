"""Build the folder of a page that segments photos in a browser.

    python -m web.build --ckpt runs/shapes/1-8/mgd-r18/last.pt
    python -m web.build --ckpt A/last.pt --out page --precision fp32

The folder holds the page, the network as ONNX in each precision, and
onnxruntime-web, which npm downloads once into a cache. Any web server can serve
it: web.serve on this machine, or a host that sends the same two headers.
"""

import base64
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile

import export
from common import ArgumentParser, UserError, cli, printable
from onnx_model import OnnxModel, require
from result_files import write_text
from run_folder import atomic_write, make_folder

PAGE = pathlib.Path(__file__).parent / "index.html"
RUNTIME = "onnxruntime-web"
VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # npm's dist.integrity
ARCHIVE = f"{RUNTIME}-{VERSION}.tgz"
FILES = {  # of the archive's dist/, by the precision that needs them
    "int8": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "fp32": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
NOTICES = ("LICENSE", "ThirdPartyNotices.txt")  # npm's archive has none; the Python package of the same sources has them
SIDES, SIDE = (256, 384, 512, 768, 1024), 512  # of the network's input, in pixels
MARK = "page of MGD"  # `what` of a model.json


# ---- onnxruntime-web ----


def cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mgd"


def check_archive(path: pathlib.Path):
    """Raises UserError unless `path` is the pinned archive, byte for byte."""
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise UserError(f"{printable(path)}: is not {RUNTIME} {VERSION} (its sha512 differs); delete it and try again")


def runtime_archive() -> pathlib.Path:
    """The archive of onnxruntime-web, which is downloaded where the cache lacks it. Raises UserError."""
    archive = cache_folder() / ARCHIVE
    if not archive.exists():
        by_hand = f"or put https://registry.npmjs.org/{RUNTIME}/-/{ARCHIVE} into {archive.parent}"
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(f"npm, which downloads {RUNTIME}, is not installed; install Node.js, {by_hand}")
        make_folder("the cache", archive.parent)
        print(f"downloading {RUNTIME} {VERSION} (33 MB) into {printable(archive.parent)}", flush=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            command = [npm, "pack", f"{RUNTIME}@{VERSION}", "--silent", "--ignore-scripts", "--pack-destination", folder]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
            found = pathlib.Path(folder, ARCHIVE)
            if done.returncode or not found.exists():
                lines = [line.removeprefix("npm error ") for line in done.stderr.splitlines() if line.startswith("npm error ")]
                raise UserError(
                    f"npm cannot download {RUNTIME} {VERSION} ({lines[0] if lines else f'exit code {done.returncode}'}); "
                    f"try again when this machine is online, {by_hand}"
                )
            check_archive(found)
            os.replace(found, archive)
    check_archive(archive)
    return archive


def copy_runtime(archive: pathlib.Path, out: pathlib.Path, precisions: list[str]):
    """Write the files of onnxruntime-web that these precisions need, and its license, into out/ort."""
    # float32 runs on wasm too, where there is no WebGPU
    names = {name for precision in {"int8", *precisions} for name in FILES[precision]}
    with tarfile.open(archive) as tar:
        for name in names:
            write_bytes(out / "ort" / name, tar.extractfile(f"package/dist/{name}").read())
    (onnxruntime,) = require("onnxruntime")
    for name in NOTICES:
        write_bytes(out / "ort" / name, (pathlib.Path(onnxruntime.__file__).parent / name).read_bytes())


def write_bytes(path: pathlib.Path, content: bytes):
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


# ---- the folder ----


def page() -> str:
    """index.html with a policy that allows its own script and style alone, by their hashes."""
    text = PAGE.read_text(encoding="utf-8")
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        text = text.replace(f"HASH-OF-{tag.upper()}", f"'sha256-{digest}'")
    return text


def describe(models: dict[str, pathlib.Path]) -> dict:
    """What model.json tells the page: browsers cannot read the metadata of an ONNX file."""
    about = [OnnxModel(path).metadata for path in models.values()][0]
    return {
        "what": MARK,
        "name": f"{about['row']['method']} {about['row']['backbone']}",
        **{key: about[key] for key in ("classes", "palette", "image_scale")},
        "sides": SIDES,
        "side": SIDE,
        "runtime": f"{RUNTIME} {VERSION}",
        "models": [
            {"precision": precision, "file": path.name, "bytes": path.stat().st_size} for precision, path in models.items()
        ],
    }


def is_page(out: pathlib.Path) -> bool:
    try:
        return json.loads((out / "model.json").read_text(encoding="utf-8"))["what"] == MARK
    except (OSError, ValueError, TypeError, KeyError):
        return False


def check_out(out: pathlib.Path):
    """Make the folder. Raises UserError where it holds anything but a page of this project."""
    make_folder("--out", out)
    if any(out.iterdir()) and not is_page(out):
        raise UserError(f"--out {printable(out)}: holds other files; give a new or an empty folder")


def export_models(args, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Export the checkpoint in each precision into `folder`, as export.py does. Raises UserError."""
    models = {precision: folder / f"{precision}.onnx" for precision in args.precision}
    for precision, path in models.items():
        words = ["--ckpt", args.ckpt, "--out", path, "--precision", precision, "--output", "labels"]
        if precision == "int8":
            words += ["--images", args.images] if args.images else []
            words += ["--data", args.data] if args.data else []
        export.main([*map(str, words)])
    return models


def build_page(models: dict[str, pathlib.Path], archive: pathlib.Path, out: pathlib.Path):
    """Write the page of exported models {precision: path}, which are moved to `out`."""
    for old in out.glob("model-*.onnx"):
        old.unlink()
    moved = {precision: out / f"model-{precision}.onnx" for precision in models}
    for precision, path in models.items():
        os.replace(path, moved[precision])
    (out / "ort").mkdir(exist_ok=True)
    copy_runtime(archive, out, [*models])
    write_text(out / "index.html", page())
    write_text(out / "model.json", json.dumps(describe(moved), indent=1, ensure_ascii=False) + "\n")


# ---- the command line ----


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="python -m web.build --ckpt FILE [options]")
    parser.add_argument(
        "--ckpt", type=pathlib.Path, metavar="FILE", required=True, help="checkpoint of train_teacher.py or distill.py"
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder of the page (default: web, beside the checkpoint)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("int8", "fp32"),
        default=["int8", "fp32"],
        help="int8 for CPUs, fp32 for WebGPU (default: both)",
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the data set, whose training images calibrate int8 (default: as trained)")
    parser.add_argument("--images", type=pathlib.Path, metavar="DIR", help="folder of images that calibrate int8 instead")
    args = parser.parse_args(argv)
    args.out = args.out or args.ckpt.parent / "web"
    args.precision = sorted({*args.precision}, reverse=True)  # int8 first
    return args


def main(argv=None):
    args = parse_args(argv)
    check_out(args.out)
    archive = runtime_archive()
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        build_page(export_models(args, pathlib.Path(folder)), archive, args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{printable(args.out)}: the page, {size / 1e6:.0f} MB; serve it with:")
    print(f"  python -m web.serve {shlex.quote(printable(args.out))}")


if __name__ == "__main__":
    cli(main)
