"""Proof that runs survive: trainings that are killed, whose disk fails, that read damaged files, and that go on for long.

Each part is a module with `cases(folder)`: {case: function that does the work below `folder` and returns a row's counts}, and
perhaps `quick(folder)`, a part of it that takes seconds. `python -m soak` runs them.
"""
