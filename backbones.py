"""The backbones: classification networks of torchvision and of efficientnet_lite.py, dilated and cut into two stages.

Their published weights are read here too.
"""

import functools
import urllib.error

import torch
import torchvision
from torch import nn

import efficientnet_lite
from common import UserError
from readers import open_tensors

# Our name for a backbone, the paper's where it has one -> torchvision's, or that of efficientnet_lite.py.
# "Wide ResNet-34" counts 66.83M parameters only as Wide ResNet-50-2.
BACKBONES = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "wide_resnet34": "wide_resnet50_2",
    "mobilenetv2": "mobilenet_v2",
    **{name: name for name in efficientnet_lite.NETWORKS},
}
ALIASES = {
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "r101": "resnet101",
    "wr34": "wide_resnet34",
    "mbv2": "mobilenetv2",
    "el0": "efficientnet_lite0",
    "el1": "efficientnet_lite1",
    "el2": "efficientnet_lite2",
}
STEMS = ("standard", "deep")
# Widths of the three 3x3 convolutions of the deep stem. The wide ResNet and MobileNetV2 reach the paper's parameter
# counts with their own stem, and keep it, as EfficientNet-Lite does.
DEEP_STEM = {
    "resnet18": (32, 32, 64),
    "resnet34": (32, 32, 64),
    "resnet50": (64, 64, 128),
    "resnet101": (64, 64, 128),
}


def canonical_name(name: str, flag: str = "--backbone") -> str:
    name = ALIASES.get(name, name)
    if name not in BACKBONES:
        raise UserError(f"{flag}: unknown backbone '{name}'; choose one of {', '.join([*BACKBONES, *ALIASES])}")
    return name


