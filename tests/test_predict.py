"""Predictions of a folder of images: every file is predicted or named."""

import os

import numpy as np
import pytest
import torch
from conftest import saved
from PIL import Image, features

import datasets
import inference
import models
import predict
import readers
import run_folder
from result_files import save_png

CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    saved(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8), folder / "a.png")
    return folder


def test_overlays_leave_black_classes_out(script, ckpt, tmp_path):
    (tmp_path / "photos").mkdir()
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photos" / "a.png")
    checkpoint = run_folder.load_checkpoint(ckpt)
    labels = inference.predict(models.model_from_checkpoint(checkpoint), photo, torch.device("cpu"), "fp32").numpy()
    checkpoint["palette"][np.bincount(labels.ravel()).argmax()] = (0, 0, 0)
    run_folder.save_checkpoint(ckpt, checkpoint)
    assert script(predict, "--ckpt", ckpt, "--images", tmp_path / "photos", "--out", tmp_path / "out")[0] == 0
    colours = np.asarray(checkpoint["palette"])[labels]
    black = colours.max(2, keepdims=True) == 0
    expected = np.where(black, photo, (photo.astype(float) + colours) / 2)
    assert np.abs(np.asarray(Image.open(tmp_path / "out" / "overlays" / "a.png")) - expected).max() <= 1
    assert 0 < black.mean() < 1


