"""Stop a training after the step that it is in, when a signal asks for it.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which cluster schedulers send, ask for a stop. The training finishes its step, writes a
checkpoint and exits with EXIT_CODE; the same command with --resume continues it. Signals within SAME_REQUEST seconds of the
first one count as one, since a terminal and torchrun both deliver it. A later one ends the process at once.
"""

import contextlib
import datetime
import os
import signal
import sys
import time

import torch

from common import RANK_TIMEOUT, print0, rank_and_size

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command will succeed
SAME_REQUEST = 2.0  # seconds


class StopSignals:
    """Catches the signals from its creation on. Under torchrun, every rank creates one and calls `requested` after each
    step."""

    def __init__(self):
        self.first: float | None = None  # when the first signal came
        self.interruptible = False
        ranks = rank_and_size()[1]
        limit = datetime.timedelta(seconds=RANK_TIMEOUT)
        self.group = torch.distributed.new_group(backend="gloo", timeout=limit) if ranks > 1 else None  # waits for no GPU
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame):
        now = time.monotonic()
        if self.first is not None and now - self.first > SAME_REQUEST:
            os._exit(128 + number)
        if self.first is None:
            self.first = now
            # `print` may not run inside itself, and a signal can come in the middle of one
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this step; a second one stops at once\n".encode())
        if self.interruptible:
            self.exit()

    def requested(self) -> bool:
        """Whether any rank has received a signal. All ranks get the same answer, so they stop after the same step."""
        asked = torch.tensor(float(self.first is not None))
        if self.group is not None:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, self.group)
        return bool(asked)

    @contextlib.contextmanager
    def may_interrupt(self):
        """A block that a signal ends at once, such as a validation, which writes nothing and is repeated after a resume."""
        if self.first is not None:
            self.exit()
        self.interruptible = True
        try:
            yield
        finally:
            self.interruptible = False

    def exit(self):
        """End the process, so that whoever started it runs the same command again."""
        self.interruptible = False
        print0("stopped; the same command with --resume (or the same make command) continues from here")
        sys.exit(EXIT_CODE)
