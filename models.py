"""DeepLabV3+ on the backbones of backbones.py.

    python models.py           # parameters and GMACs, beside the paper's
    python models.py --json    # the same as JSON

A model maps images (B, 3, H, W) to `Output(logits, features)`: the
classifier's logits (B, N, H/4, W/4) in float32, and the decoder's features (B,
C, H/4, W/4), the F of the paper's region-level loss. `mgd_ops.upsample` brings
the logits to any size.
"""

import copy
import itertools
import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation.deeplabv3 import ASPP

import backbones
from backbones import Backbone, conv_norm_relu
from common import ArgumentParser, UserError, cli

# Table 1 and Table 3 of the paper: params in M, GMACs of the backbone at 512x512 and at 800x800.
PAPER = {
    "resnet101": (42.63, 59.13, 144.32),
    "wide_resnet34": (66.83, 91.12, 222.45),
    "resnet18": (11.19, 17.20, 42.01),
    "mobilenetv2": (1.81, 1.52, 3.73),
}


class Output(NamedTuple):
    logits: torch.Tensor  # (B, N, H/4, W/4), float32
    features: torch.Tensor  # (B, C, H/4, W/4)


class Decoder(nn.Module):
    """DeepLabV3+'s decoder up to its features: the low-level branch, the concatenation and two 3x3 convolutions."""

    def __init__(self, low_channels, reduced_channels, width):
        super().__init__()
        self.reduce = conv_norm_relu(low_channels, reduced_channels, 1)
        self.fuse = nn.Sequential(conv_norm_relu(reduced_channels + width, width, 3), conv_norm_relu(width, width, 3))

    def forward(self, low, high):
        high = F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=True)
        return self.fuse(torch.cat([high, self.reduce(low)], dim=1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al. 2018) with torchvision's ASPP at rates 6, 12, 18, without dropout.

    `head_width` is the number of channels of ASPP and decoder (the paper's models have 256); `separable_head` makes
    their 3x3 convolutions depthwise separable, as DeepLabV3+ does for light backbones. In training mode a batch needs at
    least two images, since ASPP normalizes one pooled vector per image.
    """

    def __init__(self, backbone: Backbone, classes: int, head_width: int = 256, separable_head: bool = False):
        super().__init__()
        self.backbone = backbone
        self.aspp = ASPP(backbone.high_channels, [6, 12, 18], head_width)
        self.aspp.project = self.aspp.project[:3]  # without its dropout
        # 48 channels as in the released code, or as many as the low stage has: MobileNetV2 keeps its 24
        self.decoder = Decoder(backbone.low_channels, min(48, backbone.low_channels), head_width)
        self.classifier = nn.Conv2d(head_width, classes, 1)
        if separable_head:
            make_separable(self.aspp)
            make_separable(self.decoder)

    def forward(self, images) -> Output:
        low, high = self.backbone(images)
        features = self.decoder(low, self.aspp(high))  # (B, C, H/4, W/4)
        logits = self.classifier(features).float()  # losses and argmax see float32, also under autocast
        return Output(logits, features)


def make_separable(module: nn.Module):
    """Replace every 3x3 convolution inside `module` by a depthwise and a pointwise one."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
            c = child.in_channels
            depthwise = nn.Conv2d(c, c, 3, padding=child.padding, dilation=child.dilation, groups=c, bias=False)
            setattr(module, name, nn.Sequential(depthwise, nn.Conv2d(c, child.out_channels, 1, bias=False)))
        else:
            make_separable(child)


def build_model(
    backbone: str,
    classes: int,
    weights: str = "none",
    stem: str = "standard",
    head_width: int = 256,
    separable_head: bool = False,
) -> DeepLabV3Plus:
    """See `build_backbone` and `DeepLabV3Plus`."""
    network = backbones.build_backbone(backbone, weights, stem)
    return DeepLabV3Plus(network, classes, head_width, separable_head).to(memory_format=torch.channels_last)


def model_from_args(args: dict, classes: int, weights: str = "none") -> DeepLabV3Plus:
    """The network that a training's arguments describe."""
    return build_model(args["backbone"], classes, weights, args["stem"], args["head_width"], args["separable_head"])


def model_from_checkpoint(checkpoint: dict, path="the checkpoint") -> DeepLabV3Plus:
    """The trained network of a checkpoint (see `run_folder.load_checkpoint`), in evaluation mode. Raises UserError, which names
    `path`, where its weights are not those of the network that its arguments describe."""
    args, classes, state = checkpoint["args"], len(checkpoint["classes"]), checkpoint["model"]
    try:
        with torch.device("meta"):  # first without memory, since the arguments may claim any size
            reason = backbones.misfit(state, model_from_args(args, classes).state_dict())
    except (RuntimeError, OverflowError):
        reason = f"head width {args['head_width']:,}"
    except UserError as error:  # an unknown backbone
        reason = str(error)
    if reason:
        raise UserError(f"{path}: its weights do not fit its arguments ({reason}); it is damaged, give another")
    model = model_from_args(args, classes)
    model.load_state_dict(state)
    return model.eval()


def fold_batch_norm(model: nn.Module, precision: str = "fp32") -> nn.Module:
    """A copy of `model` in evaluation mode with every batch norm folded into the convolution before it.

    With `bf16` its weights are rounded once, as autocast would do at every step, with a second copy of all of them.
    """
    folded = fuse(copy.deepcopy(model).eval()).eval().to(memory_format=torch.channels_last)
    return folded.to(torch.bfloat16) if precision == "bf16" else folded


def activation_bytes(model: nn.Module, images: int, crop: tuple[int, int], precision: str, whole: bool = False) -> float:
    """Bytes that one training forward of `images` crops keeps for backward, with the logits for the loss, and with `whole` (as
    OHEM keeps them) these at full size; counted on the meta device, so nothing is computed."""
    meta = copy.deepcopy(model).to("meta").train()
    weights = {tensor.untyped_storage()._cdata for tensor in [*meta.parameters(), *meta.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # under autocast all but the full-size logits is kept in 16 bits
            half = precision == "bf16" and tensor.shape[-2:] != tuple(crop)
            kept[storage._cdata] = storage.nbytes() / (2 if half else 1)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = meta(torch.empty(images, 3, *crop, device="meta")).logits
        if whole:
            logits = F.interpolate(logits, crop, mode="bilinear", align_corners=True)
        output = logits.log_softmax(1)
    del output  # the graph, and with it the storages, had to live until here
    return sum(kept.values())


def gmacs(module: nn.Module, size: int) -> float:
    """Multiply-accumulates, in G, of one forward of one (3, size, size) image; convolutions only, as counted by torch."""
    module = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        module(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


def measure(
    backbone: str, stem: str = "standard", head_width: int = 256, separable_head: bool = False, classes: int = 21
) -> dict:
    """Params in M and GMACs of a backbone and of the whole model."""
    with torch.device("meta"):
        model = build_model(backbone, classes, "none", stem, head_width, separable_head)
    return {
        "backbone": backbones.canonical_name(backbone),
        "stem": stem,
        "params_m": sum(p.numel() for p in model.backbone.parameters()) / 1e6,
        "gmacs_512": gmacs(model.backbone, 512),
        "gmacs_800": gmacs(model.backbone, 800),
        "model_params_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "model_gmacs_512": gmacs(model, 512),
    }


def main():
    parser = ArgumentParser(__doc__, usage="%(prog)s [options]")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of the table (default: off)")
    parser.add_argument("--head-width", type=int, default=256, metavar="N", help="channels of ASPP and decoder (default: 256)")
    parser.add_argument("--separable-head", action="store_true", help="depthwise separable ASPP and decoder (default: off)")
    args = parser.parse_args()
    kinds = itertools.product(backbones.BACKBONES, backbones.STEMS)
    rows = [measure(name, stem, args.head_width, args.separable_head) for name, stem in kinds]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(
        "backbone            stem      params (paper)      GMACs 512² (paper)   GMACs 800² (paper)   model: params  GMACs 512²"
    )
    for row in rows:
        cells = [
            f"{row[key]:7.2f} ({'' if value is None else f'{value:.2f}'})"
            for key, value in zip(("params_m", "gmacs_512", "gmacs_800"), PAPER.get(row["backbone"], (None,) * 3), strict=True)
        ]
        print(
            f"{row['backbone']:19} {row['stem']:9} {cells[0]:19} {cells[1]:20} {cells[2]:20} "
            f"{row['model_params_m']:12.2f} {row['model_gmacs_512']:10.2f}"
        )


if __name__ == "__main__":
    cli(main)
