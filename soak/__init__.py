"""Proof that runs survive: trainings that are killed, whose disk fails, that read damaged files, and that go on for long.

    python -m soak                  # all parts, into results/reliability.json; `make soak`
    python -m soak --parts kills    # one of kills, faults, fuzz and long_run
"""

import os

# Trainings are forks of this process, which may have no threads of its own, and repeat bit for bit with one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("MGD_OPS", "torch")