class Backbone(nn.Module):
    """Two stages of a classification network: (B, 3, H, W) -> low (B, C0, H/4, W/4), high (B, C1, H/16, W/16).

    MobileNetV2's high stage has stride 32.
    """

    def __init__(self, low: nn.Sequential, high: nn.Sequential, low_channels: int, high_channels: int):
        super().__init__()
        self.low, self.high = low, high
        self.low_channels, self.high_channels = low_channels, high_channels

    def forward(self, images):
        low = self.low(images)
        return low, self.high(low)


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def dilate(blocks: nn.Sequential, dilations: tuple[int, ...]):
    """Set the stride of `blocks` to 1 and dilate the convolutions of block i, but for those of 1x1, by `dilations[i]`.

    There may be fewer blocks than dilations, as in resnet18's last stage. Raises ValueError for more.
    """
    for block, dilation in zip(blocks, dilations[: len(blocks)], strict=True):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                conv.dilation = tuple(dilation if side > 1 else 1 for side in conv.kernel_size)
                conv.padding = tuple(dilation * (side // 2) for side in conv.kernel_size)


def build_backbone(name: str, weights: str = "none", stem: str = "standard") -> Backbone:
    """A dilated classification network without its classifier, for `name` of `BACKBONES` or `ALIASES`.

    weights: `imagenet` (torchvision's, downloaded once, or those of an installed package), `none`, or a file with a state dict
    of the published keys.
    stem: `standard` as in torchvision, or `deep`, three 3x3 convolutions, which gives the paper's parameter counts.
    Raises UserError for an unknown name or stem, and for weights that cannot be read or do not fit.
    """
    name = canonical_name(name)
    if stem not in STEMS:
        raise UserError(f"--stem: unknown stem '{stem}'; choose one of {', '.join(STEMS)}")
    network = dilated_network(name, stem)
    if weights != "none":
        load_weights(network, name, weights, stem)
    if name == "mobilenetv2":
        return Backbone(network.features[:4], network.features[4:18], low_channels=24, high_channels=320)
    if name in efficientnet_lite.NETWORKS:
        depths, channels = efficientnet_lite.NETWORKS[name]
        low = nn.Sequential(network.stem, network.blocks[: sum(depths[:2])])
        return Backbone(low, network.blocks[sum(depths[:2]) :], low_channels=channels[1], high_channels=channels[-1])
    low = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, network.layer1)
    low_channels, high_channels = (64, 512) if name in ("resnet18", "resnet34") else (256, 2048)
    return Backbone(low, nn.Sequential(network.layer2, network.layer3, network.layer4), low_channels, high_channels)


def dilated_network(name: str, stem: str) -> nn.Module:
    """The whole classification network of a backbone, with our stem and dilations."""
    if name in efficientnet_lite.NETWORKS:
        network = efficientnet_lite.EfficientNetLite(name)
        dilate(network.blocks[sum(efficientnet_lite.NETWORKS[name].depths[:5]) :], (1, 2, 2, 2, 2, 2))
        return network
    network = torchvision.models.get_model(BACKBONES[name], weights=None)
    if name == "mobilenetv2":
        # The stride of 32 stays; the last 1x1 convolution (320 -> 1280) serves the classifier alone and is dropped.
        dilate(network.features[15:18], (2, 4, 8))
        return network
    if stem == "deep" and name in DEEP_STEM:
        a, b, c = DEEP_STEM[name]
        network.conv1 = nn.Sequential(
            conv_norm_relu(3, a, 3, stride=2), conv_norm_relu(a, b, 3), nn.Conv2d(b, c, 3, padding=1, bias=False)
        )
        network.bn1 = nn.BatchNorm2d(c)
        if c != network.layer1[0].conv1.in_channels:  # 128 of resnet50 and 101: layer1's first block is wider too
            first = network.layer1[0]
            first.conv1 = nn.Conv2d(c, first.conv1.out_channels, 1, bias=False)
            first.downsample[0] = nn.Conv2d(c, first.downsample[0].out_channels, 1, bias=False)
        for conv in [network.conv1, network.layer1[0]]:
            for m in conv.modules():
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    dilate(network.layer4, (2, 4, 8))
    return network


# ---- published weights ----


def load_weights(network: nn.Module, name: str, weights: str, stem: str):
    """Load `weights`, `imagenet` or a file, into the network of `name`, except for its classifier. Raises UserError.

    The counters `num_batches_tracked` are ignored on both sides: torchvision's published ResNet files do not have them.
    """
    state = published_weights(name, stem) if weights == "imagenet" else read_state_dict(weights)
    state, own = without_classifier(state), without_classifier(network.state_dict())
    needed = named_as_in(state, name, own)
    if reason := misfit(state, needed):
        kinds = ((other, kind) for other in BACKBONES for kind in STEMS)
        fits = next(
            (kind for kind in kinds if misfit(state, named_as_in(state, kind[0], expected_shapes(*kind))) is None), None
        )
        if fits:
            raise UserError(
                f"--weights {weights}: holds the weights of {fits[0]} with the {fits[1]} stem, not of {name} with "
                f"the {stem} stem; give the file of the backbone, or the backbone of the file"
            )
        source = f"torchvision's {BACKBONES[name]}"
        if name in efficientnet_lite.NETWORKS:
            source = f"{efficientnet_lite.package_of(name)}, or of timm's tf_{name}"
        raise UserError(
            f"--weights {weights}: does not fit {name} with the {stem} stem ({reason}); give a state dict of {source}"
        )
    broken = next((key for key, value in state.items() if not value.isfinite().all()), None)
    if broken:
        raise UserError(f"--weights {weights}: '{broken}' holds values that are not finite (nan or inf); give other weights")
    if name in efficientnet_lite.NETWORKS:
        efficientnet_lite.load_published(network, name, state)
        if not efficientnet_lite.from_package(state):
            efficientnet_lite.warn_of_timm(name, weights)
        return
    network.load_state_dict(state, strict=False)  # all but the classifier and the counters, as checked above


def published_weights(name: str, stem: str) -> dict[str, torch.Tensor]:
    """torchvision's ImageNet weights, downloaded once, or those of an installed package. Raises UserError."""
    if name in efficientnet_lite.NETWORKS:
        return read_state_dict(str(efficientnet_lite.installed_weights(name)))
    if stem == "deep" and name in DEEP_STEM:
        raise UserError(
            "--weights imagenet: torchvision's weights have the standard stem; "
            "use --stem standard, or --weights FILE for the deep one"
        )
    entry = torchvision.models.get_model_weights(BACKBONES[name]).IMAGENET1K_V1
    try:
        return entry.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"--weights imagenet: cannot download {entry.url} ({error}); put that file into {torch.hub.get_dir()}/checkpoints, "
            "pass it as --weights FILE, or train from scratch with --weights none"
        ) from None


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """The state dict in a file of torch.save, taken out of the dictionary that holds it (`state_dict`, `model`, ...), and its
    keys without the prefixes of DataParallel and torch.compile. Raises UserError with the reason where there is none."""
    try:
        state = open_tensors(path, f"--weights {path}")
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file; give a file, 'imagenet' or 'none'") from None
    if isinstance(state, dict) and {"model", "args", "row"} <= state.keys():
        raise UserError(
            f"--weights {path}: is a checkpoint of this project, not the weights of a classification network; give "
            "'imagenet', 'none' or a file of torchvision (--resume continues a run)"
        )
    while isinstance(state, dict) and state and not is_state_dict(state):
        inner = [key for key in ("state_dict", "model") if isinstance(state.get(key), dict)]
        inner = inner or [key for key, value in state.items() if is_state_dict(value)]
        if not inner:
            keys = ", ".join(map(str, [*state][:5]))
            raise UserError(f"--weights {path}: holds no state dict, but {keys}; save network.state_dict() alone")
        state = state[inner[0]]
    if not is_state_dict(state):
        what = "is empty" if isinstance(state, dict) else f"holds no state dict, but a {type(state).__name__}"
        raise UserError(f"--weights {path}: {what}; save network.state_dict() alone")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # one wraps the other in either order
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def is_state_dict(state) -> bool:
    """Whether `state` maps names to tensors."""
    return (
        isinstance(state, dict)
        and len(state) > 0
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())
    )


