"""Exports: the network of the checkpoint, in float32 and int8, in one file that tells nothing of the machine, and written only
within the tolerance."""

import argparse
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import errors

import common
import datasets
import evaluate
import export
import models
import run_folder
from inference import Protocol
from onnx_model import OnnxModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")
TRACES = re.compile(rb"site-packages|/tmp/|stack_trace|forward|/home/")  # of this machine


def network_of(exports):
    return models.model_from_checkpoint(run_folder.load_checkpoint(exports / "last.pt"))


def some_images(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


# ---- float32 ----


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 70), (2, 17, 16), (1, 129, 40)])
def test_float32_gives_the_logits_of_pytorch_at_any_size(exports, tiny_networks, shape):
    images = some_images(shape)
    with torch.inference_mode():
        x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(
            common.STD
        ).view(3, 1, 1)
        logits = network_of(exports)(x).logits
        expected = torch.nn.functional.interpolate(logits, shape[1:], mode="bilinear", align_corners=True)
    got = OnnxModel(exports / "fp32.onnx")(images)
    assert got.dtype == np.float32 and np.abs(got - expected.numpy()).max() < 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_an_export_is_one_file_that_any_runtime_opens_and_that_tells_nothing_of_the_machine(exports):
    for name, kind, dims in (("fp32", 1, 4), ("int8", 1, 4), ("labels", 2, 3)):
        model = onnx.load(exports / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        (image,), (output,) = model.graph.input, model.graph.output
        assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
        assert [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim][3] == 3
        assert (output.name, output.type.tensor_type.elem_type) == ("labels" if name == "labels" else "logits", kind)
        assert len(output.type.tensor_type.shape.dim) == dims
        assert not {"BatchNormalization", "Dropout"} & {node.op_type for node in model.graph.node}
        assert {entry.version for entry in model.opset_import if not entry.domain} == {export.OPSET}
        content = (exports / f"{name}.onnx").read_bytes()
        assert not TRACES.search(content) and str(exports.parent).encode() not in content
    assert {path.name for path in exports.iterdir()} == {
        "last.pt",
        "fp32.json",
        *(f"{n}.onnx" for n in ("fp32", "int8", "labels")),
    }


@pytest.mark.slow
def test_the_metadata_tells_how_the_model_sees_images(exports):
    metadata = OnnxModel(exports / "fp32.onnx").metadata
    assert metadata["classes"] == ["ground", "red", "blue"] and len(metadata["palette"]) == 3
    assert (metadata["image_scale"], metadata["window"], metadata["size"]) == (1.0, None, None)
    assert (metadata["precision"], metadata["output"], metadata["opset"]) == ("fp32", "logits", export.OPSET)
    row = run_folder.load_checkpoint(exports / "last.pt")["row"]
    assert metadata["partition_hash"] == row["partition_hash"] and metadata["row"]["steps"] == 40
    assert metadata["dataset"] == "few" and metadata["params_m"] > 0
    assert "out" not in metadata["args"] and metadata["args"]["crop"] == [32, 32]


def test_paths_of_the_machine_stay_out_of_the_settings():
    settings = {"data": "/home/ann/few", "weights": "r18.pth", "teachers": ["/x/a.pt", "runs/b.pt"], "steps": 4, "window": None}
    expected = {"data": "few", "weights": "r18.pth", "teachers": ["a.pt", "runs/b.pt"], "steps": 4, "window": None}
    assert export.without_folders(settings) == expected


@pytest.mark.slow
def test_the_result_file_has_the_mious_of_evaluate(script, exports, few, tiny_networks, tmp_path):
    (row,) = json.loads((exports / "fp32.json").read_text())["rows"]
    files = [exports / "last.pt", exports / "fp32.onnx"]
    code, _, err = script(evaluate, "--ckpt", *files, "--data", few, "--json", tmp_path / "r.json", "--precision", "fp32")
    assert code == 2 and "fp32.onnx is fp32" in err
    code, out, err = script(evaluate, "--ckpt", *files, "--data", few, "--json", tmp_path / "r.json")
    assert code == 0 and "Sup resnet18 ONNX fp32" in out, err
    torch_row, onnx_row = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["miou_torch"] == torch_row["miou"] > 60 and row["miou"] == onnx_row["miou"]
    assert row["equal_labels"] >= 99.99 and row["within_tolerance"] and row["images"] == 8 and row["compared_on"] == "val"
    assert row["bytes"] == (exports / "fp32.onnx").stat().st_size
    same = {key: value for key, value in torch_row.items() if key not in ("miou", "iou", "export")}
    assert {key: onnx_row[key] for key in same} == same and (torch_row["export"], onnx_row["export"]) == (None, "fp32")


@pytest.mark.slow
def test_labels_are_the_classes_of_the_largest_logits(exports):
    images = some_images((2, 40, 30))
    labels = OnnxModel(exports / "labels.onnx")(images)
    assert labels.dtype == np.uint8 and np.array_equal(labels, OnnxModel(exports / "fp32.onnx")(images).argmax(1))


def test_networks_of_torchvision_are_exported_alike():
    images = torch.from_numpy(some_images((2, 20, 24)))
    layer = torch.nn.Conv2d(3, 4, 3, stride=2)

    class Network(torch.nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x):
            return self.wrap(layer(x))

    plain, output, torchvision_ = (
        export.Exported(Network(wrap))(images)
        for wrap in (lambda x: x, lambda x: models.Output(x, x), lambda x: {"out": x, "aux": -x})
    )
    assert plain.shape == (2, 4, 20, 24) and torch.equal(plain, output) and torch.equal(plain, torchvision_)


# ---- int8 ----


def producers(model):
    return {name: node for node in model.graph.node for name in node.output}


@pytest.mark.slow
def test_int8_computes_all_convolutions_and_leaves_normalization_and_the_last_upsampling_alone(exports):
    model = onnx.load(exports / "int8.onnx")
    made_by, weights = producers(model), {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 10
    for node in convolutions:
        for tensor in node.input[:2]:
            assert made_by[tensor].op_type == "DequantizeLinear", node.name
        weight, scale = (weights[name] for name in made_by[node.input[1]].input[:2])
        assert weight.data_type == onnx.TensorProto.INT8 and list(scale.dims) == [weight.dims[0]]  # a scale per channel
    resize = made_by["logits"]
    assert resize.op_type == "Resize"
    tensor = made_by[made_by[convolutions[0].input[0]].input[0]].input[0]  # what QuantizeLinear takes
    seen = set()
    while tensor != "image":
        seen.add(made_by[tensor].op_type)
        tensor = made_by[tensor].input[0]
    assert {"Add", "Mul"} < seen <= {"Add", "Mul", "Cast", "Reshape", "Transpose"}


@pytest.mark.slow
def test_int8_stays_within_the_tolerance_of_a_trained_network(exports, few, tiny_networks):
    data = datasets.Folder(few)
    pairs = [(data.image(name), data.mask(name)) for name in data.val]
    found = export.compare(network_of(exports), OnnxModel(exports / "int8.onnx"), pairs, 3, Protocol())
    assert found["miou_torch"] - found["miou"] <= export.LOSS and found["equal_labels"] > export.EQUAL["int8"]
    assert found["equal_labels"] < 100 or not np.array_equal(
        *(OnnxModel(exports / f"{n}.onnx")(pairs[0][0][None]) for n in ("fp32", "int8"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("calibrate", export.CALIBRATE)
def test_excluded_modules_stay_in_float32(exports, few, tmp_path, calibrate):
    seen = [datasets.Folder(few).image(f"train{i}")[None] for i in range(3)]
    exclude = ["classifier", "aspp.convs.4"]
    export.quantize(exports / "fp32.onnx", tmp_path / "q.onnx", seen, calibrate, exclude, reduce_range=True)
    model = onnx.load(tmp_path / "q.onnx")
    made_by, weights = producers(model), {tensor.name: tensor for tensor in model.graph.initializer}
    names = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    in_float = {name.removeprefix("network.").removesuffix(".weight") for name in names if name in weights}
    assert in_float == {"classifier", "aspp.convs.4.1"}
    for name in names:
        if name not in weights:  # --reduce-range: 7 bits
            values = onnx.numpy_helper.to_array(weights[made_by[name].input[0]])
            assert 50 < np.abs(values.astype(int)).max() <= 64
    with pytest.raises(common.UserError, match="--exclude head: the network has no such module; its parts are aspp, backbone,"):
        export.quantize(exports / "fp32.onnx", tmp_path / "q.onnx", seen, exclude=["head"])


class Recorded(datasets.Shapes):
    """Notes which images are opened. A val image is among the unlabeled ones too."""

    def __init__(self):
        super().__init__(20, 5)
        self.unlabeled, self.opened = ["val-0001", "more"], []

    def image(self, name):
        self.opened.append(name)
        return super().image(name)


def test_int8_is_calibrated_on_training_images_alone_and_on_the_same_ones_each_time():
    class Args:
        calibration_images = 7

    opened = []
    for _ in range(2):
        data = Recorded()
        images = export.calibration_images(Args, data, [])
        assert len(images) == 7 and not {*data.opened} & {*data.val}
        opened.append(data.opened)
    assert opened[0] == opened[1] and len({*opened[0]}) == 7
    Args.calibration_images = 100
    assert len(export.calibration_images(Args, data, [])) == 21


def test_images_are_spread_evenly():
    assert export.spread(range(100), 4) == [0, 25, 50, 75] and export.spread("abc", 3) == [*"abc"] == export.spread("abc", 9)


# ---- the tolerance ----


@pytest.mark.parametrize(
    "precision,found,fault",
    [
        ("fp32", {"equal_labels": 99.99, "miou": 10.0, "miou_torch": 90.0}, None),
        ("fp32", {"equal_labels": 99.98, "miou": 90.0, "miou_torch": 90.0}, "99.980% of the labels are equal"),
        ("int8", {"equal_labels": 50.0, "miou": 59.5, "miou_torch": 60.0}, None),
        ("int8", {"equal_labels": 99.0, "miou": 59.4, "miou_torch": 60.0}, "int8 loses 0.60 mIoU"),
        ("int8", {"equal_labels": 97.0, "miou": None, "miou_torch": None}, None),
        ("int8", {"equal_labels": 96.9, "miou": None, "miou_torch": None}, "96.900% of the labels are equal"),
    ],
)
def test_the_tolerance(precision, found, fault):
    class Args:
        calibrate, exclude, calibration_images = "minmax", [], 64

    Args.precision = precision
    said = export.fault_in(found, Args)
    assert said is None if fault is None else said.startswith(fault)
    if fault and precision == "int8":
        assert "try --calibrate percentile or --exclude classifier or --calibration-images 256" in said and "--force" in said
        Args.calibrate, Args.exclude = "percentile", ["classifier"]
        assert "try --calibration-images 256" in export.fault_in(found, Args)


@pytest.fixture
def exported_before(exports, monkeypatch, tiny_networks):
    """The fixture's export instead of another one, which takes seconds."""
    monkeypatch.setattr(export, "export_onnx", lambda network, path, *more: shutil.copy(exports / "fp32.onnx", path))
    return exports


@pytest.mark.slow
def test_what_is_outside_the_tolerance_is_written_with_force_alone(script, exported_before, few, tmp_path, monkeypatch):
    ckpt, out = exported_before / "last.pt", tmp_path / "m.onnx"
    other = network_of(exported_before)
    with torch.no_grad():
        other.classifier.weight.neg_()
    monkeypatch.setattr(models, "model_from_checkpoint", lambda checkpoint, path: other)
    out.write_bytes((exported_before / "int8.onnx").read_bytes())  # ours, from before
    before = out.read_bytes()
    code, said, err = script(export, "--ckpt", ckpt, "--out", out, "--data", few)
    assert code == 1 and "of the labels equal" in said
    (line,) = [line for line in err.splitlines() if "compare" not in line]
    assert f"{out} was not written: " in line and "--force" in line
    assert out.read_bytes() == before and not (tmp_path / "m.json").exists()
    code, _, err = script(export, "--ckpt", ckpt, "--out", out, "--data", few, "--force")
    assert code == 0 and out.read_bytes() != before, err
    assert not json.loads((tmp_path / "m.json").read_text())["rows"][0]["within_tolerance"]


# ---- the command ----


@pytest.mark.slow
def test_without_the_data_set_images_serve(script, exported_before, few, tmp_path):
    ckpt = tmp_path / "last.pt"
    checkpoint = run_folder.load_checkpoint(exported_before / "last.pt")
    checkpoint["args"]["data"] = str(tmp_path / "absent")
    run_folder.save_checkpoint(ckpt, checkpoint)
    err = errors(script, export, "--ckpt", ckpt, "--out", tmp_path / "m.onnx")
    assert "absent" in err and "or give --images DIR" in err
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(8):
        shutil.copy(few / "images" / f"train{i}.png", photos)
    options = "--precision int8 --calibration-images 5 --calibrate percentile --exclude classifier --output labels"
    code, out, err = script(export, "--ckpt", ckpt, "--out", tmp_path / "m.onnx", "--images", photos, *options.split())
    assert code == 0 and "calibrating on 5 images of --images" in out, err
    (row,) = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert row["miou"] is None and row["compared_on"] == "--images" and row["images"] == 8 and row["equal_labels"] > 97
    model = OnnxModel(tmp_path / "m.onnx")
    quantization = {
        "images": 5,
        "source": "--images",
        "method": "percentile",
        "excluded": ["classifier"],
        "reduce_range": False,
    }
    assert row["quantization"] == model.metadata["quantization"]
    float_nodes = row["quantization"].pop("float_nodes")
    assert row["quantization"] == quantization
    exported = onnx.load(tmp_path / "m.onnx")
    convolutions = {node.name: node for node in exported.graph.node if node.op_type == "Conv"}
    in_float = {name for name, node in convolutions.items() if node.input[1] not in producers(exported)}  # float32 weights
    assert len(in_float) == 1 and in_float == convolutions.keys() & {*float_nodes}
    assert model.output == "labels" and model.metadata["precision"] == "int8"
    assert str(tmp_path).encode() not in (tmp_path / "m.onnx").read_bytes()


def test_images_in_place_of_a_data_set_with_a_fault_say_which(folder, tmp_path, ckpt, capsys):
    checkpoint = run_folder.load_checkpoint(ckpt)
    mask = folder / "masks" / f"{(folder / 'val.txt').read_text().split()[0]}.png"
    mask.write_bytes(b"junk")
    checkpoint["args"].update(dataset="folder", data=str(folder))
    args = argparse.Namespace(images=folder / "images", data=None, ckpt=ckpt)
    assert export.open_images(args, checkpoint)[0] is None
    assert str(mask) in capsys.readouterr().out


@pytest.mark.slow
def test_a_fixed_size_is_that_of_the_windows(script, exports, few, tmp_path, tiny_networks):
    arguments = ("--data", few, "--size", "24x28", "--opset", "20")
    code, _, err = script(export, "--ckpt", exports / "last.pt", "--out", tmp_path / "m.onnx", *arguments)
    assert code == 0, err
    model = OnnxModel(tmp_path / "m.onnx")
    assert model.size == (24, 28) and model.metadata["window"] == [24, 28] and model.metadata["opset"] == 20
    assert model.session.get_inputs()[0].shape == [1, 24, 28, 3]
    options = ("--data", few, "--json", tmp_path / "r.json")
    code, _, err = script(evaluate, "--ckpt", tmp_path / "m.onnx", *options)
    assert code == 0, err
    code, _, err = script(
        evaluate, "--ckpt", exports / "last.pt", *options[:2], "--json", tmp_path / "t.json", "--window", "24x28"
    )
    assert code == 0, err
    mious = [json.loads((tmp_path / name).read_text())["rows"][0]["miou"] for name in ("r.json", "t.json", "m.json")]
    assert mious[0] == pytest.approx(mious[1], abs=0.01) and mious[0] == mious[2]
    assert "takes 24x28 alone" in errors(script, evaluate, "--ckpt", tmp_path / "m.onnx", *options, "--window", "32")


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["--out", "m.pt"], "--out m.pt: give a file's name that ends in .onnx"),
        (["--out", "folder.onnx"], "--out folder.onnx"),
        (["--out", "m.onnx", "--json", "m.txt"], "--json m.txt"),
        (["--out", "mine.onnx"], "mine.onnx exists and was not written by this project"),
        (["--out", "m.onnx", "--json", "mine.json"], "mine.json exists and was not written by this project"),
        (["--out", "file/m.onnx"], "--out file"),
        (["--out", "m.onnx", "--opset", "17"], "--opset 17: must be at least 18"),
        (["--out", "m.onnx", "--size", "0"], "--size"),
        (["--out", "m.onnx", "--exclude", "classifier"], "--exclude: is for --precision int8"),
        (["--out", "m.onnx", "--reduce-range"], "--reduce-range: is for --precision int8"),
        (["--out", "m.onnx", "--calibration-images", "9"], "--calibration-images: is for --precision int8"),
        (["--out", "m.onnx", "--precision", "int8", "--calibration-images", "0"], "--calibration-images 0"),
        (["--out", "m.onnx", "--images", "absent"], "--images absent: no such folder"),
        (["--out", "m.onnx", "--ckpt", "absent.pt"], "absent.pt: no such checkpoint"),
        (["--out", "m.onnx", "--data", "absent"], "--data"),
    ],
)
def test_wrong_arguments_are_one_line(script, ckpt, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "export_onnx", None)  # no work begins
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "mine.onnx").write_bytes(b"precious")
    (tmp_path / "mine.json").write_text("{}")
    assert expected in errors(script, export, "--ckpt", ckpt, *arguments)
    assert (tmp_path / "mine.onnx").read_bytes() == b"precious"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_the_pip_line_is_printed(script, ckpt, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    err = errors(script, export, "--ckpt", ckpt, "--out", tmp_path / "m.onnx")
    assert "run pip install onnx onnxscript onnxruntime" in err and package in err
