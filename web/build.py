"""Build the folder of a page that segments photos in a browser.

    python -m web.build --ckpt runs/shapes/1-8/mgd-r18/last.pt
    python -m web.build --ckpt A/int8.onnx A/fp32.onnx --out page

The folder holds the page, the network as ONNX in each precision, and
onnxruntime-web, which npm downloads once into a cache. A checkpoint is exported
as export.py does; or give what export.py wrote with --output labels. Any web
server can serve the folder: web.serve on this machine, or one that sends the
same two headers.
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
from onnx_model import OnnxModel, is_exported, require
from result_files import write_text
from run_folder import atomic_write, check_folder, load_checkpoint

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
PRECISIONS = tuple(FILES)
SIDES, SIDE = (256, 384, 512, 768, 1024), 512  # of the network's input, in pixels
MARK = "page of MGD"  # `what` of a model.json


# ---- onnxruntime-web ----


def cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mgd"


def runtime_archive() -> pathlib.Path:
    """The pinned archive of onnxruntime-web, byte for byte; downloaded where the cache lacks it. Raises UserError."""
    archive = cache_folder() / ARCHIVE
    if not archive.exists():
        by_hand = f"or put https://registry.npmjs.org/{RUNTIME}/-/{ARCHIVE} into {archive.parent}"
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(f"npm, which downloads {RUNTIME}, is not installed; install Node.js, {by_hand}")
        check_folder("the cache", archive.parent)
        archive.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {RUNTIME} {VERSION} (33 MB) into {printable(archive.parent)}", flush=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            command = [
                npm,
                "pack",
                f"{RUNTIME}@{VERSION}",
                "--loglevel",
                "error",
                "--ignore-scripts",
                "--pack-destination",
                folder,
            ]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
            found = pathlib.Path(folder, ARCHIVE)
            if done.returncode or not found.exists():
                lines = [line.removeprefix("npm error ") for line in done.stderr.splitlines() if line.startswith("npm error ")]
                raise UserError(
                    f"npm cannot download {RUNTIME} {VERSION} ({lines[0] if lines else f'exit code {done.returncode}'}); "
                    f"try again when this machine is online, {by_hand}"
                )
            os.replace(found, archive)
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise UserError(f"{printable(archive)}: is not {RUNTIME} {VERSION}: its sha512 differs; delete it and try again")
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


def describe(models: dict[str, OnnxModel], sizes: dict[str, int]) -> dict:
    """What model.json tells the page: browsers cannot read the metadata of an ONNX file."""
    about = next(iter(models.values())).metadata
    return {
        "what": MARK,
        "name": f"{about['row']['method']} {about['row']['backbone']}",
        **{key: about[key] for key in ("classes", "palette", "image_scale")},
        "sides": SIDES,
        "side": SIDE,
        "runtime": f"{RUNTIME} {VERSION}",
        "models": [{"precision": p, "file": f"model-{p}.onnx", "bytes": size} for p, size in sizes.items()],
    }


def is_page(out: pathlib.Path) -> bool:
    try:
        return json.loads((out / "model.json").read_text(encoding="utf-8"))["what"] == MARK
    except (OSError, ValueError, TypeError, KeyError):
        return False


def check_out(out: pathlib.Path):
    """Make the folder. Raises UserError where it holds anything but a page of this project."""
    check_folder("--out", out)
    out.mkdir(parents=True, exist_ok=True)
    if not is_page(out) and any(not re.fullmatch(r"model-\w+\.(onnx|json)", path.name) for path in out.iterdir()):
        raise UserError(f"--out {printable(out)}: holds other files; give a new or an empty folder")


def export_models(args) -> list[pathlib.Path]:
    """Export the checkpoint in each precision into the page's folder, as export.py does. Raises UserError."""
    paths = [args.out / f"model-{precision}.onnx" for precision in args.precision]
    for precision, path in zip(args.precision, paths, strict=True):
        words = ["--ckpt", *args.ckpt, "--out", path, "--precision", precision, "--output", "labels"]
        words += ["--images", args.images] if args.images else []
        words += ["--data", args.data] if args.data else []
        export.main([*map(str, words)])
    return paths


def open_models(paths: list[pathlib.Path]) -> dict[str, OnnxModel]:
    """{precision: model}. Raises UserError where the page cannot use one, or where two do not belong together."""
    models, first = {}, None
    for path in paths:
        model, shown = OnnxModel(path), printable(path)
        if model.output != "labels" or model.metadata["size"]:
            raise UserError(f"{shown}: the page needs labels at any size; export it with --output labels and without --size")
        if model.metadata["precision"] in models:
            raise UserError(f"{shown}: is the second file in {model.metadata['precision']}; give one per precision")
        first = first or model
        if any(model.metadata[key] != first.metadata[key] for key in ("classes", "palette", "image_scale")):
            raise UserError(f"{shown}: has other classes than {first.path}, or another image scale; give one network")
        models[model.metadata["precision"]] = model
    return models


def build_page(paths: list[pathlib.Path], archive: pathlib.Path, out: pathlib.Path):
    """Write the page of exported models into `out`. Raises UserError."""
    models = open_models(paths)
    contents = {precision: pathlib.Path(model.path).read_bytes() for precision, model in models.items()}
    for old in out.glob("model-*"):
        if old.stem.removeprefix("model-") not in models:
            old.unlink()
    for precision, content in contents.items():
        write_bytes(out / f"model-{precision}.onnx", content)
    (out / "ort").mkdir(exist_ok=True)
    copy_runtime(archive, out, [*models])
    write_text(out / "index.html", page())
    about = describe(models, {precision: len(content) for precision, content in contents.items()})
    write_text(out / "model.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


# ---- the command line ----


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="python -m web.build --ckpt FILE [options]")
    path = {"type": pathlib.Path}
    parser.add_argument("--ckpt", nargs="+", metavar="FILE", required=True, help="a checkpoint, or exported models", **path)
    parser.add_argument("--out", metavar="DIR", help="folder of the page (default: web, beside the first FILE)", **path)
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, help="of the export: int8 for CPUs, fp32 for WebGPU (default: both)"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="folder of the data set, for the export (default: as in training)", **path
    )
    parser.add_argument("--images", metavar="DIR", help="images to export with, where there is no data set", **path)
    args = parser.parse_args(argv)
    args.out = args.out or args.ckpt[0].parent / "web"
    args.exported = is_exported(args.ckpt[0])
    if args.exported:
        for flag in ("precision", "data", "images"):
            if getattr(args, flag):
                raise UserError(f"--{flag}: is for a checkpoint, and {printable(args.ckpt[0])} is exported; leave it out")
    elif len(args.ckpt) > 1:
        raise UserError(f"--ckpt {printable(args.ckpt[1])}: give one checkpoint, or exported models alone")
    args.precision = [precision for precision in PRECISIONS if precision in (args.precision or PRECISIONS)]
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.exported:
        open_models(args.ckpt)  # before anything is downloaded or made
    else:
        load_checkpoint(args.ckpt[0])
    check_out(args.out)
    archive = runtime_archive()
    build_page(args.ckpt if args.exported else export_models(args), archive, args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{printable(args.out)}: the page, {size / 1e6:.0f} MB. To open it:")
    print(f"    python -m web.serve {shlex.quote(printable(args.out))}")


if __name__ == "__main__":
    cli(main)