def without_classifier(state: dict) -> dict:
    """The entries that a backbone needs: without the classifier and without batch norm's counters."""
    classifier = ("fc.", "classifier.", "features.18.", *efficientnet_lite.CLASSIFIER)
    return {k: v for k, v in state.items() if not (k.startswith(classifier) or k.endswith(".num_batches_tracked"))}


def named_as_in(state: dict, name: str, entries: dict) -> dict:
    """The entries of the network `name` under the names that they have in a file with the state dict `state`."""
    if name not in efficientnet_lite.NETWORKS:
        return entries
    return dict(zip(efficientnet_lite.names_in_file(name, entries, state), entries.values(), strict=True))


@functools.cache
def expected_shapes(name: str, stem: str) -> dict[str, torch.Tensor]:
    """The state dict that `name` needs, on the meta device."""
    with torch.device("meta"):
        return without_classifier(dilated_network(name, stem).state_dict())


def misfit(state: dict[str, torch.Tensor], needed: dict[str, torch.Tensor]) -> str | None:
    """The first reason why `state` cannot be loaded where `needed` is, or None."""
    for key, value in needed.items():
        if key not in state:
            starts = (name.removesuffix(key) for name in state if name.endswith(f".{key}"))
            start = next((start for start in starts if all(start + name in state for name in needed)), None)
            return f"its keys begin with '{start}'" if start else f"'{key}' is missing"
        if state[key].shape != value.shape:
            return f"'{key}' is {tuple(state[key].shape)}, not {tuple(value.shape)}"
    return next((f"'{key}' is not part of it" for key in state if key not in needed), None)
