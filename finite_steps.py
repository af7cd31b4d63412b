"""Skip steps whose loss or gradients are not finite.

A skipped step leaves the weights, the momentum and batch norm's statistics as they were before it, on all ranks. Whether a step
is skipped is decided on the device and not read here, so that nothing waits; `run_folder.Progress` reads it for its next line.
"""

import torch

from common import mean_over_ranks


class FiniteSteps:
    """Guards the steps of `networks`, each with its fused SGD of `optimizers`: if one cannot make a step, none does."""

    def __init__(self, networks: list[torch.nn.Module], optimizers: list[torch.optim.Optimizer]):
        self.networks, self.optimizers = networks, optimizers
        buffers = [buffer for network in networks for buffer in network.buffers()]
        kinds = dict.fromkeys(buffer.dtype for buffer in buffers)  # statistics are floats, and counters integers
        self.buffers = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in kinds]
        self.before: list[torch.Tensor] = []
        self.skipped = torch.zeros((), device=next(networks[0].parameters()).device)  # 1 after a skipped step, else 0
        for optimizer in optimizers:  # a skipped first step would leave momentum that was never written
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def begin(self):
        """Before the first forward of a step: remember batch norm's statistics."""
        self.before = [torch.cat([buffer.flatten() for buffer in buffers]) for buffers in self.buffers]

    def check(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """After the last backward of a step: decide whether the optimizers make it, and put the statistics back if not.

        Returns the losses, scalars of this rank, as means over the ranks. A step is skipped if one of them is not finite on any
        rank, or if the norm of all gradients is not, as of gradients that overflow when they are squared.
        """
        gradients = [p.grad for network in self.networks for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        values = mean_over_ranks(torch.stack([torch.as_tensor(value).float() for value in (*losses.values(), norm)]))
        skip = ~values.isfinite().all()
        for buffers, before in zip(self.buffers, self.before, strict=True):
            kept = torch.where(skip, before, torch.cat([buffer.flatten() for buffer in buffers]))
            parts = kept.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
        self.skipped = skip.float()
        for optimizer in self.optimizers:
            optimizer.found_inf = self.skipped  # a fused step where this is 1 changes nothing
        return dict(zip(losses, values, strict=False))

    def moving_average(self, full_decay: float, warm_up: bool = False):
        """`multi_avg_fn` of an AveragedModel: as torch's `get_ema_multi_avg_fn`, but a skipped step does not move it.

        The average is w_0 after step 0, and d_t · average + (1 - d_t) · w_t after step t > 0, where w_t are the weights after
        it. d_t is `full_decay`, or with `warm_up` at most (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage: it
        then reaches back over a tenth of the steps so far, and forgets the first ones in a short training too.
        """

        @torch.no_grad()
        def update(averaged: list[torch.Tensor], current: list[torch.Tensor], steps: torch.Tensor):
            decay = ((1 + steps) / (10 + steps)).clamp(max=full_decay) if warm_up else full_decay
            if averaged[0].is_floating_point():
                torch._foreach_lerp_(averaged, current, [(1 - decay) * (1 - self.skipped)] * len(averaged))
            else:  # lerp takes no integers
                for mean, value in zip(averaged, current, strict=True):
                    moved = (mean * decay + value * (1 - decay)).to(mean.dtype)
                    mean.copy_(torch.where(self.skipped > 0, mean, moved))

        return update