@pytest.mark.slow
def test_prediction_of_any_images(script, ckpt, tmp_path):
    images, out, rng = tmp_path / "photos", tmp_path / "out", np.random.default_rng(0)
    images.mkdir()
    for name, size in (("wide.jpg", (30, 90)), ("dot.png", (1, 1)), ("tall.webp", (71, 33)), ("wide.png", (20, 20))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(images / name)
    Image.fromarray(rng.integers(0, 2**16, (20, 24)).astype(np.uint16)).save(images / "deep.png")
    (images / "notes.txt").write_text("not an image")
    code, text, err = script(predict, "--ckpt", ckpt, "--images", images, "--out", out)
    assert code == 0 and "5 masks" in text, err
    assert {p.name for p in (out / "masks").iterdir()} == {"wide.jpg.png", "wide.png.png", "dot.png", "tall.png", "deep.png"}
    mask = Image.open(out / "masks" / "tall.png")
    assert (
        mask.mode == "P"
        and mask.size == (33, 71)
        and mask.getpalette()[:18] == [v for c in datasets.Shapes().palette for v in c]
    )
    model = models.model_from_checkpoint(run_folder.load_checkpoint(ckpt))
    expected = inference.predict(model, np.asarray(readers.open_image(images / "tall.webp")), torch.device("cpu"), "fp32")
    assert np.array_equal(np.asarray(mask), expected.numpy())
    assert Image.open(out / "overlays" / "wide.jpg.png").size == (90, 30) and (out / "sheet.png").exists()

    (images / "broken.jpg").write_bytes(b"junk")
    stray = images / os.fsdecode(b"k\xfche.png")
    stray.write_bytes((images / "dot.png").read_bytes())
    code, text, err = script(predict, "--ckpt", ckpt, "--images", images, "--out", out, "--window", "32", "--flip")
    assert code == 1 and "6 masks" in text and "broken.jpg: cannot be read" in err and "Traceback" not in err


def lines(text):
    return [line for line in text.splitlines() if "predict:" not in line]  # without the progress bar


@pytest.mark.slow
def test_every_file_is_predicted_or_named(script, ckpt, photos, tmp_path):
    photo = Image.open(photos / "a.png")
    for name, more in (
        ("b.jfif", {"format": "JPEG"}),
        ("c", {"format": "PNG"}),
        ("d.AVIF", {} if features.check("avif") else {"format": "PNG"}),
        ("e.JPG", {}),
        ("f.xyz", {"format": "BMP"}),
    ):
        photo.save(photos / name, **more)
    black = Image.new("RGB", photo.size)
    photo.save(photos / "g.gif", save_all=True, append_images=[black])
    (photos / "notes.txt").write_text("words")
    (photos / "table.csv").write_text("1,2")
    (photos / "clip.mpg").write_bytes(b"\0\0\1\xb3\x14\0\xf0\x15")  # Pillow recognises it
    (photos / ".hidden").write_text("words")
    (photos / ".hidden.png").write_bytes(b"junk")
    (photos / "more").mkdir()
    photo.save(photos / "more" / "x.png")
    os.mkfifo(photos / "pipe")
    out = tmp_path / "out"
    code, text, err = script(predict, "--ckpt", ckpt, "--images", photos, "--out", out)
    assert code == 0, err
    assert sorted(p.stem for p in (out / "masks").iterdir()) == list("abcdefg") and "7 masks" in text
    # the first frame of the animation
    model = models.model_from_checkpoint(run_folder.load_checkpoint(ckpt))
    first = inference.predict(model, np.asarray(Image.open(photos / "g.gif").convert("RGB")), CPU, "fp32")
    assert np.array_equal(np.asarray(Image.open(out / "masks" / "g.png")), first)
    no_images, folders = lines(err)
    assert no_images.endswith("no images, left out: clip.mpg, notes.txt, pipe, table.csv") and folders.endswith(
        "not looked into: more"
    )
    assert "hidden" not in err

    (photos / "h.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (photos / "i").write_bytes(b"\0\0\0\x18ftypheic")
    photo.save(photos / "j.jpg")
    (photos / "j.jpg").write_bytes((photos / "j.jpg").read_bytes()[:700])
    (photos / "k.png").write_bytes(b"")
    (photos / "l.tif").write_bytes(b"II*\0")
    (photos / "m.webp").symlink_to("nowhere")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(photos / "n.tif")
    (photos / "o.cr2").write_bytes(b"raw")
    code, text, err = script(predict, "--ckpt", ckpt, "--images", photos, "--out", out)  # again
    assert code == 1 and "7 masks" in text and "8 file(s) skipped" in text
    skipped = [line for line in lines(err) if line.startswith("skipped")]
    assert [line.split(": ")[0].rsplit("/")[-1] for line in skipped] == [
        "h.HEIC",
        "i",
        "j.jpg",
        "k.png",
        "l.tif",
        "m.webp",
        "n.tif",
        "o.cr2",
    ]
    assert "no format that Pillow opens" in skipped[0] and "truncated" in skipped[2] and "not finite" in skipped[6]
    assert "Traceback" not in err


def test_a_folder_without_images_and_a_single_image(script, ckpt, photos, tmp_path):
    empty = tmp_path / "empty"
    (empty / "more").mkdir(parents=True)
    (empty / "notes.txt").write_text("words")
    code, _, err = script(predict, "--ckpt", ckpt, "--images", empty, "--out", tmp_path / "out")
    assert code == 2 and err.splitlines()[-1].endswith(f"--images {empty}: holds no image") and not (tmp_path / "out").exists()
    code, text, err = script(predict, "--ckpt", ckpt, "--images", photos / "a.png", "--out", tmp_path / "out")
    assert code == 0 and "1 masks" in text and (tmp_path / "out" / "masks" / "a.png").exists(), err


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


ERRORS = {
    "b": (RuntimeError(ALLOCATOR), "out of memory (RuntimeError); give --window 512"),
    "c": (MemoryError(), "out of memory (MemoryError); give"),
    "d": (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (OutOfMemoryError)"),
    "e": (KeyError("x"), "KeyError: 'x'"),
    "f": (RuntimeError("two\nlines"), "RuntimeError: two lines"),
    "g": (AssertionError(), "AssertionError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["read", "predict"])
def test_an_exception_belongs_to_its_file(script, ckpt, photos, tmp_path, monkeypatch, where):
    """Raised for every file but the first and the last."""
    for width, name in enumerate([*ERRORS, "h"], 1):
        saved(np.full((3, width, 3), 99, np.uint8), photos / f"{name}.png")

    def read(path):
        if where == "read" and path.stem in ERRORS:
            raise ERRORS[path.stem][0]
        return open_image(path)

    def run(model, image, *more):
        if where == "predict" and image.shape[1] <= len(ERRORS):
            raise ERRORS["bcdefg"[image.shape[1] - 1]][0]
        return run_model(model, image, *more)

    open_image, run_model = readers.open_image, inference.predict
    monkeypatch.setattr(readers, "open_image", read)
    monkeypatch.setattr(predict, "predict", run)
    code, text, err = script(predict, "--ckpt", ckpt, "--images", photos, "--out", tmp_path / "out")
    assert code == 1 and "2 masks" in text and "6 file(s) skipped" in text
    assert sorted(p.name for p in (tmp_path / "out" / "masks").iterdir()) == ["a.png", "h.png"]
    for line, (name, (_, expected)) in zip(lines(err), ERRORS.items(), strict=True):
        assert line.startswith(f"skipped {photos / name}.png: {expected}")
    monkeypatch.setenv("MGD_DEBUG", "1")
    assert "Traceback" in script(predict, "--ckpt", ckpt, "--images", photos, "--out", tmp_path / "out")[2]


@pytest.mark.slow
def test_an_image_too_large_as_a_whole_is_refused(script, ckpt, photos, tmp_path, monkeypatch):
    saved(np.zeros((600, 700, 3), np.uint8), photos / "large.png")
    monkeypatch.setattr(predict, "free_memory", lambda device: 6e6)
    arguments = ("--ckpt", ckpt, "--images", photos, "--out", tmp_path / "out")
    code, text, err = script(predict, *arguments, "--window", "whole")
    (line,) = lines(err)
    assert (
        code == 1
        and "1 masks" in text
        and "large.png: needs " in line
        and " GB for 700x600 pixels" in line
        and "--window 512" in line
    )
    code, text, err = script(predict, *arguments, "--window", "64")
    assert code == 0 and "2 masks" in text, err
    monkeypatch.setattr(predict, "free_memory", lambda device: 1e6)
    code, text, err = script(predict, *arguments, "--window", "64", "--flip")
    assert code == 1 and "leave out --tta-scales and --flip" in err


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--window", "16"), ("--window", "16", "--tta-scales", "0.3", "2", "--flip")])
def test_images_of_one_row_or_column(script, ckpt, tmp_path, arguments):
    photos, rng = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for name, size in (("row", (1, 700)), ("column", (700, 1)), ("dot", (1, 1))):
        saved(rng.integers(0, 256, (*size, 3), np.uint8), photos / f"{name}.png")
    code, text, err = script(predict, "--ckpt", ckpt, "--images", photos, "--out", tmp_path / "out", *arguments)
    assert code == 0 and "3 masks and overlays, sheet.png" in text, err
    for kind in ("masks", "overlays"):
        assert Image.open(tmp_path / "out" / kind / "row.png").size == (700, 1)
        assert Image.open(tmp_path / "out" / kind / "column.png").size == (1, 700)


def test_outputs_have_names_of_their_own(tmp_path):
    names = ["a.jpg", "a.png", "a.jpg.gif", "b.png", "B.jpg", "c.tif", "a.jpg.png.tif", "d"]
    outputs = predict.output_names([tmp_path / name for name in names])
    assert outputs[5] == "c.png" and outputs[7] == "d.png"
    assert len({output.casefold() for output in outputs}) == len(names)


@pytest.mark.slow
def test_nothing_of_the_users_is_replaced(script, ckpt, folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments = ("--ckpt", ckpt, "--images", folder / "images", "--out")
    for more in ((folder,), (folder, "--window", "16")):
        code, _, err = script(predict, *arguments, *more)
        assert code == 2 and "im00.png exists and was not written by this project" in err and "--overwrite" in err
    for out in (folder / "images", folder / "images" / ".." / "images"):
        code, _, err = script(predict, *arguments, out, "--overwrite")
        assert code == 2 and "would write among the images" in err
    code, _, err = script(predict, "--ckpt", ckpt, "--images", folder / "masks", "--out", folder, "--overwrite")
    assert code == 2 and "would write among the images" in err
    code, _, err = script(predict, "--ckpt", ckpt, "--images", folder / "masks" / "im00.png", "--out", folder, "--overwrite")
    assert code == 2 and "would replace the image" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for _ in range(2):  # repeating works
        assert script(predict, *arguments, tmp_path / "out")[0] == 0
    (tmp_path / "out" / "sheet.png").write_bytes(b"mine")
    assert script(predict, *arguments, tmp_path / "out")[0] == 2 and (tmp_path / "out" / "sheet.png").read_bytes() == b"mine"
    assert script(predict, *arguments, tmp_path / "out", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["--images", "absent", "--out", "x"], "absent: no such folder"),
        (["--images", "photos", "--out", "file"], "--out file"),
        (["--images", "photos", "--out", "file/x"], "--out file/x"),
        (["--images", "photos"], "--out"),
        (["--out", "x"], "--images"),
        (["--images", "photos", "--out", "x", "--tta-scales", "0"], "--tta-scales"),
        (["--images", "photos", "--out", "x", "--window", "0"], "--window"),
        (["--images", "photos", "--out", "photos"], "--out photos: would write among the images"),
    ],
)
def test_wrong_arguments_are_one_line(script, ckpt, photos, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "predict_files", None)  # no work begins
    (tmp_path / "file").write_text("")
    code, _, err = script(predict, "--ckpt", ckpt, *arguments)
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1


def test_an_output_folder_that_cannot_be_written_is_one_line_before_any_work(script, ckpt, photos, tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(run_folder.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(predict, "predict_files", None)
    code, _, err = script(predict, "--ckpt", ckpt, "--images", photos, "--out", tmp_path / "out")
    assert code == 2 and len(lines(err)) == 1 and f"--out {tmp_path / 'out'}: cannot be written to" in err


def test_a_checkpoint_that_cannot_be_loaded_leaves_no_folders(script, photos, tmp_path):
    code, _, err = script(predict, "--ckpt", tmp_path / "absent.pt", "--images", photos, "--out", tmp_path / "out")
    assert code == 2 and "absent.pt: no such checkpoint" in err and not (tmp_path / "out").exists()


def test_one_process_predicts(script, ckpt, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = script(predict, "--ckpt", ckpt, "--images", photos, "--out", tmp_path / "out")
    assert code == 2 and "leave torchrun out" in err


def test_the_legend_shows_the_classes_that_occur(script, ckpt, photos, tmp_path, monkeypatch):
    legends = []
    monkeypatch.setattr(predict, "add_legend", lambda figure, classes, palette, shown: legends.append(list(shown)))
    assert script(predict, "--ckpt", ckpt, "--images", photos, "--out", tmp_path / "out")[0] == 0
    assert legends == [np.unique(np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png"))).tolist()]


# ---- exported models ----


@pytest.mark.slow
def test_an_exported_model_predicts_as_its_checkpoint(script, exports, few, tmp_path, tiny_networks):
    masks = {}
    for name in ("last.pt", "fp32.onnx", "labels.onnx"):
        out = tmp_path / name
        code, text, err = script(predict, "--ckpt", exports / name, "--images", few / "images", "--out", out)
        assert code == 0 and "16 masks and overlays, sheet.png" in text, err
        masks[name] = [np.asarray(Image.open(path)) for path in sorted((out / "masks").iterdir())]
    for mask, fp32, labels in zip(*masks.values(), strict=True):
        assert (mask == fp32).mean() > 0.999 and np.array_equal(fp32, labels)
    assert (
        Image.open(out / "masks" / "val0.png").getpalette()
        == Image.open(tmp_path / "last.pt" / "masks" / "val0.png").getpalette()
    )


@pytest.mark.slow
def test_an_exported_model_too_refuses_an_image_too_large(script, exports, few, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "free_memory", lambda device: 1e4)
    arguments = ("--ckpt", exports / "fp32.onnx", "--images", few / "images", "--out", tmp_path / "out")
    code, _, err = script(predict, *arguments)
    assert code == 1 and "train0.png: needs " in err and "give --window 512" in err


def test_a_model_of_others_is_one_line_and_leaves_no_folders(script, photos, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"junk")
    code, _, err = script(predict, "--ckpt", tmp_path / "a.onnx", "--images", photos, "--out", tmp_path / "out")
    assert code == 2 and f"{tmp_path / 'a.onnx'}: was not written by export.py" in err and len(lines(err)) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", ["masks", "overlays", "masks/a.png", "overlays/a.png", "sheet.png"])
@pytest.mark.parametrize("target", ["absent", "ours.png"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_nothing_is_written_behind_a_link_out_of_the_folder(script, ckpt, photos, tmp_path, link, target, overwrite):
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    (out / link).parent.mkdir(parents=True)
    save_png(outside / "ours.png", Image.new("L", (2, 2)))
    before = (outside / "ours.png").read_bytes()
    (out / link).symlink_to(outside / target if "." in link else outside)
    arguments = ["--ckpt", ckpt, "--images", photos, "--out", out, *overwrite]
    code, _, err = script(predict, *arguments)
    assert code == 2 and f"{out / link}" in err and "leads out of that folder by a link" in err
    assert list(outside.iterdir()) == [outside / "ours.png"] and (outside / "ours.png").read_bytes() == before
    (out / link).unlink()
    out.rename(tmp_path / "far away")
    out.symlink_to(tmp_path / "far away")  # OUT itself may be one
    assert script(predict, *arguments)[0] == 0 and (tmp_path / "far away" / "masks" / "a.png").exists()
