"""A network with which a training of some steps takes a second: the same DeepLabV3+ head on a backbone of four convolutions.

    import tiny; tiny.install()     # in this process, until `backbones.build_backbone` is put back

Tests that state how trainings behave use it in place of torchvision's networks, whatever backbone they name.
"""

from torch import nn

import backbones


def tiny_backbone(name, weights="none", stem="standard"):
    name = backbones.canonical_name(name)
    layer = backbones.conv_norm_relu
    low = nn.Sequential(layer(3, 16, 3, stride=2), layer(16, 16, 3, stride=2))
    high = nn.Sequential(layer(16, 32, 3, stride=2), layer(32, 32, 3, stride=2))
    return backbones.Backbone(low, high, low_channels=16, high_channels=32)


def install():
    backbones.build_backbone = tiny_backbone
