import json
import urllib.error

import pytest
import torch
import torchvision

import models
from common import UserError

PAPER_STEMS = {"resnet101": "deep", "resnet18": "deep", "wide_resnet34": "standard", "mobilenetv2": "standard"}


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


def test_json_lists_every_backbone_and_stem(script):
    code, out, _ = script(models, "--json")
    rows = json.loads(out)
    assert code == 0
    assert {(r["backbone"], r["stem"]) for r in rows} == {(b, s) for b in models.BACKBONES for s in models.STEMS}
    assert {"params_m", "gmacs_512", "gmacs_800", "model_params_m", "model_gmacs_512"} <= rows[0].keys()


@pytest.mark.parametrize("name", list(models.BACKBONES))
@pytest.mark.parametrize("separable", [False, True])
def test_shapes_of_the_output(name, separable):
    model = models.build_model(name, 5, head_width=16, separable_head=separable).eval()
    with torch.inference_mode():
        logits, features = model(torch.zeros(1, 3, 65, 97))
    assert logits.shape == (1, 5, 65, 97) and logits.dtype == torch.float32
    assert features.shape == (1, 16, 17, 25)


def test_stride_of_the_high_features():
    for name, stride in (("resnet18", 16), ("mobilenetv2", 32)):
        low, high = models.build_backbone(name).eval()(torch.zeros(1, 3, 128, 128))
        assert low.shape[-1] == 32 and high.shape[-1] == 128 // stride


def test_separable_head_is_lighter():
    assert models.measure("mbv2", separable_head=True)["model_gmacs_512"] < models.measure("mbv2")["model_gmacs_512"] / 3


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_weights_from_a_file_are_torchvisions(name, tmp_path):
    network = torchvision.models.get_model(models.BACKBONES[name]).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = models.build_backbone(name, str(tmp_path / "weights.pth")).eval()
    ours = dict(backbone.named_parameters())
    first = next(iter(ours.values()))
    assert torch.equal(first, next(network.parameters()))
    used = [p for k, p in network.named_parameters() if not k.startswith(("fc.", "classifier.", "features.18."))]
    assert len(used) == len(ours) and all(torch.equal(a, b) for a, b in zip(used, ours.values(), strict=True))


def test_imagenet_weights_load_from_torchvisions_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1])
    backbone = models.build_backbone("r18", "imagenet")
    assert torch.equal(backbone.low[0].weight, network.conv1.weight)


def test_weights_that_cannot_be_had_are_one_clear_line(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"--weights imagenet: cannot download .*resnet18.*--weights none"):
        models.build_backbone("r18", "imagenet")
    with pytest.raises(UserError, match="no such file"):
        models.build_backbone("r18", str(tmp_path / "absent.pth"))
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match="not a state dict"):
        models.build_backbone("r18", str(tmp_path / "noise.pth"))
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    with pytest.raises(UserError, match="does not fit resnet18"):
        models.build_backbone("r18", str(tmp_path / "r34.pth"))
    with pytest.raises(UserError, match="standard stem"):
        models.build_backbone("r18", "imagenet", "deep")
    with pytest.raises(UserError, match="unknown backbone 'vgg'"):
        models.build_backbone("vgg")


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
        output = model(torch.randn(2, 3, 48, 64), upsample=whole).logits.log_softmax(1)
    expected = sum(size for pointer, size in kept.items() if pointer not in own)
    assert output.requires_grad
    assert models.activation_bytes(model, 2, (48, 64), "fp32", whole) == pytest.approx(expected, rel=0.02)
    assert 0.5 <= models.activation_bytes(model, 2, (48, 64), "bf16", whole) / expected < 0.7
