"""A training script with a tiny network and eight validation images, so that a training of 24 steps takes a second.

python -m soak.small train_teacher --out runs/x --method sup
"""

import importlib
import sys

import backbones
import common
import datasets
import models


class FewShapes(datasets.Shapes):
    """The embedded data set with eight val images."""

    def __init__(self):
        super().__init__(512, 8)


def tiny_backbone(name, weights="none", stem="standard"):
    """Four convolutions in place of any of torchvision's networks."""
    layer = backbones.conv_norm_relu
    low = models.nn.Sequential(layer(3, 16, 3, stride=2), layer(16, 16, 3, stride=2))
    high = models.nn.Sequential(layer(16, 32, 3, stride=2), layer(32, 32, 3, stride=2))
    return backbones.Backbone(low, high, low_channels=16, high_channels=32)


def install():
    """Replace the networks and the embedded data set of this process."""
    backbones.build_backbone = tiny_backbone
    datasets.Shapes = FewShapes


if __name__ == "__main__":
    install()
    script = sys.argv.pop(1)
    sys.argv[0] = f"{script}.py"
    common.cli(importlib.import_module(script).main)
