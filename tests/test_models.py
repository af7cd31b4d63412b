import argparse
import json
import pickle
import urllib.error

import pytest
import torch
import torchvision

import backbones
import efficientnet_lite
import inference
import models
from common import UserError

TORCHVISION = [name for name in backbones.BACKBONES if name not in efficientnet_lite.NETWORKS]
PAPER_STEMS = {"resnet101": "deep", "resnet18": "deep", "wide_resnet34": "standard", "mobilenetv2": "standard"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER_STEMS)
def test_backbones_are_those_of_the_paper(name):
    cost = models.measure(name, PAPER_STEMS[name])
    params, gmacs_512, gmacs_800 = models.PAPER[name]
    assert abs(cost["params_m"] - params) < 0.01
    # the paper's counter adds norms and activations to the multiply-accumulates
    rel = 0.045 if name == "mobilenetv2" else 0.005
    assert cost["gmacs_512"] == pytest.approx(gmacs_512, rel=rel) and cost["gmacs_800"] == pytest.approx(gmacs_800, rel=rel)


def test_gmacs_of_one_convolution():
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert models.gmacs(conv, 8) == pytest.approx(3 * 5 * 9 * 64 / 1e9)


@pytest.mark.slow
def test_json_lists_every_backbone_and_stem(script):
    code, out, _ = script(models, "--json")
    rows = json.loads(out)
    assert code == 0
    assert {(r["backbone"], r["stem"]) for r in rows} == {(b, s) for b in backbones.BACKBONES for s in backbones.STEMS}
    assert {"params_m", "gmacs_512", "gmacs_800", "model_params_m", "model_gmacs_512"} <= rows[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(backbones.BACKBONES))
@pytest.mark.parametrize("separable", [False, True])
def test_shapes_of_the_output(name, separable):
    model = models.build_model(name, 5, head_width=16, separable_head=separable).eval()
    with torch.inference_mode():
        logits, features = model(torch.zeros(1, 3, 65, 97))
    assert logits.shape == (1, 5, 17, 25) and logits.dtype == torch.float32
    assert features.shape == (1, 16, 17, 25)


def test_stride_of_the_high_features():
    for name, stride in (("resnet18", 16), ("mobilenetv2", 32), ("el0", 16)):
        low, high = backbones.build_backbone(name).eval()(torch.zeros(1, 3, 128, 128))
        assert low.shape[-1] == 32 and high.shape[-1] == 128 // stride


