"""What the fuzzer draws: a function per kind of input, which puts a file or a folder where scripts look for it, and returns the
call that reads it.
"""

import argparse
import base64
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

import backbones
import checks
import convert
import datasets
import evaluate
import inference
import predict
import prepare
import readers
import result_files
import run_folder
from common import UserError, cli
from paper import report
from soak.damage import (
    COCO,
    LABELME,
    ROWS,
    TEXTS,
    VALUES,
    changed,
    checkpoint_of,
    damaged,
    damaged_parts,
    image_files,
    json_file,
    mask_files,
    tensor_file,
    tensors,
    text_file,
)

CPU = torch.device("cpu")
NETWORK = torch.nn.Module()  # which no weights fit but those of nothing

# ---- the calls ----


class Fault(Exception):
    """What a call did that it must not do."""


class Differs(Fault):
    """Two readers do not agree on one file."""


def attempt(call: Callable, *arguments):
    """What a call returns, or None where it raises a UserError; that must be one line."""
    try:
        return call(*arguments)
    except UserError as error:
        text = str(error)
        if not text.isprintable():
            raise Fault(f"the message is not one printable line: {text!r}") from None
        return None


def script(module, *arguments):
    """Run a script as its command line would."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli(module.main)
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        sys.argv = before
    if code not in (0, 1, 2) or "Traceback" in err.getvalue():
        raise Fault(f"{module.__name__} ended with {code}: {err.getvalue()[-500:]}")
    if code == 2 and len([line for line in err.getvalue().splitlines() if ": error: " in line]) != 1:
        raise Fault(f"{module.__name__} refused without one line: {err.getvalue()[-500:]}")
    return out.getvalue()


class Place:
    """The folders of one process: ROOT/data is read, ROOT/run may be written, and all else may not."""

    def __init__(self, root: pathlib.Path):
        self.root, self.data, self.run = root, root / "data", root / "run"
        self.template = root / "template"
        folder = self.template / "mine"
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        images, masks = image_files(), mask_files()
        for name in ("a", "b", "c", "d"):
            (folder / "images" / f"{name}.png").write_bytes(images[0])
        for name in ("a", "b", "c"):
            (folder / "masks" / f"{name}.png").write_bytes(masks[0])
        (folder / "train.txt").write_text("a\nb\nd\n")
        (folder / "val.txt").write_text("c\n")
        (folder / "classes.txt").write_text("road\ntree\ncar\n")
        torch.save(checkpoint_of(self.data / "mine"), self.template / "last.pt")
        self.images, self.masks = images, masks

    def fresh(self):
        """Make ROOT/data as it was, and ROOT/run empty."""
        for folder in (self.data, self.run):
            if folder.is_symlink():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.template, self.data)
        self.run.mkdir()
        os.chdir(self.run)


def one_in(draw, n: int) -> bool:
    return draw(st.integers(1, n)) == 1


def image(draw, place):
    path = place.data / f"photo{draw(st.sampled_from(['.png', '.jpg', '.tif', '.webp', '.bmp', '.gif', '']))}"
    path.write_bytes(damaged_parts(draw, draw(st.sampled_from(place.images))))
    whole = one_in(draw, 15)

    def call():
        size, image = attempt(readers.upright_size, path), attempt(readers.open_image, path)
        if image is not None and image.size != size:
            raise Differs(f"upright_size gives {size}, open_image {image.size}")
        if image is not None and image.mode != "RGB":
            raise Fault(f"open_image gives the mode {image.mode}")
        predict.is_image(path)
        attempt(convert.has_colours, path)
        if whole and (size is None or size[0] * size[1] < 1e6):
            script(predict, "--ckpt", place.data / "last.pt", "--images", path, "--out", place.run / "out")

    return call


def folder_reads(root: pathlib.Path, script_too: bool):
    """Open a data set of the folder form, and look at all of it."""
    dataset = attempt(datasets.Folder, root)
    if dataset is not None:
        part = attempt(datasets.partition, dataset, "1/2")
        if part is not None:
            groups = {"labeled": part.labeled, "unlabeled": part.unlabeled, "val": dataset.val}
            look = attempt(checks.look_at, dataset, groups, True)
            attempt(checks.refuse_faults, dataset, groups)
            for name in {*part.labeled, *dataset.val} - look.problems.keys():
                mask = dataset.mask(name)
                if mask.dtype != np.uint8 or mask.shape != dataset.image(name).shape[:2]:
                    raise Fault(f"a mask is {mask.dtype} {mask.shape}")
                if mask[mask != 255].max(initial=0) >= len(dataset.classes):
                    raise Fault(f"a mask holds {mask.max()} of {len(dataset.classes)} classes")
    if script_too:
        script(prepare, "check", "--dataset", "folder", "--data", root, "--part", "1")


def mask(draw, place):
    root = place.data / "mine"
    content = damaged_parts(draw, draw(st.sampled_from(place.masks)))
    name = draw(st.sampled_from(["a", "c"]))
    (root / "masks" / f"{name}.png").write_bytes(content)
    if draw(st.booleans()):
        (root / "classes.txt").unlink()
    converts, checks_too = one_in(draw, 8), one_in(draw, 8)
    more = draw(st.sampled_from([[], ["--unknown", "nearest"], ["--palette", "voc", "--unknown", "ignore"]]))

    def call():
        attempt(readers.open_mask, root / "masks" / f"{name}.png")
        attempt(readers.flags_for_file, root / "masks" / f"{name}.png")
        attempt(result_files.is_ours, root / "masks" / f"{name}.png")
        folder_reads(root, checks_too)
        if converts:
            script(prepare, "masks", "--masks", root / "masks", "--out", place.run / "masks", *more)

    return call


def name_list(draw, place):
    root = place.data / "mine"
    file = draw(st.sampled_from(["train.txt", "val.txt", "unlabeled.txt", "more.txt"]))
    (root / file).write_bytes(text_file(draw, draw(st.lists(st.sampled_from(["a", "images/b.png", "c", "d.jpg masks/d.png"])))))
    check = one_in(draw, 15)

    def call():
        folder_reads(root, check)
        if (root / "more.txt").exists() and (dataset := attempt(datasets.Folder, root)):
            part = attempt(datasets.listed_partition, dataset, root / "more.txt", None)
            if part and not {*part.labeled, *part.unlabeled} <= dataset.images.keys():
                raise Fault("a list names what is no image")

    return call


def class_list(draw, place):
    root = place.data / "mine"
    (root / "classes.txt").write_bytes(text_file(draw, [*draw(st.lists(TEXTS, max_size=5)), "road", "tree", "car"]))
    check, whole = one_in(draw, 15), one_in(draw, 15)

    def call():
        folder_reads(root, check)
        if whole:
            script(evaluate, "--ckpt", place.data / "last.pt", "--panels", place.run / "panels.png", "--data", root)

    return call


def palette(draw, place):
    root = place.data / "mine"
    lines = draw(st.sampled_from([["0 0 0", "1,2,3", "4 5 6"], ["# c", "road:1,2,3::", "tree:128,0,0::", "car:0,128,0:a:b"]]))
    (root / "palette.txt").write_bytes(text_file(draw, list(lines)))
    converts = one_in(draw, 10)
    (root / "masks" / "a.png").write_bytes(place.masks[draw(st.integers(0, 3))])

    def call():
        folder_reads(root, False)
        attempt(convert.read_colour_file, str(root / "palette.txt"))
        if converts:
            more = ["--palette", root / "palette.txt", "--unknown", "ignore"]
            script(prepare, "masks", "--masks", root / "masks", "--out", place.run / "masks", *more)

    return call


ARGUMENTS = argparse.Namespace(scales=[1.0], flip=False, window=None, precision=None, device=None)


def checkpoint(draw, place):
    path = place.data / "last.pt"
    content = checkpoint_of(place.data / "mine")
    path.write_bytes(tensor_file(draw, content, VALUES | tensors()))
    photo = np.zeros((9, 7, 3), np.uint8)
    whole = one_in(draw, 15)

    def call():
        found = attempt(run_folder.load_checkpoint, path)
        opened = attempt(inference.open_model, path, ARGUMENTS, CPU)
        if opened is not None:
            loaded, model, precision, protocol = opened
            attempt(inference.predict, model, photo, CPU, precision, protocol)
            result_files.setting_values(loaded["row"], result_files.GROUP_BY)
            result_files.settings_of(loaded["args"])
        attempt(result_files.is_ours, path)
        if whole:
            script(evaluate, "--ckpt", path, "--json", place.run / "a.json", "--data", place.data / "mine")
            script(predict, "--ckpt", path, "--images", place.data / "mine" / "images", "--out", place.run / "out")
            if (place.run / "a.json").exists():
                script(report, place.run / "a.json", "--out", place.run / "tables")
        return found

    return call


def weights(draw, place):
    path = place.data / "weights.pth"
    state = {key: value for key, value in checkpoint_of(place.data)["model"].items() if key.startswith("backbone.low")}
    content = draw(st.sampled_from([state, {"state_dict": state}, {"model": {"module." + k: v for k, v in state.items()}}]))
    path.write_bytes(tensor_file(draw, content, VALUES | tensors()))

    def call():
        found = attempt(backbones.read_state_dict, str(path))
        if found is not None:
            attempt(backbones.load_weights, NETWORK, "mobilenetv2", str(path), "standard")
            bare = torch.nn.Module()
            for key, value in state.items():
                bare.register_buffer(key.replace(".", "_"), value.clone())
            needed = {key.replace(".", "_"): value for key, value in state.items()}
            renamed = {key.replace(".", "_"): value for key, value in found.items()}
            if backbones.misfit(renamed, needed) is None:
                bare.load_state_dict(renamed)

    return call


def exported(draw, place):
    """A model in ONNX, as export.py describes it; the image is its own logits."""
    from onnx import TensorProto, helper

    trained = checkpoint_of(place.data / "mine")
    metadata = {key: trained[key] for key in ("args", "row", "classes", "palette")}
    metadata |= {"image_scale": 1.0, "window": None, "size": None, "precision": "fp32", "output": "logits", "params_m": 0.1}
    metadata |= {"bytes_per_pixel": 9.0}
    if draw(st.booleans()):
        metadata = changed(draw, metadata)
    nodes = [helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT)]
    order = (0, 1, 3, 2) if one_in(draw, 4) else (0, 3, 1, 2)  # the former is no shape of logits
    nodes.append(helper.make_node("Transpose", ["float"], ["logits"], perm=order))
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", "H", "W", 3])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 3, "H", "W"])]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    helper.set_model_props(model, {"mgd": json.dumps(metadata)})
    path = place.data / "last.onnx"
    path.write_bytes(damaged(draw, model.SerializeToString()))
    whole = one_in(draw, 15)

    def call():
        opened = attempt(inference.open_model, path, ARGUMENTS, CPU)
        if opened is not None:
            attempt(inference.predict, opened[1], np.zeros((9, 7, 3), np.uint8), CPU, *opened[2:])
        attempt(result_files.is_ours, path)
        if whole:
            script(evaluate, "--ckpt", path, "--json", place.run / "a.json", "--data", place.data / "mine")
            script(predict, "--ckpt", path, "--images", place.data / "mine" / "images", "--out", place.run / "out")

    return call


def result(draw, place):
    content = {"what": "evaluation", "command": "evaluate.py", "created": "2026-01-01T00:00:00+00:00", "rows": ROWS}
    path = place.data / "a.json"
    path.write_bytes(json_file(draw, content))
    whole = one_in(draw, 12)

    def call():
        rows = attempt(report.read_rows, [path])
        attempt(result_files.is_ours, path)
        if rows is not None:
            groups = attempt(quiet, report.average, rows)
            for dataset in dict.fromkeys(group["dataset"] for group in groups):
                of_dataset = [group for group in groups if group["dataset"] == dataset]
                attempt(quiet, report.write_tables, of_dataset, dataset, "mine", place.run / "tables")
        if whole:
            script(report, path, "--out", place.run / "more")

    return call


def quiet(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def log(draw, place):
    path = place.run / "log.jsonl"
    entry = {"step": 1, "lr": 0.1, "images_per_s": 1.0, "data_wait": 0.5, "loss": 1.0, "sup": 1.0}
    entries = [entry, {**entry, "step": 2}, {"step": 2, "miou": 5.0}]
    if draw(st.booleans()):
        entries = changed(draw, entries)
    lines = [json.dumps(e) for e in entries]
    path.write_bytes(text_file(draw, lines))
    drawn = one_in(draw, 6)

    def call():
        attempt(run_folder.is_log, path)
        for line in path.read_bytes().splitlines():
            run_folder.belongs_before(line, 2)
        if drawn:
            script(report, "--curves", path, "--out", place.run / "curves.png")

    return call


def output(draw, place):
    """Names and links by which an output could leave its folder."""
    photos, out = place.data / "photos", place.run / "out"
    photos.mkdir()
    for name in draw(st.lists(TEXTS, min_size=1, max_size=3)):
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            (photos / f"{name[:50]}.png").write_bytes(place.images[0])
    outside = place.root / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    shutil.copyfile(place.data / "mine" / "masks" / "a.png", outside / "a.png")
    result_files.save_png(outside / "ours.png", Image.new("L", (2, 2)))
    (photos / "a.png").write_bytes(place.images[0])
    link = draw(st.sampled_from(["", "", "masks", "overlays", "masks/a.png", "overlays/a.png", "sheet.png", "../classes.txt"]))
    if link:
        (out / link).parent.mkdir(parents=True, exist_ok=True)
        target = outside if link in ("masks", "overlays") else outside / draw(st.sampled_from(["a.png", "ours.png", "absent"]))
        (out / link).symlink_to(target)
    how = "predict" if link in ("masks", "overlays") else draw(st.sampled_from(["predict", "masks"]))  # OUT may be a link
    more = draw(st.sampled_from([[], ["--overwrite"]]))

    def call():
        if how == "predict":
            script(predict, "--ckpt", place.data / "last.pt", "--images", photos, "--out", out, *more)
        else:
            values = ["--values", "0=0", "1=1", "2=2", "--unknown", "ignore"]
            masks = place.data / "mine" / "masks"
            script(prepare, "masks", "--masks", masks, "--out", out / "masks", *values, *more)

    return call


def outline(draw, place):
    """Outlines of LabelMe and COCO."""
    source = place.data / "outlines"
    source.mkdir()
    content = draw(st.sampled_from([LABELME, COCO]))
    if content is LABELME and draw(st.booleans()):
        pixels = base64.b64encode(damaged_parts(draw, draw(st.sampled_from(place.masks)))).decode()
        shape = {"label": "car", "points": [[1, 1], [5, 4]], "shape_type": "mask", "mask": pixels}
        content = {**content, "shapes": [*content["shapes"], shape]}
    (source / "a.json").write_bytes(json_file(draw, content))
    more = draw(st.sampled_from([[], ["--images", place.data / "mine" / "images"], ["--unknown", "ignore", "--empty", "skip"]]))

    def call():
        script(prepare, "masks", "--masks", source, "--out", place.run / "masks", *more)

    return call


def link(draw, place):
    """A link, a pipe or a folder in place of a file."""
    root = place.data / "mine"
    files = ["images/a.png", "images/d.png", "masks/a.png", "masks/c.png", "train.txt", "val.txt", "classes.txt", "palette.txt"]
    path = draw(st.sampled_from([*(root / file for file in files), place.data / "last.pt", root / "images", root / "masks"]))
    moved = place.data / "moved"
    if path.exists():
        path.rename(moved)
    match draw(st.sampled_from(["link", "nowhere", "loop", "zero", "pipe", "folder", "other"])):
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case what:
            targets = {"link": moved, "nowhere": "nowhere", "loop": path, "zero": "/dev/zero", "other": place.data / "last.pt"}
            path.symlink_to(targets[what])
    check = one_in(draw, 5)

    def call():
        folder_reads(root, check)
        attempt(run_folder.load_checkpoint, place.data / "last.pt")
        attempt(backbones.read_state_dict, str(path))
        attempt(report.read_rows, [path])
        attempt(readers.open_image, path)
        if check:
            script(predict, "--ckpt", place.data / "last.pt", "--images", root / "images", "--out", place.run / "out")

    return call


KINDS = {
    "image": image,
    "mask": mask,
    "list": name_list,
    "classes": class_list,
    "palette": palette,
    "checkpoint": checkpoint,
    "weights": weights,
    "exported": exported,
    "result": result,
    "log": log,
    "outline": outline,
    "link": link,
    "output": output,
}

if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
    del KINDS["exported"]
