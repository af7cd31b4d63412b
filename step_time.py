"""How long a training will take, measured before its first step."""

import argparse
import contextlib
import copy
import statistics
import time
from typing import NamedTuple

import torch

import mgd_ops
from batches import micro_batches
from common import autocast, print0

FEWEST_STEPS = 100  # shorter trainings are over soon, and measuring takes as long as two steps
REPEATS = 3


class Pass(NamedTuple):
    """What each step from `first` on does with a network, up to step `end`, or to the last one."""

    network: torch.nn.Module
    images: int  # per step on this rank
    backward: bool = True  # or a forward for pseudo labels alone
    first: int = 0
    end: int | None = None


def print_duration(args: argparse.Namespace, device: torch.device, start: int, passes: list[Pass]):
    """Print how long the steps from `start` on will take. With --compile it is not known before the networks are compiled."""
    if args.steps - start < FEWEST_STEPS or args.compile:
        return
    seconds = {}
    for network, _, backward, *_ in passes:
        if (id(network), backward) not in seconds:
            seconds[id(network), backward] = seconds_per_image(network, args, device, backward)
    total = sum(
        seconds[id(each.network), each.backward]
        * each.images
        * max(0, (args.steps if each.end is None else each.end) - max(start, each.first))
        for each in passes
    )
    left = f"the {args.steps - start} steps that are left" if start else f"{args.steps} steps"
    print0(f"{args.out}: about {readable(total)} for {left}, if nothing waits for data; validation comes on top")


def seconds_per_image(network: torch.nn.Module, args: argparse.Namespace, device: torch.device, backward: bool) -> float:
    """Of a micro-batch of noise: the median of three. Neither the network nor the random state changes."""
    size = micro_batches(args)[1]
    images = torch.randn(size, 3, *args.crop, generator=torch.Generator().manual_seed(0))
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(size, *args.crop, dtype=torch.int64, device=device)
    if network.training:  # a forward moves the statistics of batch norm
        network = copy.deepcopy(network)
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        with contextlib.nullcontext() if backward else torch.no_grad(), autocast(device, args.precision):
            logits = network(images).logits
        if backward:
            loss = mgd_ops.pixel_cross_entropy(logits, labels)
            loss.backward()
        else:
            loss = mgd_ops.upsampled_argmax(logits, args.crop).sum()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - began)
    return statistics.median(times) / size


def readable(seconds: float) -> str:
    """As `5 min`, `2 h 10 min` or `3 days 4 h`."""
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} days {hours % 24} h"
