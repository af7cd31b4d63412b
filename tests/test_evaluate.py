import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NO_GPU, ROOT, errors, save_mask
from PIL import Image

import datasets
import evaluate
import models
import run_folder
from inference import Protocol, predict
from result_files import GROUP_BY, setting_values

CPU = torch.device("cpu")


def iou_by_hand(predictions, masks, classes):
    """Count pixel by pixel."""
    values = []
    for c in range(classes):
        both = either = 0
        for prediction, mask in zip(predictions.ravel().tolist(), masks.ravel().tolist(), strict=True):
            if mask != 255:
                both += prediction == c and mask == c
                either += prediction == c or mask == c
        values.append(100 * both / either if either else None)
    present = [v for v in values if v is not None]
    return sum(present) / len(present), values


def test_miou_equals_a_count_pixel_by_pixel():
    rng = np.random.default_rng(0)
    predictions = rng.integers(0, 4, (3, 9, 7))
    masks = rng.integers(0, 5, (3, 9, 7))
    masks[rng.random(masks.shape) < 0.2] = 255
    # of six classes, 4 is never predicted and 5 is in neither
    confusion = evaluate.confusion_matrix(torch.from_numpy(predictions), torch.from_numpy(masks), 6)
    assert confusion.dtype == torch.int64 and int(confusion.sum()) == int((masks != 255).sum())
    miou, values = evaluate.iou(confusion)
    expected_miou, expected = iou_by_hand(predictions, masks, 6)
    assert values == pytest.approx([*expected[:5], None]) and values[4] == 0 and values[5] is None
    assert miou == pytest.approx(expected_miou)


def test_confusion_does_not_overflow_what_int32_holds():
    confusion = torch.tensor([[2**40, 2**40], [0, 2**41]])
    assert evaluate.iou(confusion)[0] == pytest.approx((50 + 200 / 3) / 2)


class Paints(torch.nn.Module):
    """Predicts class 1 where the red channel is above the mean."""

    def forward(self, images):
        logits = torch.stack([-images[:, 0], images[:, 0]], 1)
        return models.Output(logits, logits)


class RedData(datasets.Shapes):
    def __init__(self):
        super().__init__()
        self.classes, self.palette = self.classes[:2], self.palette[:2]

    def image(self, name):
        return np.repeat((255 * (self.draw(name)[1] > 0)).astype(np.uint8)[..., None], 3, 2)

    def mask(self, name):
        return (self.draw(name)[1] > 0).astype(np.uint8)


def test_evaluate_of_a_perfect_model_is_100_and_keeps_its_mode():
    model, data = Paints().train(), RedData()
    confusion = evaluate.evaluate(model, data, data.val[:5], torch.device("cpu"), "fp32")
    assert evaluate.iou(confusion) == (100.0, [100.0, 100.0]) and int(confusion.sum()) == 5 * 64 * 64
    assert model.training


def test_predictions_are_compared_at_the_size_of_the_mask():
    model, data = Paints(), RedData()
    prediction = predict(model, data.image("val-0000"), torch.device("cpu"), "fp32", Protocol(0.5))
    assert prediction.shape == (64, 64)
    confusion = evaluate.evaluate(model, data, data.val[:5], torch.device("cpu"), "fp32", Protocol(0.5))
    assert int(confusion.sum()) == 5 * 64 * 64 and 80 < evaluate.iou(confusion)[0] < 100


# ---- any list of images ----


def rows_of(script, ckpt, tmp_path, *more):
    """The result's rows of an evaluation."""
    code, _, err = script(evaluate, "--ckpt", ckpt, "--json", tmp_path / "r.json", *more)
    assert code == 0, err
    return json.loads((tmp_path / "r.json").read_text())["rows"]


