import json
import math
import shutil
import types

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, errors, refuse_constant
from PIL import Image

import evaluate
import pictures
import result_files
import run_folder
from common import UserError


def test_result_file_records_where_it_comes_from(tmp_path):
    result_files.write_result(tmp_path / "a" / "r.json", "evaluation", [{"miou": 1.5}], 2.0, "torch")
    result = json.loads((tmp_path / "a" / "r.json").read_text())
    assert {"what", "command", "created", "code", "machine", "torch", "mgd_ops", "seconds", "rows"} == result.keys()
    assert result["machine"].keys() == {"cpu", "gpu", "threads"} and result["rows"] == [{"miou": 1.5}]


def test_no_result_file_holds_nan(tmp_path):
    rows = [{"miou": math.nan, "iou": {"a": math.inf, "b": 2.0}, "scales": (1.0, -math.inf)}]
    result_files.write_result(tmp_path / "r.json", "evaluation", rows, 2.0, "torch")
    read = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse_constant)
    assert read["rows"] == [{"miou": None, "iou": {"a": None, "b": 2.0}, "scales": [1.0, None]}]


# ---- whose files ----


def write_figure(path):
    from matplotlib import pyplot as plt

    pictures.save_figure(path, plt.figure(figsize=(1, 1)))


def write_log(path):
    progress = run_folder.Progress(types.SimpleNamespace(out=path.parent, steps=2, log_every=1, save_every=9, lr=0.1), 0)
    progress.step(0, 1, 0.1, {"sup": torch.tensor(1.0)}, torch.tensor(0.0))
    progress.close()


def write_checkpoint(path):
    run_folder.save_checkpoint(path, {"model": {}, "args": {}, "classes": [], "row": {}})


OURS = {
    "image.png": lambda path: result_files.save_png(path, Image.new("RGB", (3, 2))),
    "mask.PNG": lambda path: result_files.save_png(path, Image.new("P", (3, 2))),
    "figure.png": write_figure,
    "r.json": lambda path: result_files.write_result(path, "evaluation", [], 0.0, "torch"),
    "log.jsonl": write_log,
    "last.pt": write_checkpoint,
    "empty.csv": lambda path: path.touch(),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_files_are_known(tmp_path, name):
    OURS[name](tmp_path / name)
    assert result_files.is_ours(tmp_path / name)
    result_files.refuse_foreign([tmp_path / name, tmp_path / "absent.png"], False, "--out")


def foreign_figure(path):
    figure = matplotlib.figure.Figure()
    figure.savefig(path)


FOREIGN = {
    "image.png": lambda path: Image.new("RGB", (3, 2)).save(path),
    "figure.png": foreign_figure,
    "jpeg.png": lambda path: Image.new("RGB", (3, 2)).save(path, format="JPEG"),
    "cut.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xff\xff\xfftEXt"),
    "settings.json": lambda path: path.write_text('{"what": "my notes"}'),
    "list.json": lambda path: path.write_text("[1, 2]"),
    "words.json": lambda path: path.write_text("not json"),
    "paper.json": lambda path: shutil.copy(ROOT / "results" / "paper.json", path),
    "log.jsonl": lambda path: path.write_text('{"step": 1, "lr": 0.1, "loss": 2.0}\n'),
    "list.jsonl": lambda path: path.write_text("[1]\n"),
    "last.pt": lambda path: torch.save({"weight": torch.zeros(2)}, path),
    "model.onnx": lambda path: path.write_bytes(b"\x08\x0a:\x20\n\x04mgd2\x12\x02{}"),
    "table.md": lambda path: path.write_text("# My notes\n"),
    "table.csv": lambda path: path.write_text("source,dataset\nme,mine\n"),
    "bytes.csv": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "train_aug.txt": lambda path: path.write_text("2007_000032\n"),
    "folder.png": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_refused(tmp_path, name):
    path = tmp_path / name
    FOREIGN[name](path)
    assert not result_files.is_ours(path)
    with pytest.raises(UserError) as refused:
        result_files.refuse_foreign([tmp_path / "absent", path, path, path], False, "--out")
    line = str(refused.value)
    assert line.startswith(f"--out: {path} exists") and "and 2 more" in line and "--overwrite" in line and "\n" not in line
    if path.is_file():
        result_files.refuse_foreign([path], True, "--out")
    else:  # a folder is never replaced
        with pytest.raises(UserError, match="exists"):
            result_files.refuse_foreign([path], True, "--out")


def test_a_mask_with_the_chunk_is_the_same_mask(tmp_path):
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 6, (5, 7), np.uint8))
    mask.putpalette(list(range(30)))
    result_files.save_png(tmp_path / "m.png", mask)
    read = Image.open(tmp_path / "m.png")
    assert read.mode == "P" and np.array_equal(read, mask) and read.getpalette()[:18] == list(range(18))


def test_two_outputs_of_one_name_and_an_output_that_is_an_input_are_refused(tmp_path):
    a, b, link = tmp_path / "a.png", tmp_path / "b.pt", tmp_path / "link.png"
    b.touch()
    link.symlink_to(a)
    result_files.refuse_outputs([("--json", None), ("--panels", a)], [b], False)
    with pytest.raises(UserError, match=r"--confusion .*a.png: is also where --panels is written"):
        result_files.refuse_outputs([("--panels", a), ("--confusion", tmp_path / "x" / ".." / "a.png")], [], True)
    with pytest.raises(UserError, match=r"--confusion .*link.png: is also where --panels is written"):
        result_files.refuse_outputs([("--panels", a), ("--confusion", link)], [], True)
    with pytest.raises(UserError, match=r"--json .*b.pt: is a file that is read"):
        result_files.refuse_outputs([("--json", b)], [b], True)


def test_a_script_that_fails_leaves_no_folder(script, tmp_path):
    said = errors(script, evaluate, "--ckpt", tmp_path / "absent.pt", "--json", tmp_path / "new" / "deep" / "x.json")
    assert "no such checkpoint" in said and not [*tmp_path.iterdir()]
    result_files.write_text(tmp_path / "new" / "deep" / "x.csv", "a")
    assert (tmp_path / "new" / "deep" / "x.csv").read_text() == "a"
