"""How result files of the benchmarks are named."""

import torch


def device_slug(device: str) -> str:
    """What a benchmark's result file is named after: `cpu`, or the GPU, such as `h100-80gb-hbm3`."""
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ") if device == "cuda" else device
    return "-".join(name.lower().split())
