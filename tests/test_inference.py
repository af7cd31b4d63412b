"""How networks see images: windows, strips, scales and mirroring give what the whole image gives; and the memory they take."""

import math
import pathlib
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, python

import batches
import datasets
import inference
import models
import run_folder
from common import UserError
from inference import Protocol
from onnx_model import OnnxModel

sys.path.insert(0, str(ROOT / "benchmarks"))
from bench_region_loss import peak_mb

CPU = torch.device("cpu")


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
            pixels = inference.v2.functional.resize(pixels, scaled, antialias=True)
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
    mean_colour = batches.normalize(torch.tensor(batches.FILL, dtype=torch.uint8).view(1, 3, 1, 1), CPU)
    whole = mean_colour.repeat(1, 1, max(h, height), max(w, width))
    whole[..., :height, :width] = x
    x = whole
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
        for strip_bytes in (0, 20_000, inference.STRIP_BYTES):
            monkeypatch.setattr(inference, "STRIP_BYTES", strip_bytes)
            labels = inference.predict(model, image, CPU, "fp32", protocol)
            assert labels.dtype == torch.uint8 and np.array_equal(labels, expected), (more, strip_bytes)


def test_windows_come_in_strips(monkeypatch):
    """Without this the test above could compare the whole with the whole."""
    monkeypatch.setattr(inference, "STRIP_BYTES", 0)
    x = torch.zeros(1, 3, 100, 20)
    strips = list(inference.window_strips(lambda x: x, lambda top, bottom: x[:, :, top:bottom], (100, 20), (30, 20)))
    assert [s.shape[2] for s in strips] == [20, 20, 20, 10, 30]
    rows = [s.shape[2] for s in inference.upsampled_strips(iter(strips), (100, 20), (250, 30))]
    assert sum(rows) == 250 and max(rows) == 1