@pytest.mark.parametrize("sides", [(3, 3), (5, 5), (1, 7)])
def test_dilation_keeps_the_size_whatever_the_kernel(sides):
    conv = torch.nn.Conv2d(2, 2, sides, stride=2, padding=(sides[0] // 2, sides[1] // 2))
    backbones.dilate(torch.nn.Sequential(conv), (4,))
    assert conv(torch.zeros(1, 2, 33, 40)).shape == (1, 2, 33, 40)
    impulse = torch.zeros(1, 2, 41, 41)
    impulse[..., 20, 20] = 1
    reach = (conv(impulse) - conv(0 * impulse)).abs().sum((0, 1)).nonzero() - 20  # where one pixel is seen
    assert reach.abs().amax(0).tolist() == [4 * (side // 2) for side in sides]


def test_no_block_is_left_without_a_dilation():
    blocks = [torch.nn.Conv2d(2, 2, 3) for _ in range(3)]
    backbones.dilate(torch.nn.Sequential(*blocks[:2]), (2, 4, 8))
    with pytest.raises(ValueError, match="shorter"):
        backbones.dilate(torch.nn.Sequential(*blocks), (2, 4))


@pytest.mark.slow
def test_separable_head_is_lighter():
    assert models.measure("mbv2", separable_head=True)["model_gmacs_512"] < models.measure("mbv2")["model_gmacs_512"] / 3


def published(name, counters=False):
    """A state dict as torchvision publishes it: every entry one number, so that the file is small; with or without batch norm's
    counters, which the files of ResNet-18, 34, 50 and 101 do not have."""
    with torch.device("meta"):
        own = torchvision.models.get_model(backbones.BACKBONES[name]).state_dict()
    keys = [key for key in own if counters or not key.endswith("num_batches_tracked")]
    return {key: torch.tensor(float(i + 1)).expand(own[key].shape) for i, key in enumerate(keys)}


def assert_loaded(backbone, state):
    """Every parameter and every running statistic of the backbone is the one of `state`, in torchvision's order."""
    used = [value for key, value in backbones.without_classifier(state).items()]
    ours = [value for key, value in backbone.state_dict().items() if not key.endswith("num_batches_tracked")]
    assert len(used) == len(ours) > 50 and all(torch.equal(a, b) for a, b in zip(ours, used, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("counters", [False, True])
@pytest.mark.parametrize("name", TORCHVISION)
def test_weights_load_with_and_without_the_counters_of_batch_norm(name, counters, tmp_path, monkeypatch):
    state = published(name, counters)
    torch.save(state, tmp_path / "weights.pth")
    assert_loaded(backbones.build_backbone(name, str(tmp_path / "weights.pth")), state)
    # and from torchvision's cache
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights(backbones.BACKBONES[name]).IMAGENET1K_V1.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "weights.pth").rename(tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1])
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", without_hash(torch.hub.load_state_dict_from_url))
    assert_loaded(backbones.build_backbone(name, "imagenet"), state)


def without_hash(load):
    return lambda url, **more: load(url, **{**more, "check_hash": False})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "ema": state},
        lambda state: {"network": state, "epoch": 3},
        lambda state: {"state_dict": {"model": {f"module.{key}": value for key, value in state.items()}}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {key: value.half() for key, value in state.items()},
    ],
)
def test_wrapped_weights_are_unwrapped(wrap, tmp_path):
    state = published("resnet18")
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert_loaded(backbones.build_backbone("r18", str(tmp_path / "weights.pth")), state)


class RunsCode:
    def __reduce__(self):
        return print, ("this must not be printed",)


UNFIT = {
    "resnet34": (lambda: published("resnet34"), "holds the weights of resnet34 with the standard stem, not of resnet18"),
    "mobilenet": (lambda: published("mobilenetv2"), "holds the weights of mobilenetv2 with the standard stem, not of resnet18"),
    "deep stem": (lambda: backbones.dilated_network("resnet18", "deep").state_dict(), "of resnet18 with the deep stem, not of"),
    "missing": (lambda: {k: v for k, v in published("resnet18").items() if k != "bn1.bias"}, "'bn1.bias' is missing"),
    "shape": (lambda: {**published("resnet18"), "bn1.bias": torch.zeros(3)}, "'bn1.bias' is (3,), not (64,)"),
    "more": (lambda: {**published("resnet18"), "layer5.bias": torch.zeros(3)}, "'layer5.bias' is not part of it"),
    "checkpoint": (lambda: {"model": published("resnet18"), "args": {}, "row": {}}, "is a checkpoint of this project"),
    "no tensors": (lambda: {"epoch": 3, "lr": 0.1}, "holds no state dict, but epoch, lr"),
    "list": (lambda: [torch.zeros(3)], "holds no state dict, but a list"),
    "empty": (lambda: {}, "weights.pth: is empty;"),
    "nested and empty": (lambda: {"state_dict": {}}, "weights.pth: is empty;"),
    "prefix": (lambda: {f"backbone.{k}": v for k, v in published("resnet18").items()}, "(its keys begin with 'backbone.')"),
    "two networks": (
        lambda: {f"{net}.{k}": v for net in ("encoder_q", "encoder_k") for k, v in published("resnet18").items()},
        "(its keys begin with 'encoder_q.')",
    ),
    "nan": (
        lambda: {**published("resnet18"), "bn1.bias": torch.full((64,), torch.nan)},
        "'bn1.bias' holds values that are not",
    ),
    "inf": (
        lambda: {**published("resnet18"), "bn1.bias": torch.full((64,), torch.inf)},
        "'bn1.bias' holds values that are not",
    ),
    "network": (lambda: torch.nn.Linear(2, 2), "is a pickle of Python objects, which could run code"),
    "code": (lambda: {"conv1.weight": RunsCode()}, "is a pickle of Python objects, which could run code"),
}


@pytest.mark.parametrize("content,said", UNFIT.values(), ids=UNFIT)
def test_a_file_that_does_not_fit_gets_its_reason(content, said, tmp_path, capsys):
    torch.save(content(), tmp_path / "weights.pth")
    capsys.readouterr()
    with pytest.raises(UserError) as error:
        backbones.build_backbone("r18", str(tmp_path / "weights.pth"))
    assert said in str(error.value) and str(error.value).startswith(f"--weights {tmp_path}/weights.pth: ")
    assert "\n" not in str(error.value) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "content,said",
    [
        (b"<!DOCTYPE html>", "damaged or of another format"),
        (b"", "damaged or of another format"),
        (b"hello", "damaged or of another format"),
        (pickle.dumps({"a": RunsCode()}), "is a pickle of Python objects"),
    ],
)
def test_a_file_of_another_program_gets_its_reason(content, said, tmp_path, capfd):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match=said):
        backbones.build_backbone("r18", str(tmp_path / "weights.pth"))
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="is a folder"):
        backbones.build_backbone("r18", str(tmp_path))


