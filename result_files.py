"""Result files and pictures: the settings of rows, and how files are written.

No script replaces a file that this project did not write: `refuse_outputs` is called before any work. The project's PNGs are
recognized by a text chunk, its JSON files by their keys, its logs and tables by their first line.
"""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common import UserError, line_of, printable
from onnx_model import MARK
from readers import opened, read_json
from recipes import FLAGS, METHODS
from run_folder import atomic_write, check_folder, is_log, load_checkpoint, without_nan

# ---- rows ----

# The keys of a row that may not differ between runs whose seeds are averaged. Older result files lack the OPTIONAL keys, which
# are None then.
DATA = ("dataset", "partition", "partition_hash", "labeled")
NETWORK = ("role", "backbone", "method")
MAIN = ("steps", "head_width", "crop", "weights", "teachers", "teacher_labels", "losses", "regions")
RECORDED = {name: flag.column or name for name, flag in FLAGS.items() if flag.column is not None}  # flag -> key
OPTIONAL = (
    *(key for key in dict.fromkeys(RECORDED.values()) if key not in (*DATA, *NETWORK, *MAIN, "seed")),
    *("teacher_backbones", "teacher_methods", "teacher_steps", "teacher_logit_adjustments", "scales", "flip", "export", "list"),
)
SETTINGS = (*MAIN, *OPTIONAL)
GROUP_BY = (*DATA, *NETWORK, *SETTINGS)
# The settings that only some methods have; for the MAIN ones the row itself shows it (None or empty).
METHODS_WITH = {
    key: FLAGS[name].methods for name, key in RECORDED.items() if FLAGS[name].methods != METHODS and key not in MAIN
}


def settings_of(args: dict) -> dict:
    """The settings of a training, from its arguments, as the keys of a result's row."""
    return {key: args[name] for name, key in RECORDED.items() if name in args}


def setting_values(row: dict, keys) -> tuple:
    """The values of a result's row under `keys`, with None for settings that its method does not have."""
    method = row.get("method")
    return tuple(row.get(key) if method in METHODS_WITH.get(key, (method,)) else None for key in keys)


# ---- writing ----

PNG_CHUNK = {"Software": "mgd"}  # of the project's PNGs: a tEXt chunk's keyword and text
TABLE_MARK = "<!-- written by MGD's report -->"  # the first line of its Markdown tables
TABLE_COLUMNS = ",".join(("source", *DATA, *NETWORK))  # how the first line of its CSV tables begins


def write_result(path: pathlib.Path, what: str, rows: list[dict], seconds: float, ops: str):
    """Write one result file: who measured what, where and with which command, and the rows. Numbers that are not finite become
    null, since JSON has no NaN."""
    result = {
        "what": what,
        "command": printable(" ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "code": git_commit(),
        "machine": {
            "cpu": line_of("/proc/cpuinfo", "model name").partition(":")[2].strip()
            or platform.processor()
            or platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
        },
        "torch": str(torch.__version__),
        "mgd_ops": ops,
        "seconds": round(seconds, 1),
        "rows": rows,
    }
    write_text(path, json.dumps(without_nan(result), indent=1, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str):
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def save_png(path: pathlib.Path, image: Image.Image):
    """Write a PNG that `is_ours`, whole or not at all."""
    chunk = PngInfo()
    chunk.add_text("Software", PNG_CHUNK["Software"])
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunk)


# ---- whose files ----


def is_ours(path: pathlib.Path) -> bool:
    """Whether a file may be replaced without asking: this project wrote it, or it is empty.

    A PNG is recognized by its text chunk, a JSON file by its keys, a log.jsonl by its first entry, a .pt as a checkpoint, a
    .onnx by its metadata, a table by its first line. Any other file belongs to the user.
    """
    try:
        if not path.is_file():
            return False
        if path.stat().st_size == 0:
            return True
        match path.suffix.lower():
            case ".png":
                return png_text(path).get("Software") == PNG_CHUNK["Software"]
            case ".json":
                content = read_json(path, "")
                return isinstance(content, dict) and {"what", "command", "created", "rows"} <= content.keys()
            case ".pt":
                return bool(load_checkpoint(path))  # or it raises UserError
            case ".onnx":
                return MARK in path.read_bytes()
            case ".jsonl":
                return is_log(path)
            case ".md" | ".csv" as suffix:
                with open(path, encoding="utf-8") as file:
                    return file.readline().startswith(TABLE_MARK if suffix == ".md" else TABLE_COLUMNS)
        return False
    except (OSError, ValueError, UserError):
        return False


def png_text(path: pathlib.Path) -> dict:
    """The texts before the pixels of a PNG, beside what else Pillow knows of it. Raises UserError if it is no image."""
    with opened(path, "cannot be read as a PNG") as file:
        return file.info


def refuse_foreign(paths: Iterable[pathlib.Path], overwrite: bool, flag: str):
    """Raises UserError if one of `paths` exists and this project did not write it. `overwrite` allows files, but no folders.
    `flag` names the output on the command line. Call it before any work."""
    foreign = [path for path in paths if os.path.exists(path) and not (overwrite and path.is_file()) and not is_ours(path)]
    if foreign:
        more = f", and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"{flag}: {printable(foreign[0])} exists and was not written by this project{more}; "
            "give another place, or add --overwrite to replace it"
        )


def refuse_links_out(out: pathlib.Path, paths: Iterable[pathlib.Path], flag: str):
    """Raises UserError if one of `paths`, below the folder `out`, is or lies behind a link that leads out of it: a file there
    would be replaced or made. `out` itself may be a link. Call it before any work."""
    root = os.path.join(os.path.realpath(out), "")
    if outside := [path for path in paths if not os.path.realpath(path).startswith(root)]:
        raise UserError(
            f"{flag}: {outside[0]} leads out of that folder by a link; remove the link, or give the folder that it leads to"
        )


def refuse_outputs(outputs: Sequence[tuple[str, pathlib.Path | None]], inputs: Iterable[pathlib.Path], overwrite: bool):
    """Check the files that a script is going to write, as (flag, path), and their folders. Call it before any work.

    Raises UserError if two outputs are one file, if one is among the `inputs` or would replace a file that is not ours (see
    `refuse_foreign`), or if a folder cannot be written to.
    """
    inputs = {os.path.realpath(path) for path in inputs}
    written = {}
    for flag, path in outputs:
        if path is None:
            continue
        real = os.path.realpath(path)
        if real in written:
            raise UserError(f"{flag} {printable(path)}: is also where {written[real]} is written; give each a name of its own")
        written[real] = flag
        if real in inputs:
            raise UserError(f"{flag} {printable(path)}: is a file that is read; give another")
        check_folder(flag, path.parent)
        refuse_foreign([path], overwrite, flag)


# ---- where a result comes from ----


def git_commit() -> str | None:
    """The commit of the code that runs, with `+` where files differ from it."""
    describe = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
