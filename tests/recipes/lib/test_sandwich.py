"""The training step: what each option changes, and what the subnets learn from."""

import copy
import json

import pytest
import torch
from helpers.recipes import parse, parse_train, run_train, write_config
from helpers.teachers import save_teacher
from torch.nn import functional as F

from timm_autoslim.recipes.lib.models import make_supernet
from timm_autoslim.recipes.lib.processes import make_accelerator
from timm_autoslim.recipes.lib.sandwich import Sandwich
from timm_autoslim.training.dropout import disable_dropout


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    args = parse_train(tmp_path_factory.mktemp("options"), model_kwargs={"drop_rate": 0.5})
    torch.manual_seed(0)
    return make_supernet(args).train()


UPDATE = 7


def run_step(folder, supernet, *argv, teacher=None):
    """Run one step with these flags; return its losses, the step, and the images, which are always the same."""
    args = parse("train", write_config(folder), *argv)
    sandwich = Sandwich(make_accelerator(args), args, supernet.space, teacher=teacher, updates=10)
    torch.manual_seed(5)
    inputs, targets = torch.randn(8, 1, 16, 16), torch.randint(0, 10, (8,))
    losses = sandwich(supernet, inputs, targets, UPDATE, torch.Tensor.backward)
    supernet.zero_grad()
    flat = [torch.full((1,), float("nan")) if loss is None else loss.flatten() for loss in losses.values()]
    return torch.cat(flat).tolist(), sandwich, inputs


@pytest.fixture(scope="module")
def before(tmp_path_factory, supernet):
    """The losses of a step with the default options."""
    return run_step(tmp_path_factory.mktemp("before"), supernet)[0]


@pytest.mark.parametrize(
    ("flags", "differ"),
    [
        ("", []),
        ("--distill-temperature 1 --distill-loss kl --sampler independent --teach-widest 0", []),
        ("--sandwich-delay 0.7", []),  # 7 of 10 steps: over before update 7
        ("--sampler multiplier", [2, 3]),
        ("--distill-temperature 4", [1, 2, 3]),
        ("--distill-loss alpha", [1, 2, 3]),
        ("--distill-loss alpha --distill-temperature 4", [1, 2, 3]),
        ("--regularize-widest-only", [1, 2, 3]),
        ("--smoothing 0.3", [0]),
    ],
)
def test_an_option_changes_what_it_says_and_nothing_else(tmp_path, supernet, before, flags, differ):
    after, _, _ = run_step(tmp_path, supernet, *flags.split())
    assert [index for index in range(4) if before[index] != after[index]] == differ


def test_the_delay_trains_the_widest_alone(tmp_path, supernet, before):
    after, sandwich, inputs = run_step(tmp_path, supernet, "--sandwich-delay", "0.8")
    assert after[0] == before[0]
    targets = torch.zeros(8, dtype=torch.long)
    assert sandwich(supernet, inputs, targets, UPDATE, torch.Tensor.backward)["narrowest_loss"] is None
    assert sandwich(supernet, inputs, targets, 8, torch.Tensor.backward)["narrowest_loss"] > 0
    supernet.zero_grad()


def test_the_sampler_is_the_one_asked_for(tmp_path, supernet):
    def draw(*argv):
        _, sandwich, _ = run_step(tmp_path, supernet, *argv)
        return [widths for update in range(20) for widths in sandwich.sample_widths(update)]

    uniform = {supernet.space.uniform(share / 1000) for share in range(1, 1001)}
    assert draw("--sampler", "multiplier") == draw("--sampler", "multiplier")
    assert draw("--sampler", "multiplier") != draw("--sampler", "multiplier", "--seed", "3")
    assert set(draw("--sampler", "multiplier")) <= uniform
    assert not set(draw()) & uniform


def test_the_subnet_of_a_loss_is_described(tmp_path, supernet):
    losses, sandwich, inputs = run_step(tmp_path, supernet, "--regularize-widest-only", teacher=(teach := Fixed()))
    assert sandwich.describe("narrowest_loss", 0, UPDATE) == "the narrowest subnet"
    for index in (0, 1):
        before, widths = sandwich.describe("random_loss", index, UPDATE).split("widths ")
        assert before == "the random subnet with the "
        with torch.no_grad(), disable_dropout(supernet):
            outputs = supernet(inputs, supernet.space.from_dict(json.loads(widths)))
        assert F.cross_entropy(outputs, teach(inputs).softmax(1)).item() == pytest.approx(losses[2 + index], rel=1e-5)


def train_one_update(folder, name, monkeypatch, *argv):
    """Train for one update; return its gradients, and those that labels alone and that distillation would give."""
    notes, original = [], Sandwich.__call__

    def note(self, network, inputs, targets, update, backward):
        supernet, space = network, self.space
        subnets = [space.max(), space.min(), *self.sample_widths(update)]
        state = copy.deepcopy(supernet.state_dict())
        with torch.no_grad():
            soft = self.teacher(inputs) if self.teacher else supernet(inputs)
        probabilities = (soft / self.args.distill_temperature).softmax(1)

        def gradients(distilled):
            for index, widths in enumerate(subnets):
                outputs = supernet(inputs, widths)
                if index and distilled:
                    scaled = outputs / self.args.distill_temperature
                    loss = F.cross_entropy(scaled, probabilities) * self.args.distill_temperature**2
                else:
                    loss = self.loss_fn(outputs, targets)
                loss.backward()
            return collect_gradients(supernet)

        expected = [gradients(False), gradients(True)]
        supernet.load_state_dict(state)  # running statistics
        losses = original(self, network, inputs, targets, update, backward)
        notes.append([collect_gradients(supernet), *expected])
        return losses

    monkeypatch.setattr(Sandwich, "__call__", note)
    run_train(folder, name, *argv, limit_train=64, batch_size=32, val_widths=[], calibration_images=32)
    return notes[0]


def collect_gradients(supernet):
    flat = torch.cat([parameter.grad.flatten() for parameter in supernet.parameters()])
    supernet.zero_grad()
    return flat


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--distill-temperature", "3"), marks=pytest.mark.slow), ("--teacher", "outside")]
)
def test_a_training_is_distilled(tmp_path, monkeypatch, flags):
    if "--teacher" in flags:
        save_teacher(tmp_path / "outside")
        flags = ("--teacher", str(tmp_path / "outside"))
    actual, labels, formula = train_one_update(tmp_path, "run", monkeypatch, *flags)
    torch.testing.assert_close(actual, formula, atol=1e-5, rtol=1e-4)
    assert (actual - labels).norm() > 0.1 * labels.norm()  # the same step by the labels alone


class Fixed(torch.nn.Module):
    """A teacher whose logits depend on the images' mean alone."""

    def forward(self, inputs):
        return inputs.mean((1, 2, 3))[:, None] * torch.arange(10.0)


def test_another_model_teaches_all_but_the_widest(tmp_path, supernet):
    ema = copy.deepcopy(supernet.model).eval()
    before, _, _ = run_step(tmp_path, supernet, "--regularize-widest-only")
    after, _, inputs = run_step(tmp_path, supernet, "--regularize-widest-only", teacher=ema)
    assert [index for index in range(4) if before[index] != after[index]] == [1, 2, 3]
    with torch.no_grad(), disable_dropout(supernet):
        outputs = supernet(inputs, supernet.space.min())
        assert after[1] == pytest.approx(F.cross_entropy(outputs, ema(inputs).softmax(1)).item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in ema.parameters())