def test_weights_that_cannot_be_had_are_one_clear_line(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"--weights imagenet: cannot download .*resnet18.*--weights none"):
        backbones.build_backbone("r18", "imagenet")
    with pytest.raises(UserError, match="no such file"):
        backbones.build_backbone("r18", str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match="standard stem"):
        backbones.build_backbone("r18", "imagenet", "deep")
    with pytest.raises(UserError, match="unknown backbone 'vgg'"):
        backbones.build_backbone("vgg")


@pytest.mark.parametrize("whole", [False, True])
def test_activations_are_those_that_backward_keeps(whole):
    """Against the bytes that a real forward keeps, in float32."""
    model = models.build_model("r18", 6, head_width=16).train()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.randn(2, 3, 48, 64)).logits
        if whole:
            logits = torch.nn.functional.interpolate(logits, (48, 64), mode="bilinear", align_corners=True)
        output = logits.log_softmax(1)
    expected = sum(size for pointer, size in kept.items() if pointer not in own)
    assert output.requires_grad
    assert models.activation_bytes(model, 2, (48, 64), "fp32", whole) == pytest.approx(expected, rel=0.02)
    assert 0.5 <= models.activation_bytes(model, 2, (48, 64), "bf16", whole) / expected < 0.7


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda c: c["args"].update(head_width=10**9), "do not fit its arguments .head width 1,000,000,000."),
        (lambda c: c["args"].update(head_width=10**6), "do not fit its arguments .*is .*1000000"),
        (lambda c: c["args"].update(head_width=-1), "holds the argument 'head_width' as -1"),
        (lambda c: c["args"].update(backbone="vgg"), "unknown backbone 'vgg'"),
        (lambda c: c["args"].update(stem=["deep"]), "holds the argument 'stem'"),
        (lambda c: c["args"].pop("backbone"), "lacks args.backbone"),
        (lambda c: c["row"].pop("role"), "lacks row.role"),
        (lambda c: c["row"].update(miou=float("nan")), "holds 'miou' as nan"),
        (lambda c: c["row"].update(labeled="many"), "holds 'labeled' as 'many'"),
        (lambda c: c.update(classes=["a"] * 6), "'classes' that are not at most 255 different names"),
        (lambda c: c.update(palette=[[0, 0, 256]] * 6), "a 'palette' with more than 255"),
        (lambda c: c.update(palette=c["palette"][1:]), "a 'palette' that is not one colour per class"),
        (lambda c: c.update(model=None), "a 'model' that is no state dict"),
        (lambda c: c["model"].popitem(), "is missing"),
        (lambda c: c["model"].update({"classifier.bias": torch.zeros(7)}), r"'classifier.bias' is \(7,\), not \(6,\)"),
    ],
)
def test_a_checkpoint_that_no_run_writes_is_one_line_with_its_name(ckpt, change, reason):
    content = torch.load(ckpt, weights_only=True)
    change(content)
    torch.save(content, ckpt)
    args = argparse.Namespace(scales=[1.0], flip=False, window=None, precision=None)
    with pytest.raises(UserError, match=reason) as error:
        inference.open_model(ckpt, args, torch.device("cpu"))
    assert str(error.value).startswith(f"{ckpt}: ")
