"""Exported models are opened if export.py wrote them; anything else is one line that names the file."""

import json
import sys

import numpy as np
import pytest
import torch

import onnx_model
from common import UserError
from onnx_model import OnnxModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, FLOAT, UINT8 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8

METADATA = {
    "classes": ["road", "tree"],
    "palette": [[0, 0, 0], [128, 0, 0]],
    "args": {
        "dataset": "shapes",
        "backbone": "resnet18",
        "stem": "standard",
        "head_width": 8,
        "separable_head": False,
        "image_scale": 1.0,
        "precision": "fp32",
    },
    "row": {
        "method": "sup",
        "role": "student",
        "backbone": "resnet18",
        "partition": "1/8",
        "labeled": 64,
        "steps": 2,
        "seed": 0,
        "gmacs_model": 0.1,
        "mgd_ops": "torch",
    },
    "image_scale": 1.0,
    "window": None,
    "size": None,
    "precision": "fp32",
    "output": "logits",
    "params_m": 0.0,
    "bytes_per_pixel": 8.0,
}


def small_model(metadata=METADATA, inputs=("image",), kind=UINT8, output="logits", dims=None, logits=2, more=()):
    """A model whose logits are the red and the green of each pixel. `more` replaces its first initializers."""
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=FLOAT),
        helper.make_node("Transpose", ["floats"], ["pixels"], perm=[0, 3, 1, 2]),
        helper.make_node("Slice", ["pixels", "from", "to", "axis"], [output]),
    ]
    numbers = {"from": 0, "to": logits, "axis": 1}
    initializers = [helper.make_tensor(key, onnx.TensorProto.INT64, [1], [value]) for key, value in numbers.items()]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, kind, ["b", "h", "w", 3]) for name in inputs],
        [helper.make_tensor_value_info(output, FLOAT, dims or ["b", "n", "h", "w"])],
        [*more, *initializers[len(more) :]],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if metadata is not None:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        helper.set_model_props(model, {onnx_model.KEY: text})
    return model


def write(path, model=None):
    path.write_bytes((model or small_model()).SerializeToString())
    return path


def test_a_model_gives_its_logits(tmp_path):
    model = OnnxModel(write(tmp_path / "a.onnx"))
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    assert np.array_equal(model(images), images.transpose(0, 3, 1, 2)[:, :2].astype(np.float32))
    assert model.metadata == METADATA and model.size is None
    # what a slice or a mirror image of a tensor gives
    assert np.array_equal(model(images[:, ::-1, 1:]), images[:, ::-1, 1:].transpose(0, 3, 1, 2)[:, :2])


def test_as_many_threads_as_pytorch_has(tmp_path):
    path = write(tmp_path / "a.onnx")
    assert onnx_model.start_session(path).get_session_options().intra_op_num_threads == torch.get_num_threads()
    assert onnx_model.start_session(path, 7).get_session_options().intra_op_num_threads == 7


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        OnnxModel(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x08\x0a" * 50, b"PK\x03\x04"])
def test_a_file_of_others_is_refused(tmp_path, content):
    (tmp_path / "a.onnx").write_bytes(content)
    assert "was not written by export.py" in refused(tmp_path / "a.onnx")


def test_a_foreign_model_is_refused(tmp_path):
    assert "was not written by export.py" in refused(write(tmp_path / "a.onnx", small_model(None)))


def test_what_cannot_be_read_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert "cannot be read" in refused(tmp_path / "folder.onnx")


def test_a_cut_file_is_refused(tmp_path):
    whole = write(tmp_path / "a.onnx").read_bytes()
    (tmp_path / "a.onnx").write_bytes(whole[len(whole) // 3 :])
    assert "is damaged" in refused(tmp_path / "a.onnx")


def test_weights_in_another_file_are_refused(tmp_path):
    weight = onnx.TensorProto(
        name="from", data_type=onnx.TensorProto.INT64, dims=[1], data_location=onnx.TensorProto.EXTERNAL,
        external_data=[onnx.StringStringEntryProto(key="location", value="/etc/passwd")],
    )  # fmt: skip
    assert "keeps its weights in another file" in refused(write(tmp_path / "a.onnx", small_model(more=[weight])))


@pytest.mark.parametrize(
    "metadata",
    [
        "not JSON",
        "[1]",
        {key: value for key, value in METADATA.items() if key != "row"},
        {**METADATA, "classes": []},
        {**METADATA, "classes": [1, 2]},
        {**METADATA, "palette": [[0, 0, 0]]},
        {**METADATA, "palette": [[0, 0, 0], [0, 0, 256]]},
        {**METADATA, "classes": ["road", "road"]},
        {**METADATA, "args": None},
        {**METADATA, "args": {**METADATA["args"], "dataset": ["shapes"]}},
        {**METADATA, "args": {"stem": "standard"}},
        {**METADATA, "row": {**METADATA["row"], "seed": {}}},
        {**METADATA, "image_scale": -1.0},
        {**METADATA, "image_scale": "1"},
        {**METADATA, "window": [0, 3]},
        {**METADATA, "window": 512},
        {**METADATA, "size": [64, 64.5]},
        {**METADATA, "bytes_per_pixel": "x"},
        {**METADATA, "params_m": None},
        {**METADATA, "precision": 8},
        {**METADATA, "output": "labels"},
    ],
)
def test_wrong_metadata_is_refused(tmp_path, metadata):
    assert "is damaged" in refused(write(tmp_path / "a.onnx", small_model(metadata, dims=["b", 2, "h", "w"])))


@pytest.mark.parametrize(
    "model,reason",
    [
        ({"kind": FLOAT}, "its input"),
        ({"inputs": ("image", "more")}, "is damaged"),
        ({"output": "scores"}, "its output"),
        ({"dims": ["b", 3, "h", "w"], "logits": 3}, "it has 3 logits for 2 classes"),
    ],
)
def test_a_model_of_another_form_is_refused(tmp_path, model, reason):
    assert reason in refused(write(tmp_path / "a.onnx", small_model(**model)))


def test_an_output_of_another_shape_is_refused(tmp_path):
    model = OnnxModel(write(tmp_path / "a.onnx"))
    model.classes = 3  # not every file tells how many logits it gives
    with pytest.raises(UserError, match=r"a\.onnx: is damaged; its output is \(1, 2, 4, 4\), not \(1, 3, 4, 4\)"):
        model(np.zeros((1, 4, 4, 3), np.uint8))


def test_a_fixed_size_takes_no_other(tmp_path):
    model = OnnxModel(write(tmp_path / "a.onnx", small_model({**METADATA, "size": [4, 6], "window": [4, 6]})))
    assert model(np.zeros((1, 4, 6, 3), np.uint8)).shape == (1, 2, 4, 6)
    with pytest.raises(UserError, match=r"takes images of 4x6 \(height x width\) alone, not of 6x4"):
        model(np.zeros((1, 6, 4, 3), np.uint8))


def test_without_onnxruntime_the_pip_line_is_printed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="this needs onnxruntime; run pip install onnx onnxscript onnxruntime"):
        OnnxModel(write(tmp_path / "a.onnx"))
