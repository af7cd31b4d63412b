"""TensorBoard's view of a training: OUT/tensorboard, written from the entries of the log, with panels of some val images.

pip install tensorboard
python train_teacher.py --method sup --out runs/shapes/1-8/sup-r18 --tensorboard
"""

import argparse
import pathlib
import tempfile

import numpy as np
import torch
from PIL import Image

import inference
from common import UserError, rank_and_size
from run_folder import check_folder

PANELS = 4  # val images, evenly spread
TAGS = {"miou": "val/miou", "lr": "lr", "images_per_s": "speed/images_per_s", "data_wait": "speed/data_wait"}


def check_tensorboard(args: argparse.Namespace):
    """Raises UserError where --tensorboard is given and its package is missing."""
    if args.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(f"--tensorboard: needs its package ({error}); pip install tensorboard") from None


class Events:
    """Writes a run's curves and panels, with --tensorboard and on the first rank; otherwise its methods do nothing."""

    def __init__(self, args: argparse.Namespace, dataset, device: torch.device, start: int):
        self.args, self.dataset, self.device, self.writer = args, dataset, device, None
        self.names = dataset.val[:: max(1, len(dataset.val) // PANELS)][:PANELS]
        if args.tensorboard and rank_and_size()[0] == 0:
            from torch.utils.tensorboard import SummaryWriter

            folder = args.out / "tensorboard"
            check_folder("--tensorboard", folder)
            # what an earlier run logged at and after the checkpoint that this one continues is hidden, since it comes again
            self.writer = SummaryWriter(str(folder), purge_step=start)

    def entry(self, entry: dict):
        """Add one entry of the log: its `step`, and numbers by name."""
        if self.writer is None:
            return
        for name, value in entry.items():
            if name not in ("step", "skipped"):
                group = "gradient_norm" if name.startswith("grad_") else "weight" if name.startswith("lambda_") else "loss"
                self.writer.add_scalar(TAGS.get(name, f"{group}/{name.removeprefix('grad_')}"), value, entry["step"])
        self.writer.flush()  # an interrupted run then shows what its log holds

    def panels(self, step: int, model: torch.nn.Module):
        """Add a picture of the same few val images after `step` steps: image, ground truth, prediction."""
        if self.writer is None:
            return
        from pictures import draw_panels  # and matplotlib, which other trainings do not need

        was_training = model.training
        model.eval()
        protocol, images = inference.protocol_of(vars(self.args)), map(self.dataset.image, self.names)
        masks = [inference.predict(model, image, self.device, self.args.precision, protocol).cpu().numpy() for image in images]
        model.train(was_training)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "panels.png")
            draw_panels(path, self.dataset, self.names, [(f"step {step}", masks)])
            with Image.open(path) as file:
                self.writer.add_image("val", np.asarray(file.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self):
        if self.writer is not None:
            self.writer.close()
