"""The gradients of depthwise convolutions are PyTorch's, for all shapes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import depthwise
import models
from common import autocast

CPU = torch.device("cpu")


def gradients(convolution, images, weight, grad):
    images, weight = images.clone(memory_format=torch.channels_last).requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(convolution(images, weight), [images, weight], grad)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride,dilation", [(1, 1), (2, 1), (1, 2), (1, 6), (2, 2)])
@pytest.mark.parametrize("size", [(9, 12), (13, 7)])
def test_gradients_are_those_of_pytorch(dtype, tolerance, kernel, stride, dilation, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, kernel, stride, dilation * (kernel // 2), dilation, groups=6, bias=False).to(dtype)
    images, weight = torch.randn(2, 6, *size, dtype=dtype), conv.weight.detach()
    output = conv(images)
    grad = torch.randn_like(output)

    def theirs(images, weight):
        return F.conv2d(images, weight, None, stride, conv.padding, dilation, 6)

    def ours(images, weight):
        return depthwise.Depthwise.apply(images, weight, stride, dilation)

    expected = gradients(theirs, images.double(), weight.double(), grad.double())
    for mine, true in zip(gradients(ours, images, weight, grad), expected, strict=True):
        assert mine.dtype == dtype and (mine - true).abs().max() <= tolerance * true.abs().max()
    assert torch.equal(depthwise.speed_up(conv, CPU)(images), output)
    assert type(conv) is depthwise.FastDepthwiseConv2d


@pytest.mark.parametrize("name", ["mbv2", "el0"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_train_as_before(name, precision):
    """Outputs, gradients and copies of a whole network, whose weights keep their names."""
    torch.manual_seed(0)
    plain = models.build_model(name, 3, head_width=16, separable_head=True).train()
    fast = depthwise.speed_up(copy.deepcopy(plain), CPU)
    fast = copy.deepcopy(fast)  # as for the moving average
    fast.load_state_dict(plain.state_dict())
    kinds = [type(module) for module in fast.modules()]
    assert kinds.count(depthwise.FastDepthwiseConv2d) >= 20
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    for network in (plain, fast):
        with autocast(CPU, precision):
            network.logits = network(images).logits
        network.logits.square().mean().backward()
    assert torch.equal(plain.logits, fast.logits)
    theirs, ours = (torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (plain, fast))
    assert (ours - theirs).norm() <= (0 if precision == "fp32" else 3e-2) * theirs.norm()


def test_other_convolutions_stay():
    """Those on other devices, with several channels per group, with a bias, and of other shapes."""
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    assert type(depthwise.speed_up(conv, torch.device("cuda"))) is nn.Conv2d
    fits = {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 6, "bias": False}
    others = [
        {"groups": 1},
        {"groups": 3},
        {"out_channels": 12},
        {"bias": True},
        {"padding": 0},
        {"kernel_size": 4, "padding": 2},
        {"kernel_size": (3, 5), "padding": (1, 2)},
        {"padding_mode": "reflect"},
    ]
    for other in others:
        conv = nn.Conv2d(**{**fits, **other})
        assert type(depthwise.speed_up(conv, CPU)) is nn.Conv2d
