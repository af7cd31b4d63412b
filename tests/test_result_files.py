import json
import math
import os
import shutil
import subprocess
import sys
import types
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import pictures
import result_files
import run_folder
from common import UserError


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON")


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


def test_no_log_holds_nan(tmp_path):
    progress = run_folder.Progress(types.SimpleNamespace(out=tmp_path, steps=2, log_every=1, save_every=9, lr=1e30), 0)
    with pytest.raises(UserError, match="loss 'sup' is not finite"):
        progress.step(0, 1, 1e30, {"sup": torch.tensor(math.nan)})
    progress.close()
    entry = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse_constant)
    assert entry["step"] == 1 and entry["sup"] is None


# ---- whose files ----


def write_figure(path):
    from matplotlib import pyplot as plt

    pictures.save_figure(path, plt.figure(figsize=(1, 1)))


def write_log(path):
    progress = run_folder.Progress(types.SimpleNamespace(out=path.parent, steps=2, log_every=1, save_every=9, lr=0.1), 0)
    progress.step(0, 1, 0.1, {"sup": torch.tensor(1.0)})
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


# ---- writing ----


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.png"
    result_files.save_png(path, Image.new("RGB", (3, 2)))
    before = path.read_bytes()

    class Breaks:
        def save(self, file, **_):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a.png: cannot be written \(No space left on device\)"):
        result_files.save_png(path, Breaks())
    with pytest.raises(KeyboardInterrupt), run_folder.atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_a_link_stays_a_link_and_long_names_fit(tmp_path):
    (tmp_path / "disk").mkdir()
    link, long = tmp_path / "r.json", tmp_path / ("x" * 250 + ".json")
    link.symlink_to(tmp_path / "disk" / "r.json")
    for path in (link, long):
        result_files.write_result(path, "evaluation", [], 0.0, "torch")
    assert link.is_symlink() and (tmp_path / "disk" / "r.json").is_file() and long.is_file()


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*run: cannot be made a folder \(Not a directory\)"):
        run_folder.make_folder("--out", tmp_path / "file" / "run")

    def refuses(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuses)
    with pytest.raises(UserError, match=r"--out .*: cannot be written to \(Read-only file system\)"):
        run_folder.make_folder("--out", tmp_path)


@pytest.mark.slow
def test_a_real_read_only_disk_is_one_line(tmp_path):
    """To root too, whom permissions do not stop."""
    code = "import pathlib, common, run_folder; common.cli(lambda: run_folder.make_folder('--out', pathlib.Path('disk')))"
    command = f'mount -t tmpfs -o ro tmpfs {tmp_path}/disk && {sys.executable} -c "{code}"'
    (tmp_path / "disk").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    can = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")]
    if not shutil.which("unshare") or subprocess.run(can, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    line = "-c: error: --out disk: cannot be written to (Read-only file system); give another folder\n"
    assert (done.returncode, done.stderr) == (2, line)


# ---- names in pictures ----


def font_of(characters, path):
    """A font that has those characters, each a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 500), (500, 500), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"g{ord(c)}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"g{ord(c)}" for c in characters})
    builder.setupGlyf({name: pen.glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares-1", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_names_are_drawn_with_any_installed_font_or_become_numbers(tmp_path, monkeypatch, capsys):
    from matplotlib import font_manager
    from matplotlib import pyplot as plt

    font_of("\U000f0001\U000f0002", tmp_path / "squares.ttf")
    fonts = [*font_manager.fontManager.ttflist]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    classes = ["road", "\U000f0001\U000f0002 a", "\U000f0003", "tab\t", "$x$", "x" * 50 + "y"]
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = pictures.class_labels(classes)
        assert labels[:5] == ["road", "class 1", "class 2", "class 3", "$x$"] and len(labels[5]) == 40 and labels[5][-1] == "y"
        said = capsys.readouterr().err
        assert "and 2 more" in said and len(said.splitlines()) == 1
        font_manager.fontManager.addfont(tmp_path / "squares.ttf")
        labels = pictures.class_labels(classes)
        assert labels[:4] == ["road", classes[1], "class 2", "class 3"]
        figure = plt.figure(figsize=(2, 2))
        figure.text(0, 0.5, labels[1])
        pictures.save_figure(tmp_path / "a.png", figure)  # without a warning about glyphs
