import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from bench_region_loss import peak_mb
from conftest import NO_GPU, ROOT, python
from PIL import Image

import batches
import datasets
import evaluate
import models
from evaluate import Protocol

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
        return evaluate.models.Output(logits, logits)


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
    prediction = evaluate.predict(model, data.image("val-0000"), torch.device("cpu"), "fp32", evaluate.Protocol(0.5))
    assert prediction.shape == (64, 64)
    confusion = evaluate.evaluate(model, data, data.val[:5], torch.device("cpu"), "fp32", evaluate.Protocol(0.5))
    assert int(confusion.sum()) == 5 * 64 * 64 and 80 < evaluate.iou(confusion)[0] < 100


class Blurs(torch.nn.Module):
    """Two classes of logits that depend on the whole window, so that it matters where windows lie."""

    def forward(self, images):
        logits = images[:, :2] - images[:, 1:].mean((2, 3), keepdim=True) * torch.linspace(0, 1, images.shape[-1])
        return evaluate.models.Output(logits, logits)


@pytest.mark.parametrize("size,window", [((50, 70), (24, 32)), ((24, 32), (24, 32)), ((20, 90), (32, 32)), ((5, 7), (9, 8))])
def test_sliding_windows_equal_a_plain_reimplementation(size, window):
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    model, (h, w) = Blurs(), window
    padded = torch.zeros(1, 3, max(size[0], h), max(size[1], w))
    padded[..., : size[0], : size[1]] = x
    expected, seen = torch.zeros(1, 2, *padded.shape[2:]), torch.zeros(padded.shape[2:])
    top = 0
    while True:  # as one moves a window by hand
        left = 0
        while True:
            y0, x0 = min(top, padded.shape[2] - h), min(left, padded.shape[3] - w)
            expected[:, :, y0 : y0 + h, x0 : x0 + w] += model(padded[:, :, y0 : y0 + h, x0 : x0 + w]).logits
            seen[y0 : y0 + h, x0 : x0 + w] += 1
            if left + w >= padded.shape[3]:
                break
            left += math.ceil(w * 2 / 3)
        if top + h >= padded.shape[2]:
            break
        top += math.ceil(h * 2 / 3)
    strips = evaluate.window_strips(lambda x: model(x).logits, lambda top, bottom: x[:, :, top:bottom], size, window)
    torch.testing.assert_close(torch.cat(list(strips), 2), (expected / seen)[..., : size[0], : size[1]])


def test_scales_and_mirroring_average_probabilities():
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    model, cpu = Blurs(), torch.device("cpu")
    total = 0
    for scale in (1.0, 2.0):
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        x = evaluate.v2.functional.resize(pixels, [round(12 * scale), round(16 * scale)], antialias=True)
        x = batches.normalize(x, cpu)
        for mirror in (lambda t: t, lambda t: t.flip(-1)):
            logits = mirror(model(mirror(x)).logits)
            total += torch.nn.functional.interpolate(logits, (12, 16), mode="bilinear", align_corners=True).softmax(1)
    got = evaluate.predict(model, image, cpu, "fp32", evaluate.Protocol(scales=(1.0, 2.0), flip=True))
    assert torch.equal(got, total[0].argmax(0).to(torch.uint8))
    assert not torch.equal(got, evaluate.predict(model, image, cpu, "fp32"))


# ---- strips: the labels of a whole image in little memory ----


