"""Steps whose loss or gradients are not finite."""

import json
import math

import pytest
import torch
from conftest import AVERAGED, TINY, distill_args, errors, log, refuse_constant
from torch.utils._python_dispatch import TorchDispatchMode

import batches
import datasets
import distill
import evaluate
import run_folder
import train_teacher
from finite_steps import FiniteSteps

NOW = ["--sup-only", "0", "--ramp-up", "0"]
METHODS = {
    "sup": (train_teacher, ["--method", "sup"]),
    "cps": (train_teacher, ["--method", "cps", *NOW]),
    "mt": (train_teacher, ["--method", "mt", *NOW]),
    "mgd": (distill, []),
    "mgd+": (distill, ["--method", "mgd+", "--lambda-relative", "0.3", *AVERAGED]),
}


def network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)


def step(net, optimizer, guard, images=None, loss_factor=1.0, gradient_factor=1.0):
    optimizer.zero_grad()
    guard.begin()
    loss = net(torch.randn(2, 3, 5, 5) if images is None else images).square().mean()
    loss.backward()
    for parameter in net.parameters():
        parameter.grad *= gradient_factor
    guard.check({"sup": loss.detach() * loss_factor})
    optimizer.step()


def state(net, optimizer):
    momentum = [optimizer.state[parameter]["momentum_buffer"] for parameter in net.parameters()]
    return [tensor.clone() for tensor in (*net.state_dict().values(), *momentum)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "bad",
    [
        {"images": torch.full((2, 3, 5, 5), math.nan)},
        {"loss_factor": math.nan},
        {"loss_factor": math.inf},
        {"gradient_factor": math.nan},
        {"gradient_factor": -math.inf},
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(bad, first):
    net, optimizer = network()
    guard = FiniteSteps([net], [optimizer])
    if not first:
        step(net, optimizer, guard)
    before = state(net, optimizer)
    step(net, optimizer, guard, **bad)
    assert guard.skipped == 1 and same(before, state(net, optimizer))
    step(net, optimizer, guard)
    assert guard.skipped == 0 and not any(torch.equal(*pair) for pair in zip(before, state(net, optimizer), strict=True))


def test_finite_steps_are_those_of_the_optimizer_alone():
    states = []
    for guarded in (True, False):
        net, optimizer = network()
        guard = FiniteSteps([net], [optimizer]) if guarded else None
        for _ in range(3):
            if guard:
                step(net, optimizer, guard)
            else:
                optimizer.zero_grad()
                net(torch.randn(2, 3, 5, 5)).square().mean().backward()
                optimizer.step()
        states.append(state(net, optimizer))
    assert same(*states)


def test_no_network_makes_a_step_that_another_cannot_make():
    (a, first), (b, second) = network(), network()
    guard = FiniteSteps([a, b], [first, second])
    before = state(a, first), state(b, second)
    guard.begin()
    loss = a(torch.randn(2, 3, 5, 5)).square().mean() + b(torch.randn(2, 3, 5, 5)).square().mean()
    loss.backward()
    b[0].weight.grad[0] = math.inf
    guard.check({"cps": loss.detach()})
    first.step(), second.step()
    assert same(before[0], state(a, first)) and same(before[1], state(b, second))


class NothingIsRead(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("full_decay", [0.3, 0.99])
def test_the_moving_average_with_a_warm_up_is_its_closed_form(full_decay):
    """Σ_s w_s (1 - d_s) Π_{r > s} d_r over the steps that were made, with d_0 = 0; its buffers too."""
    net, optimizer = network()
    guard = FiniteSteps([net], [optimizer])
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=guard.moving_average(full_decay, True), use_buffers=True)
    made = {}
    for t in range(8):
        before = [value.clone() for value in average.module.state_dict().values()]
        step(net, optimizer, guard, loss_factor=math.nan if t in (0, 5) else 1.0)
        average.update_parameters(net)
        if guard.skipped:
            assert same(before, average.module.state_dict().values())
        if t == 0 or not guard.skipped:
            made[t] = {key: value.double().clone() for key, value in net.state_dict().items()}
    decay = {t: min(full_decay, (1 + t) / (10 + t)) if t else 0.0 for t in made}
    weight = {s: (1 - decay[s]) * math.prod(decay[r] for r in made if r > s) for s in made}
    assert sum(weight.values()) == pytest.approx(1)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), sum(weight[s] * made[s][key] for s in made), rtol=1e-5, atol=1e-7)