def test_a_list_of_the_val_images_gives_vals_numbers_in_any_order(script, ckpt, tmp_path):
    (of_val,) = rows_of(script, ckpt, tmp_path)
    val = datasets.Shapes().val
    hash = datasets.digest("\n".join(val))
    for name, lines in (("a", val), ("b", [f"images/{name}.png" for name in val[::-1]] * 2)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        (row,) = rows_of(script, ckpt, tmp_path, "--list", tmp_path / f"{name}.txt")
        assert {key for key in row if row[key] != of_val[key]} == {"list"} and row["list"] == f"{name} ({hash})"


@pytest.mark.slow
def test_a_list_is_evaluated_in_place_of_val_and_kept_apart_from_it(script, exports, few, tmp_path, tiny_networks):
    """A test set: an image that no list of the data set names. The checkpoint and its export see the same."""
    root = tmp_path / "few"
    shutil.copytree(few, root)
    for kind in ("images", "masks"):
        shutil.copy(root / kind / "val3.png", root / kind / "new.png")
    mask = np.array(Image.open(root / "masks" / "new.png"))
    Image.fromarray((mask + 1) % 3).save(root / "masks" / "new.png")  # all wrong
    (root / "test.txt").write_text("new\n")
    rows = rows_of(script, exports / "last.pt", tmp_path, "--data", root, "--list", root / "test.txt")
    rows += rows_of(script, exports / "fp32.onnx", tmp_path, "--data", root, "--list", root / "test.txt")
    (of_val,) = rows_of(script, exports / "last.pt", tmp_path, "--data", root)
    assert all(row["miou"] < 15 for row in rows) and of_val["miou"] > 60 and of_val["list"] is None
    assert len({str(setting_values({**row, "export": None}, GROUP_BY)) for row in [*rows, of_val]}) == 2


@pytest.mark.parametrize("line,said", [
    ("", "l.txt: names no image"), ("im99", "l.txt, entry 1: 'im99' is no image of this data set"),
    ("im00\nim08", "l.txt: 'im08' has no mask; add it or remove the name"), (None, "l.txt: no such file"),
    ("im00", "mine: the listed masks hold only 255, which is ignored, so there is nothing to evaluate"),
])  # fmt: skip
def test_a_wrong_list_is_one_line(script, folder, ckpt, tmp_path, line, said):
    checkpoint = run_folder.load_checkpoint(ckpt)
    checkpoint["args"] |= {"dataset": "folder", "data": str(folder)}
    run_folder.save_checkpoint(ckpt, checkpoint)
    save_mask(folder / "masks" / "im00.png", np.full((40, 56), 255))
    if line is not None:
        (folder / "l.txt").write_text(line)
    assert said in errors(script, evaluate, "--ckpt", ckpt, "--list", folder / "l.txt")
    assert "r.json: is a file that is read" in errors(
        script, evaluate, "--ckpt", ckpt, "--list", tmp_path / "r.json", "--json", tmp_path / "r.json"
    )


# ---- prediction and pictures ----


def test_only_runs_of_the_same_settings_are_averaged_over_seeds(capsys):
    def row(seed, miou, **changes):
        return {
            "method": "sup",
            "role": "student",
            "backbone": "resnet18",
            "partition": "1/8",
            "steps": 10,
            "crop": [64, 64],
            "weights": "none",
            "seed": seed,
            "miou": miou,
            **changes,
        }

    evaluate.print_seeds([row(0, 40.0), row(0, 40.0), row(1, 60.0, crop=[32, 32]), row(1, 60.0, weights="imagenet")])
    assert capsys.readouterr().out == ""
    # Sup has no weight of KD
    evaluate.print_seeds([row(0, 40.0, kd_weight=1.0), row(1, 42.0, kd_weight=4.0), row(1, 60.0, crop=[32, 32])])
    assert capsys.readouterr().out.split("steps")[1].split() == ["41.00", "±", "1.41", "(2", "seeds)"]
    evaluate.print_seeds([row(0, 40.0, teacher_seeds=[0, 0]), row(0, 42.0, teacher_seeds=[1, 1])])
    assert capsys.readouterr().out.split("steps")[1].split() == ["41.00", "±", "1.41", "(2", "seeds)"]


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["--tta-scales", "0"], "--tta-scales"),
        (["--window", "0"], "--window"),
        (["--confusion", "x.jpg"], "--confusion"),
        (["--panels", "x.json"], "--panels"),
        (["--json", "file/x.json"], "--json"),
        (["--panel-rows", "0"], "--panel-rows"),
        (["--panel-rows", "101"], "--panel-rows"),
        (["--panels", "x.png", "--confusion", "x.png"], "--confusion x.png: is also where --panels is written"),
        (["--panels", "x.png", "--confusion", "empty/../x.png"], "is also where --panels is written"),
        (["b.json", "--json", "b.json"], "--json b.json: is a file that is read"),
        (["--json", "mine.json"], "--json: mine.json exists and was not written by this project"),
        (["--panels", "photos/a.png"], "--panels: photos/a.png exists"),
        (["--confusion", "photos/a.png"], "add --overwrite"),
    ],
)
def test_wrong_arguments_are_one_line(script, ckpt, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "b.json").write_bytes(ckpt.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = script(evaluate, "--ckpt", ckpt, *arguments)
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_pictures_and_options_reach_the_result_file(script, ckpt, tmp_path):
    options = f"--confusion {tmp_path}/c.png --json {tmp_path}/r.json --window 48 --tta-scales 1 1.5 --flip"
    code, out, err = script(evaluate, "--ckpt", ckpt, *options.split())
    assert code == 0 and "confusion matrix: " in out and Image.open(tmp_path / "c.png").size[0] > 200, err
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert (row["window"], row["scales"], row["flip"]) == ([48, 48], [1.0, 1.5], True)


@pytest.mark.slow
def test_outputs_are_written_again_and_others_files_with_overwrite_alone(script, ckpt, tmp_path):
    outputs = [tmp_path / name for name in ("r.json", "p.png", "c.png")]
    command = ["--ckpt", ckpt, "--json", outputs[0], "--panels", outputs[1], "--confusion", outputs[2], "--panel-rows", "1"]
    for _ in range(2):
        code, _, err = script(evaluate, *command)
        assert code == 0, err
    for path in outputs:
        ours = path.read_bytes()
        path.write_bytes(b"precious")
        assert script(evaluate, *command)[0] == 2 and path.read_bytes() == b"precious"
        path.write_bytes(ours)
    outputs[1].write_bytes(b"precious")
    code, _, err = script(evaluate, *command, "--overwrite")
    assert code == 0 and Image.open(outputs[1]).width > 100, err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_counts_the_same(script, ckpt, tmp_path, ranks):
    """Eight val images, which three ranks cannot split evenly."""
    code, _, err = script(evaluate, "--ckpt", ckpt, "--json", tmp_path / "one.json")
    assert code == 0, err
    program = "import conftest, datasets, evaluate, tiny; tiny.install(); datasets.Shapes = conftest.FewShapes; evaluate.main()"
    (tmp_path / "program.py").write_text(program)
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}"
    done = subprocess.run(
        [sys.executable, *launch.split(), tmp_path / "program.py", "--ckpt", ckpt, "--json", tmp_path / "many.json"],
        env={**os.environ, **NO_GPU, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, many = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("one", "many"))
    assert one == many and done.stdout.count("mIoU") == 1


@pytest.mark.slow
def test_checkpoints_and_exports_stand_in_one_table(script, exports, few, tmp_path, tiny_networks):
    files = [exports / name for name in ("fp32.onnx", "int8.onnx", "labels.onnx", "last.pt")]
    panels = ("--panels", tmp_path / "p.png", "--confusion", tmp_path / "c.png")
    code, out, err = script(evaluate, "--ckpt", *files, "--data", few, *panels, "--panel-rows", "1")
    assert code == 0 and "over seeds" not in out and Image.open(tmp_path / "p.png").width > 100, err
    assert out.count("Sup resnet18 ONNX fp32") == 2 and out.count("Sup resnet18 ONNX int8") == 1


def test_exports_are_not_averaged_with_checkpoints(capsys):
    def row(export, seed, miou):
        keys = {"method": "sup", "role": "student", "backbone": "resnet18", "partition": "1/8", "steps": 10}
        return {**keys, "seed": seed, "miou": miou, "export": export}

    evaluate.print_seeds([row(None, 0, 40.0), row(None, 1, 42.0), row("int8", 2, 90.0), row("fp32", 2, 91.0)])
    assert capsys.readouterr().out.split("steps")[1].split() == ["41.00", "±", "1.41", "(2", "seeds)"]