class Convolves(torch.nn.Module):
    """Five classes; every logit depends on the pixels around it, and on the whole window."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 5, 5, padding=2)

    def forward(self, images):
        logits = self.layer(images)
        return models.Output(logits - images.mean((2, 3), keepdim=True)[:, :1] * torch.linspace(0, 1, images.shape[-1]), logits)


def labels_of_the_whole(model, image, protocol):
    """All logits of the image are held: what strips must equal."""
    size, total, views = image.shape[:2], 0, len(protocol.scales) * (1 + protocol.flip)
    for scale in protocol.scales:
        scaled = [max(1, round(side * protocol.image_scale * scale)) for side in size]
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        if scaled != list(size):
            pixels = evaluate.v2.functional.resize(pixels, scaled, antialias=True)
        for mirrored in (False, True)[: 1 + protocol.flip]:
            x = batches.normalize(pixels, CPU)
            x = x.flip(-1) if mirrored else x
            logits = windows_of_the_whole(model, x, protocol.window) if protocol.window else model(x).logits
            logits = logits.flip(-1) if mirrored else logits
            if list(size) != scaled:
                logits = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True)
            total = logits if views == 1 else total + logits.softmax(1)
    return total[0].argmax(0)


def windows_of_the_whole(model, x, window):
    (height, width), (h, w) = x.shape[2:], window
    x = torch.nn.functional.pad(x, (0, max(0, w - width), 0, max(0, h - height)))
    total, count = torch.zeros(1, 5, *x.shape[2:]), torch.zeros(x.shape[2:])
    for top in range(0, x.shape[2], math.ceil(h * 2 / 3)):
        for left in range(0, x.shape[3], math.ceil(w * 2 / 3)):
            y0, x0 = min(top, x.shape[2] - h), min(left, x.shape[3] - w)
            total[..., y0 : y0 + h, x0 : x0 + w] += model(x[..., y0 : y0 + h, x0 : x0 + w]).logits
            count[y0 : y0 + h, x0 : x0 + w] += 1
            if left + w >= x.shape[3]:
                break
        if top + h >= x.shape[2]:
            break
    return (total / count)[..., :height, :width]


SLOW_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in ((131, 40), (50, 70), (90, 20))]


@pytest.mark.slow
@pytest.mark.parametrize("size", [*SLOW_SIZES, (24, 32), (5, 7), (1, 45), (45, 1), (1, 1)])
@pytest.mark.parametrize("window", [(24, 32), (9, 11), (7, 50), None])
@pytest.mark.parametrize("image_scale", [1.0, 0.5, 0.37, 1.6, 2.0])
def test_strips_give_the_labels_of_the_whole(monkeypatch, size, window, image_scale):
    image, model = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8), Convolves()
    for more in ({}, {"flip": True}, {"scales": (0.75, 1.3)}):
        if more and window and min(window) < 9:
            continue  # many windows
        protocol = Protocol(image_scale, window, **more)
        with torch.inference_mode():
            expected = labels_of_the_whole(model, image, protocol)
        for strip_bytes in (0, 20_000, evaluate.STRIP_BYTES):
            monkeypatch.setattr(evaluate, "STRIP_BYTES", strip_bytes)
            labels = evaluate.predict(model, image, CPU, "fp32", protocol)
            assert labels.dtype == torch.uint8 and np.array_equal(labels, expected), (more, strip_bytes)


def test_windows_come_in_strips(monkeypatch):
    """Without this the test above could compare the whole with the whole."""
    monkeypatch.setattr(evaluate, "STRIP_BYTES", 0)
    x = torch.zeros(1, 3, 100, 20)
    strips = list(evaluate.window_strips(lambda x: x, lambda top, bottom: x[:, :, top:bottom], (100, 20), (30, 20)))
    assert [s.shape[2] for s in strips] == [20, 20, 20, 10, 30]
    rows = [s.shape[2] for s in evaluate.upsampled_strips(iter(strips), (100, 20), (250, 30))]
    assert sum(rows) == 250 and max(rows) == 1


def test_strips_of_bfloat16_windows_too():
    image, model = (
        np.random.default_rng(0).integers(0, 256, (80, 40, 3), np.uint8),
        models.build_model("mbv2", 4, head_width=16).eval(),
    )
    whole = evaluate.predict(model, image, CPU, "bf16", Protocol(window=(32, 32)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "STRIP_BYTES", 0)
        assert torch.equal(evaluate.predict(model, image, CPU, "bf16", Protocol(window=(32, 32))), whole)


PEAK = """
import sys
import numpy as np, torch
import evaluate, models
class Model(torch.nn.Module):
    def forward(self, images):
        logits = images[:, :1] * torch.arange(64.).view(-1, 1, 1)
        return models.Output(logits, logits)
image = np.zeros((int(sys.argv[1]), 1000, 3), np.uint8)
evaluate.predict(Model(), image, torch.device("cpu"), "fp32", evaluate.Protocol(float(sys.argv[2]), (128, 128)))
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # ru_maxrss begins with the parent's
print(int(line.split()[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="the peak of the memory is read from /proc")
def test_resident_memory_does_not_grow_with_the_height():
    """64 classes: the logits of 4000x1000 pixels are 1 GB, those of a strip 33 MB; STRIP_BYTES are collected."""
    peaks = [int(python(PEAK, rows, "1", MGD_OPS="torch").stdout) for rows in ("1000", "4000")]
    assert peaks[1] - peaks[0] < 150, peaks  # the image and its labels grow by 12 MB


@pytest.mark.parametrize("image_scale", [1.0, 0.4, 1.5])
def test_strips_need_no_more_memory_for_taller_images(monkeypatch, image_scale):
    monkeypatch.setattr(evaluate, "STRIP_BYTES", 2**16)
    model, peaks = Convolves(), []
    for height in (200, 800):
        image, protocol = np.zeros((height, 100, 3), np.uint8), Protocol(image_scale, (32, 32))
        peaks.append(peak_mb(lambda _: evaluate.predict(model, image, CPU, "fp32", protocol), "cpu"))  # noqa: B023
    grown = 600 * 100 * (1 + (3 + 3 * image_scale**2 if image_scale != 1 else 0))  # the labels, and the resized image
    assert peaks[1] - peaks[0] < 1.05 * grown / 1e6 + 0.02, peaks  # all logits would take 1.2 MB more at image scale 1


# ---- the command line ----


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