def test_nothing_is_read_on_the_host():
    net, optimizer = network()
    guard = FiniteSteps([net], [optimizer])
    with NothingIsRead():
        for factor in (1.0, math.nan):
            step(net, optimizer, guard, loss_factor=factor)
        average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=guard.moving_average(0.9), use_buffers=True)
    with pytest.raises(AssertionError), NothingIsRead():
        float(guard.skipped)
    average.update_parameters(net)  # whose counter is on the host


def test_the_average_stands_still_in_a_skipped_step_and_is_torchs_own_otherwise():
    net, optimizer = network()
    guard = FiniteSteps([net], [optimizer])
    swa = torch.optim.swa_utils
    ours = swa.AveragedModel(net, multi_avg_fn=guard.moving_average(0.9), use_buffers=True)
    theirs = swa.AveragedModel(net, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        step(net, optimizer, guard)
        ours.update_parameters(net), theirs.update_parameters(net)
    before = [tensor.clone() for tensor in ours.module.state_dict().values()]
    assert same(before, theirs.module.state_dict().values())
    step(net, optimizer, guard, loss_factor=math.nan)
    ours.update_parameters(net), theirs.update_parameters(net)
    assert same(before, ours.module.state_dict().values()) and not same(before, theirs.module.state_dict().values())


RANKS = """
import math, os, torch, common, finite_steps
rank = int(os.environ["RANK"])
common.init_distributed("cpu")
for case in ("loss", "images"):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    parallel = torch.nn.parallel.DistributedDataParallel(net)
    guard = finite_steps.FiniteSteps([net], [optimizer])
    guard.begin()
    loss = parallel(torch.full((2, 3, 5, 5), math.nan if rank and case == "images" else 1.0)).square().mean()
    loss.backward()
    means = guard.check({"sup": loss.detach() + (math.inf if rank and case == "loss" else 0)})
    optimizer.step()
    assert guard.skipped == 1 and not means["sup"].isfinite(), (case, rank)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items()), (case, rank)
print("all well")
"""


@pytest.mark.slow
def test_all_ranks_skip_the_step_that_one_cannot_make(start_ranks):
    for rank in start_ranks(RANKS):
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0 and "all well" in out, err


# ---- in a training ----


@pytest.fixture
def with_bad_steps(script, teachers, tmp_path, tiny_networks, monkeypatch):
    """Run a method with images of NaN in the last micro-batch of some steps: (what `script` returns, the checkpoint after each
    step, the names of the images that each step read)."""

    def train(method, bad, *more):
        module, options = METHODS[method]
        checkpoints, read = [], []
        original, image = module.step_batches, datasets.Shapes.image

        def step_batches(args, step, *rest):
            read.append([])
            made = original(args, step, *rest)
            if step in bad:
                made[-1] = made[-1]._replace(images=made[-1].images * math.nan)
            return made

        def noted(self, name):
            if read:
                read[-1].append(name)
            return image(self, name)

        def save(path, checkpoint):
            if path.name == "resume.pt":
                keys = ("model", "second", "relative", "optimizers", "step")
                checkpoints.append(leaves({key: checkpoint[key] for key in keys if key in checkpoint}))
            run_folder.save_checkpoint(path, checkpoint)

        monkeypatch.setattr(module, "step_batches", step_batches)
        monkeypatch.setattr(module, "save_checkpoint", save)
        monkeypatch.setattr(datasets.Shapes, "image", noted)
        monkeypatch.setattr(evaluate, "validate", lambda *args: 0.0)
        arguments = distill_args(tmp_path / "x", teachers) if module is distill else ["--out", tmp_path / "x", *TINY]
        return script(module, *arguments, *options, "--save-every", "1", *more), checkpoints, read

    return train


def leaves(value):
    """A copy of the tensors in dicts and lists, by their path."""
    if isinstance(value, torch.Tensor):
        return {(): value.clone()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {(key, *rest): leaf for key, item in items for rest, leaf in leaves(item).items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_training_goes_on_as_if_the_step_had_not_been(with_bad_steps, tmp_path, method):
    """Weights, statistics, momentum and averages, with two micro-batches of which the second is bad."""
    options = ["--batch", "4", "--grad-accum", "2", "--steps", "5", "--log-every", "5", "--val-every", "0"]
    (code, out, err), checkpoints, read = with_bad_steps(method, (0, 2), *options)
    assert code == 0, err
    assert len(checkpoints) == 5 and all(value.isfinite().all() for value in checkpoints[0].values())
    assert all(not value.any() for key, value in checkpoints[0].items() if key[-1] == "momentum_buffer")
    assert checkpoints[1].keys() == checkpoints[2].keys() and len(checkpoints[1]) > 40
    assert all(torch.equal(value, checkpoints[2][key]) for key, value in checkpoints[1].items())
    moved = [key for key, value in checkpoints[2].items() if not torch.equal(value, checkpoints[3][key])]
    assert {key[0] for key in moved} == {key[0] for key in checkpoints[2]}
    skipped = [entry for entry in log(tmp_path / "x") if "skipped" in entry]
    assert [entry["step"] for entry in skipped] == [1, 3]
    assert skipped[0]["skipped"]["losses"]["sup"] is None
    assert sorted(skipped[1]["skipped"]["labeled"] + skipped[1]["skipped"].get("unlabeled", [])) == sorted(read[2])
    assert "were skipped" in out and "loss 'sup' was not finite" in out


def test_a_run_of_which_no_step_could_be_made_ends_without_a_network(with_bad_steps, tmp_path):
    (code, _, err), checkpoints, _ = with_bad_steps("sup", (0, 1, 2), "--steps", "3")
    assert code == 2 and "in 3 steps in a row, the last one step 3" in err and "lower --lr" in err
    assert len(checkpoints) == 2 and not (tmp_path / "x/last.pt").exists()


def test_more_than_max_skipped_in_a_row_end_the_run_with_the_last_good_checkpoint(with_bad_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "MAX_SKIPPED", 3)
    options = ["--steps", "9", "--log-every", "1"]
    (code, _, err), checkpoints, read = with_bad_steps("sup", (0, 1, 2, 4, 5, 6, 7), *options)
    assert code == 2 and len(err.strip().splitlines()) == 1 and len(checkpoints) == 7
    assert "in 4 steps in a row, the last one step 8" in err and "lower --lr than 0.02" in err and read[7][0] in err
    assert not (tmp_path / "x" / "last.pt").exists()
    kept = torch.load(tmp_path / "x" / "resume.pt", weights_only=True)
    assert kept["step"] == 7 and all(value.isfinite().all() for value in kept["model"].values())
    text = (tmp_path / "x" / "log.jsonl").read_text()
    entries = [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]
    assert [entry["step"] for entry in entries if "skipped" in entry] == [1, 2, 3, 5, 6, 7, 8]


def test_steps_in_a_row_are_counted_over_a_resume(script, tmp_path, with_bad_steps, monkeypatch):
    monkeypatch.setattr(run_folder, "MAX_SKIPPED", 3)
    monkeypatch.setattr(train_teacher, "poly_lr", interrupted := Interrupted(train_teacher.poly_lr, 4))
    (code, _, err), *_ = with_bad_steps("sup", range(2, 9), "--steps", "9", "--log-every", "1")
    assert code == 130, err
    interrupted.step = None
    module, options = METHODS["sup"]
    assert "the last one step 6;" in errors(
        script, module, "--out", tmp_path / "x", *TINY, *options, "--steps", "9", "--resume"
    )
    assert [entry["step"] for entry in log(tmp_path / "x") if "skipped" in entry] == [3, 4, 5, 6]


class Interrupted:
    def __init__(self, original, step):
        self.original, self.step = original, step

    def __call__(self, step, *rest):
        if step == self.step:
            raise KeyboardInterrupt
        return self.original(step, *rest)


def test_a_learning_rate_that_is_too_high_is_named(script, tmp_path, tiny_networks):
    options = ["--method", "sup", *TINY, "--steps", "40", "--log-every", "8", "--lr", "1e30"]
    err = errors(script, train_teacher, "--out", tmp_path / "x", *options)
    assert "loss 'sup' was not finite in 21 steps in a row" in err and "lower --lr than 1e+30" in err
    assert not (tmp_path / "x" / "last.pt").exists()


def test_images_of_a_step_are_those_of_all_micro_batches():
    args = type("Args", (), {"seed": 3, "batch": 4})
    partition = datasets.Partition("1/2", [f"l{i}" for i in range(9)], [f"u{i}" for i in range(9)], "hash")
    found = batches.images_of_step(args, partition, 5, 12)
    assert len(found["labeled"]) == 4 and len(found["unlabeled"]) == 8 and all(name[0] == "u" for name in found["unlabeled"])
    assert [*batches.images_of_step(args, partition, 5, 4)] == ["labeled"]
