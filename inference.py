"""How a network sees an image: the protocol of its evaluation, sliding windows, and the prediction of one image. The network is
one of PyTorch or an exported one."""

import copy
import math
import pathlib
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

import mgd_ops
import models
from batches import FILL, normalize
from common import UserError, autocast, pick_precision
from onnx_model import OnnxModel, is_exported
from recipes import WINDOW_HELP, window_size
from run_folder import load_network

STRIP_BYTES = 2**27  # of finished logits per strip; fewer bytes are one strip, more take more memory


class Protocol(NamedTuple):
    """How the network sees an image. A training validates with the protocol of its arguments. A checkpoint is evaluated with
    the same protocol, except for what the command line changes."""

    image_scale: float = 1.0  # factor on the size of all images
    window: tuple[int, int] | None = None  # (height, width) of sliding windows; None: the whole image at once
    scales: tuple[float, ...] = (1.0,)  # the mean over these sizes
    flip: bool = False  # and over the mirrored image


WHOLE = Protocol()


def protocol_of(args: dict) -> Protocol:
    """The protocol of a training's arguments."""
    return Protocol(args["image_scale"], tuple(args["window"]) if args.get("window") else None)


def starts(size: int, window: int) -> list[int]:
    """Where windows begin: two thirds of a window apart, the last one moved back to the border."""
    stride = math.ceil(window * 2 / 3)
    return [min(i * stride, size - window) for i in range(1 + max(0, -(-(size - window) // stride)))]


def window_strips(forward, rows, size: tuple[int, int], window: tuple[int, int] | None) -> Iterator[torch.Tensor]:
    """Logits (1, N, h, W), float32, of strips of an image of `size` (H, W), which together are its H rows from top to bottom:
    the mean over the sliding windows that see a pixel where `window` is given (the same classes as their sum has).

    rows(top, bottom) -> the pixels (1, 3, bottom - top, W), and forward(pixels of a window) -> their logits. Only rows that
    later windows see, and at most STRIP_BYTES of finished ones, are kept. Without a window there is one strip. An image smaller
    than a window is `padded`.
    """
    if window is None:
        yield forward(rows(0, size[0]))
        return
    (height, width), (h, w) = size, window
    tops, lefts = starts(max(height, h), h), starts(max(width, w), w)
    total, first = None, 0  # the sum of the logits from row `first` on
    for top, end in zip(tops, [*tops[1:], height], strict=True):  # later windows begin at row `end`
        x = padded(rows(top, min(top + h, height)), window)
        for left in lefts:
            logits = forward(x[..., left : left + w])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], 0, x.shape[-1])
            if total.shape[2] < top + h - first:
                total = F.pad(total, (0, 0, 0, top + h - first - total.shape[2]))
            total[..., top - first :, left : left + w] += logits
        if end == height or 4 * total[:, :, : end - first].numel() > STRIP_BYTES:
            count = seen_by(tops, h)[first:end, None] * seen_by(lefts, w)  # of the windows that see a pixel
            yield (total[:, :, : end - first] / count.to(total))[..., :width]
            total, first = total[:, :, end - first :].clone(), end


def padded(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """pixels (1, 3, H, W), with the mean colour at the right and lower border where they are smaller than `size`."""
    height, width = (max(sides) for sides in zip(pixels.shape[2:], size, strict=True))
    if (height, width) == pixels.shape[2:]:
        return pixels
    out = pixels.new_tensor(FILL).view(1, 3, 1, 1).repeat(1, 1, height, width)
    out[..., : pixels.shape[2], : pixels.shape[3]] = pixels
    return out


def seen_by(begins: list[int], side: int) -> torch.Tensor:
    """How many windows, which are `side` long and begin at `begins`, see each row (or column)."""
    count = torch.zeros(begins[-1] + side)
    for start in begins:
        count[start : start + side] += 1
    return count


def upsampled_strips(strips: Iterator[torch.Tensor], size: tuple[int, int], target: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Strips of logits of an image of `size`, as from `window_strips` -> strips (1, N, h, W) of the whole, upsampled to
    `target` (H, W).

    One strip of the whole image goes through `mgd_ops.upsample`. Otherwise the rows are interpolated with the same weights. The
    result is bit-equal for four classes or more on CPUs with fused multiply-add; elsewhere the last bit can differ.
    """
    if size == target:
        yield from strips
        return
    (height, _), (rows, width) = size, target
    kept, first, done = None, 0, 0  # coarse rows from row `first` on; output rows that are made
    for strip in strips:
        if strip.shape[2] == height:
            yield mgd_ops.upsample(strip, target)
            return
        strip = mgd_ops.upsample(strip, (strip.shape[2], width))
        kept = strip if kept is None else torch.cat([kept, strip], 2)
        # output row y lies at y (height - 1) / (rows - 1), rounded as PyTorch does, between the coarse rows above and below
        position = torch.arange(rows, dtype=torch.float32) * (torch.tensor(height - 1.0) / max(1, rows - 1))
        above = position.long().clamp(max=height - 1)
        below = (above + 1).clamp(max=height - 1)
        fraction = (position - above).clamp(0, 1)
        ready = int((below < first + kept.shape[2]).sum())
        block = max(1, STRIP_BYTES // 16 // (4 * strip.shape[1] * width))  # several tensors of this size are alive
        for top in range(done, ready, block):
            part = slice(top, min(top + block, ready))
            weight = fraction[part, None].to(kept.device)
            upper, lower = (kept[:, :, (index[part] - first).to(kept.device)] for index in (above, below))
            yield torch.addcmul(lower * weight, upper, 1 - weight)
        done, end = ready, first + kept.shape[2]
        keep = min(int(above[min(done, rows - 1)]), end)  # the next output row can lie below all that is there
        kept, first = kept[:, :, keep - first :].clone(), keep


@torch.inference_mode()
def predict(model, image: np.ndarray, device, precision: str, protocol: Protocol = WHOLE) -> torch.Tensor:
    """image (H, W, 3) uint8 -> (H, W) uint8 class indices on `device`. `model` maps normalized images to `models.Output`, in
    autocast where `precision` is bf16, or is an exported model, which sees the pixels.

    Logits are upsampled to the image's size; probabilities are averaged over several scales or mirrored images. With sliding
    windows, one scale and no mirroring, the image is predicted in strips, so the memory beside it grows only with its width.
    Otherwise logits or probabilities of the whole image are held.
    """
    if isinstance(model, OnnxModel) and model.output == "labels":  # `open_model` allows one view, the image itself
        return torch.from_numpy(model(image[None])[0]).to(device)
    size = image.shape[:2]
    labels = torch.empty(size, dtype=torch.uint8, device=device)
    total, views = None, len(protocol.scales) * (1 + protocol.flip)

    def forward(pixels):
        if isinstance(model, OnnxModel):
            return torch.from_numpy(model(pixels.permute(0, 2, 3, 1).numpy())).to(device)
        with autocast(device, precision):
            logits = model(normalize(pixels, device)).logits
        return mgd_ops.upsample(logits, pixels.shape[2:])

    for scale in protocol.scales:
        scaled = scaled_size(size, protocol.image_scale * scale)
        resized = image if scaled == size else resize(image, scaled)
        for mirrored in (False, True)[: 1 + protocol.flip]:

            def rows(top, bottom, resized=resized, mirrored=mirrored):
                pixels = to_pixels(resized[top:bottom])
                return pixels.flip(-1) if mirrored else pixels

            strips = window_strips(forward, rows, scaled, protocol.window)
            done = 0
            for strip in upsampled_strips((s.flip(-1) for s in strips) if mirrored else strips, scaled, size):
                part = slice(done, done + strip.shape[2])
                done = part.stop
                if views == 1:
                    labels[part] = strip[0].argmax(0)
                    continue
                if total is None:
                    total = strip.new_zeros(1, strip.shape[1], *size)
                total[:, :, part] += strip.softmax(1)
    return labels if total is None else total[0].argmax(0).to(torch.uint8)


def views(image: np.ndarray, protocol: Protocol) -> Iterator[np.ndarray]:
    """The images (1, h, w, 3) uint8 that a network gets to see of an image (H, W, 3) uint8: one per window, at the protocol's
    image scale, not mirrored."""
    pixels = to_pixels(resize(image, scaled_size(image.shape[:2], protocol.image_scale)))
    h, w = protocol.window or pixels.shape[2:]
    pixels = padded(pixels, (h, w))
    for top in starts(pixels.shape[2], h):
        for left in starts(pixels.shape[3], w):
            yield np.ascontiguousarray(pixels[:, :, top : top + h, left : left + w].permute(0, 2, 3, 1).numpy())


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def to_pixels(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> a copy (1, 3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (*size, 3) uint8, bilinear with antialiasing."""
    return v2.functional.resize(to_pixels(image), list(size), antialias=True)[0].permute(1, 2, 0).numpy()


# ---- size and memory ----


class PeakBytes(TorchDispatchMode):
    """Counts the most bytes that the tensors made under this mode hold at once; on the meta device nothing is computed."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size: int):
        self.held += size
        self.peak = max(self.peak, self.held)


def params_m(model) -> float:
    """Parameters of a network or an exported model, in M."""
    return model.metadata["params_m"] if isinstance(model, OnnxModel) else sum(p.numel() for p in model.parameters()) / 1e6


def bytes_per_pixel(model, precision: str) -> float:
    """Memory of one forward pass over a whole image, per pixel, counted on the meta device; an estimate on the low side. For
    an exported model it was counted when it was exported."""
    if isinstance(model, OnnxModel):
        return model.metadata["bytes_per_pixel"]
    side = 512
    meta = copy.deepcopy(model).to("meta")
    with torch.no_grad(), PeakBytes() as mode:
        meta(torch.empty(1, 3, side, side, device="meta"))
    return mode.peak / side**2 / (2 if precision == "bf16" else 1)


# ---- the command line ----


def load_trained(path: pathlib.Path) -> dict:
    """What a checkpoint or an exported model tells of its training: `args`, `classes`, `palette`, `row`. Raises UserError."""
    return OnnxModel(path).metadata if is_exported(path) else load_network(path)


def open_model(path: pathlib.Path, args, device) -> tuple[dict, models.DeepLabV3Plus | OnnxModel, str, Protocol]:
    """A checkpoint or an exported model: what it tells of its training, its network, its precision on `device`, and its
    protocol, as changed by --window, --tta-scales, --flip and --precision of the command line. Raises UserError."""
    if is_exported(path):
        model = OnnxModel(path)
        return model.metadata, model, model.metadata["precision"], protocol_of_exported(model, args)
    checkpoint = load_network(path)
    protocol = with_arguments(protocol_of(checkpoint["args"]), args)
    precision = pick_precision(args.precision or checkpoint["args"]["precision"], device)
    return checkpoint, models.model_from_checkpoint(checkpoint, path).to(device), precision, protocol


def with_arguments(protocol: Protocol, args) -> Protocol:
    """The protocol, changed by the command line."""
    window = protocol.window if args.window is None else args.window or None
    return protocol._replace(window=window, scales=tuple(args.scales), flip=args.flip)


def protocol_of_exported(model: OnnxModel, args) -> Protocol:
    """The protocol of an exported model, as changed by the command line. Raises UserError where it cannot follow."""
    path, size = model.path, model.size
    if args.precision:
        raise UserError(
            f"--precision {args.precision}: {path} is {model.metadata['precision']}, whatever is asked; leave it out"
        )
    if args.device and torch.device(args.device).type != "cpu":
        raise UserError(f"--device {args.device}: exported models such as {path} run on the CPU; leave it out, or give cpu")
    protocol = with_arguments(protocol_of(model.metadata), args)
    if size and protocol.window != size:
        given = "x".join(map(str, protocol.window)) if protocol.window else "whole"
        raise UserError(f"--window {given}: {path} takes {size[0]}x{size[1]} alone; leave it out, or export without --size")
    if model.output == "labels" and protocol not in (WHOLE, WHOLE._replace(window=size)):
        needs = (
            "--tta-scales and --flip average its logits"
            if args.flip or args.scales != [1.0]
            else "its image scale or its sliding windows need logits"
        )
        raise UserError(f"{path}: gives labels alone, but {needs}; use an export with --output logits")
    return protocol


def add_protocol_arguments(parser):
    """How a checkpoint or an exported model sees images, in evaluation and prediction."""
    parser.add_argument("--window", type=window_size, metavar="SIZE", help=f"{WINDOW_HELP} (default: as in training)")
    parser.add_argument(
        "--tta-scales",
        dest="scales",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="FACTOR",
        help="average over these image sizes (default: 1)",
    )
    parser.add_argument("--flip", action="store_true", help="average over mirrored images too (default: off)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="of autocast (default: as in training)")


def check_protocol_arguments(args):
    if not min(args.scales) > 0:
        raise UserError(f"--tta-scales {min(args.scales)}: must be above 0")
