"""Depthwise convolutions whose gradients are fast on a CPU in bfloat16.

In bfloat16, PyTorch (with oneDNN) takes many times as long for the gradient as for the convolution where there is a stride,
a dilation or a kernel of 5x5. Here the gradients are the same sums, written as convolutions of shapes that are fast.
"""

import torch
import torch.nn.functional as F
from torch import nn


class FastDepthwiseConv2d(nn.Conv2d):
    """An `nn.Conv2d` without a bias, with one group per channel, an odd square kernel and "same" padding."""

    def _conv_forward(self, images, weight, bias):
        if images.is_cpu and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            images, weight = images.to(dtype), weight.to(dtype)
        if images.dtype != torch.bfloat16:  # where PyTorch's gradients are as fast
            return super()._conv_forward(images, weight, bias)
        return Depthwise.apply(images, weight, self.stride[0], self.dilation[0])


class Depthwise(torch.autograd.Function):
    """images (B, C, H, W), weight (C, 1, k, k) of one floating dtype -> (B, C, ceil(H / stride), ceil(W / stride))."""

    @staticmethod
    def forward(ctx, images, weight, stride, dilation):
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return F.conv2d(images, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation, len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        images, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_images, of_weight = ctx.needs_input_grad[:2]
        return (
            gradient_of_images(grad, images, weight, ctx.stride, ctx.dilation) if of_images else None,
            gradient_of_weight(grad, images, weight, ctx.stride, ctx.dilation) if of_weight else None,
            None,
            None,
        )


def gradient_of_images(grad, images, weight, stride, dilation):
    """A convolution of the gradient with the flipped weights. With a stride it is PyTorch's in float32, which is fast."""
    padding = dilation * (weight.shape[-1] // 2)
    if stride == 1:
        return F.conv2d(grad, weight.flip(2, 3), None, 1, padding, dilation, len(weight))
    grad, weight = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in (grad, weight))
    shape_of = torch.empty_like(images, dtype=grad.dtype)
    return pytorch_gradient(grad, shape_of, weight, stride, padding, dilation, True).to(images.dtype)


def gradient_of_weight(grad, images, weight, stride, dilation):
    """A dilation is removed by cutting the images into their phases. A kernel larger than 3x3 is computed in pieces of 3x3."""
    k, padding = weight.shape[-1], dilation * (weight.shape[-1] // 2)
    cut = dilation > 1 and stride == 1
    if k == 3 and not cut:
        return pytorch_gradient(grad, images, weight, stride, padding, dilation, False)
    images = F.pad(images, (padding,) * 4)
    if cut:
        rows, columns = (-(-length // dilation) for length in grad.shape[2:])
        grad, images = phases(grad, dilation, rows, columns), phases(images, dilation, rows + k - 1, columns + k - 1)
        dilation = 1
    side = k if dilation > 1 else 3
    piece = weight[:, :, :side, :side].contiguous(memory_format=torch.channels_last)
    height, width = ((length - 1) * stride + dilation * (side - 1) + 1 for length in grad.shape[2:])
    result = torch.empty_like(weight)
    for i in range(0, k - side + 1, 2):  # two pieces of a 5x5 share its middle row, or column
        for j in range(0, k - side + 1, 2):
            seen = images[:, :, i : i + height, j : j + width].contiguous(memory_format=torch.channels_last)
            result[:, :, i : i + side, j : j + side] = pytorch_gradient(grad, seen, piece, stride, 0, dilation, False)
    return result


def phases(maps, dilation, rows, columns):
    """(B, C, H, W) -> (dilation² B, C, rows, columns): the maps of every `dilation`-th row and column, with zeros appended."""
    height, width = dilation * rows, dilation * columns
    maps = F.pad(maps, (0, width - maps.shape[3], 0, height - maps.shape[2])).permute(0, 2, 3, 1)
    cut = maps.reshape(len(maps), rows, dilation, columns, dilation, -1).permute(2, 4, 0, 1, 3, 5)
    return cut.reshape(-1, rows, columns, maps.shape[3]).permute(0, 3, 1, 2)


def pytorch_gradient(grad, images, weight, stride, padding, dilation, of_images: bool):
    """PyTorch's own gradient, of the images or of the weight."""
    wanted = [of_images, not of_images, False]
    stride, padding, dilation = ([value] * 2 for value in (stride, padding, dilation))
    both = torch.ops.aten.convolution_backward(
        grad, images, weight, None, stride, padding, dilation, False, [0, 0], len(weight), wanted
    )
    return both[0 if of_images else 1]


def speed_up(model: nn.Module, device: torch.device) -> nn.Module:
    """On a CPU, let the depthwise convolutions of `model` compute their gradients fast. Weights and outputs stay the same."""
    for module in model.modules() if device.type == "cpu" else ():
        if type(module) is nn.Conv2d and fits(module):
            module.__class__ = FastDepthwiseConv2d
    return model


def fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution can become a `FastDepthwiseConv2d`."""
    k, dilation, stride = conv.kernel_size[0], conv.dilation[0], conv.stride[0]
    expected = {"kernel_size": k, "dilation": dilation, "stride": stride, "padding": dilation * (k // 2)}
    return (
        1 < conv.groups == conv.in_channels == conv.out_channels
        and conv.bias is None
        and k % 2 == 1
        and conv.padding_mode == "zeros"
        and all(getattr(conv, name) == (value, value) for name, value in expected.items())
    )