def test_strips_of_bfloat16_windows_too():
    image, model = (
        np.random.default_rng(0).integers(0, 256, (80, 40, 3), np.uint8),
        models.build_model("mbv2", 4, head_width=16).eval(),
    )
    whole = inference.predict(model, image, CPU, "bf16", Protocol(window=(32, 32)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "STRIP_BYTES", 0)
        assert torch.equal(inference.predict(model, image, CPU, "bf16", Protocol(window=(32, 32))), whole)


PEAK = """
import sys
import numpy as np, torch
import inference, models
class Model(torch.nn.Module):
    def forward(self, images):
        logits = images[:, :1] * torch.arange(64.).view(-1, 1, 1)
        return models.Output(logits, logits)
image = np.zeros((int(sys.argv[1]), 1000, 3), np.uint8)
inference.predict(Model(), image, torch.device("cpu"), "fp32", inference.Protocol(float(sys.argv[2]), (128, 128)))
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
    monkeypatch.setattr(inference, "STRIP_BYTES", 2**16)
    model, peaks = Convolves(), []
    for height in (200, 800):
        image, protocol = np.zeros((height, 100, 3), np.uint8), Protocol(image_scale, (32, 32))
        peaks.append(peak_mb(lambda _: inference.predict(model, image, CPU, "fp32", protocol), "cpu"))  # noqa: B023
    grown = 600 * 100 * (1 + (3 + 3 * image_scale**2 if image_scale != 1 else 0))  # the labels, and the resized image
    assert peaks[1] - peaks[0] < 1.05 * grown / 1e6 + 0.02, peaks  # all logits would take 1.2 MB more at image scale 1


# ---- windows, scales and mirroring ----


class Blurs(torch.nn.Module):
    """Two classes of logits that depend on the whole window, so that it matters where windows lie."""

    def forward(self, images):
        logits = images[:, :2] - images[:, 1:].mean((2, 3), keepdim=True) * torch.linspace(0, 1, images.shape[-1])
        return models.Output(logits, logits)


@pytest.mark.parametrize("size,window", [((50, 70), (24, 32)), ((24, 32), (24, 32)), ((20, 90), (32, 32)), ((5, 7), (9, 8))])
def test_sliding_windows_equal_a_plain_reimplementation(size, window):
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    model, (h, w) = Blurs(), window
    padded = torch.tensor(batches.FILL).float().view(1, 3, 1, 1).repeat(1, 1, max(size[0], h), max(size[1], w))
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
    strips = inference.window_strips(lambda x: model(x).logits, lambda top, bottom: x[:, :, top:bottom], size, window)
    torch.testing.assert_close(torch.cat(list(strips), 2), (expected / seen)[..., : size[0], : size[1]])


def test_scales_and_mirroring_average_probabilities():
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    model, cpu = Blurs(), torch.device("cpu")
    total = 0
    for scale in (1.0, 2.0):
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        x = inference.v2.functional.resize(pixels, [round(12 * scale), round(16 * scale)], antialias=True)
        x = batches.normalize(x, cpu)
        for mirror in (lambda t: t, lambda t: t.flip(-1)):
            logits = mirror(model(mirror(x)).logits)
            total += torch.nn.functional.interpolate(logits, (12, 16), mode="bilinear", align_corners=True).softmax(1)
    got = inference.predict(model, image, cpu, "fp32", inference.Protocol(scales=(1.0, 2.0), flip=True))
    assert torch.equal(got, total[0].argmax(0).to(torch.uint8))
    assert not torch.equal(got, inference.predict(model, image, cpu, "fp32"))


# ---- memory ----


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["r18", "mbv2"])
def test_the_estimate_of_the_memory_is_about_right(backbone):
    model = models.build_model(backbone, 11, head_width=64).eval()
    x = torch.zeros(1, 3, 320, 480).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        true = peak_mb(lambda _: model(x), "cpu") + x.nbytes / 1e6
    assert 0.7 < inference.bytes_per_pixel(model, "fp32") * 320 * 480 / 1e6 / true < 1.1


# ---- exported models ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "protocol",
    [
        Protocol(),
        Protocol(0.6),
        Protocol(window=(24, 40)),
        Protocol(1.4, (32, 32)),
        Protocol(0.3, (32, 32)),
        Protocol(scales=(0.75, 1.5), flip=True),
    ],
)
def test_an_exported_model_gives_the_labels_of_its_checkpoint_by_any_protocol(exports, few, tiny_networks, protocol):
    """One window is larger than the image, which is padded."""
    network = models.model_from_checkpoint(run_folder.load_checkpoint(exports / "last.pt"))
    image = datasets.Folder(few).image("val0").repeat(3, 0).repeat(2, 1)
    labels = inference.predict(network, image, CPU, "fp32", protocol)
    exported = inference.predict(OnnxModel(exports / "fp32.onnx"), image, CPU, "fp32", protocol)
    assert exported.dtype == torch.uint8 and (labels == exported).float().mean() > 0.999 and len(labels.unique()) > 1


def test_views_are_what_the_network_sees():
    image, seen = np.random.default_rng(0).integers(0, 256, (50, 41, 3), np.uint8), []

    class Watches(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return models.Output(images, images)

    for protocol in (Protocol(), Protocol(0.5), Protocol(window=(24, 64)), Protocol(2.0, (64, 64))):
        seen.clear()
        inference.predict(Watches(), image, CPU, "fp32", protocol)
        views = [torch.from_numpy(view).permute(0, 3, 1, 2) for view in inference.views(image, protocol)]
        assert len(views) == len(seen)
        assert all(torch.equal(batches.normalize(view, CPU), x) for view, x in zip(views, seen, strict=True))


class Arguments:
    """The options of evaluate.py and predict.py."""

    window, scales, flip, precision, device = None, [1.0], False, None, None

    def __init__(self, **given):
        vars(self).update(given)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,given,expected",
    [
        ("fp32", {"precision": "bf16"}, "--precision bf16: .*fp32.onnx is fp32"),
        ("int8", {"precision": "fp32"}, "int8.onnx is int8"),
        ("fp32", {"device": "cuda:0"}, "--device cuda:0: .*run on the CPU"),
        ("labels", {"scales": [1.0, 2.0]}, "gives labels alone, but --tta-scales and --flip average its logits"),
        ("labels", {"flip": True}, "gives labels alone, but --tta-scales and --flip"),
        ("labels", {"window": (16, 16)}, "gives labels alone, but its image scale or its sliding windows need logits"),
    ],
)
def test_what_an_exported_model_cannot_do_is_one_line(exports, name, given, expected):
    with pytest.raises(UserError, match=expected) as error:
        inference.open_model(exports / f"{name}.onnx", Arguments(**given), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_line_changes_the_protocol_of_an_exported_model(exports):
    for given, expected in (
        ({}, Protocol()),
        ({"device": "cpu"}, Protocol()),
        ({"window": (16, 20), "flip": True}, Protocol(window=(16, 20), flip=True)),
        ({"window": False, "scales": [1.0, 2.0]}, Protocol(scales=(1.0, 2.0))),
    ):
        metadata, model, precision, protocol = inference.open_model(exports / "int8.onnx", Arguments(**given), CPU)
        assert protocol == expected and precision == "int8" and metadata["classes"] and isinstance(model, OnnxModel)
