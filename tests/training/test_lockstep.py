"""Two models side by side, stopped layer by layer."""

import threading

import pytest
import torch
from torch import nn

from timm_autoslim.errors import ConfigError
from timm_autoslim.training.lockstep import Lockstep


def make_models():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval() for _ in range(2)]


def test_all_batches_stop_with_the_inputs_of_one_model_and_the_outputs_of_the_other():
    slim, original = make_models()
    batches = [torch.randn(64, 4), torch.randn(2, 4)]  # small ones are joined
    with Lockstep(
        slim, original, ["0", "2"], [], [1, 1], iter([*batches[0].split(4), batches[1]]), 1 << 20
    ) as lockstep:
        stops = [(name, inputs, outputs) for name, inputs, outputs in lockstep]
    assert [name for name, _, _ in stops] == ["0", "2"]
    for (_, inputs, outputs), ours, theirs in zip(stops, (slim[:0], slim[:2]), (original[:1], original), strict=True):
        for x, y, batch in zip(inputs, outputs, batches, strict=True):
            assert torch.equal(x, ours(batch))
            assert torch.equal(y, theirs(batch))
    assert lockstep.images == 66


def test_what_changes_at_a_stop_is_used_from_there_on_by_later_batches_too():
    slim, original = make_models()
    batches = [torch.randn(1, 4) for _ in range(3)]
    sizes = [1 << 18, 1]  # one image at first, all of them later
    with torch.no_grad(), Lockstep(slim, original, ["0", "2"], [], sizes, iter(batches), 6 << 18) as lockstep:
        for name, inputs, _ in lockstep:
            if name == "0":
                assert len(inputs) == 1
                assert all(module.weight is slim[0].weight for module in lockstep.list_modules("0"))
                slim[0].weight.zero_()
                slim[0].bias.fill_(2.0)
            else:
                assert len(inputs) == 3
                assert all(torch.equal(x, torch.full_like(x, 2.0)) for x in inputs)


def test_at_the_end_no_thread_and_no_hook_is_left():
    slim, original = make_models()
    threads = threading.active_count()
    with Lockstep(slim, original, ["0", "2"], [], [1, 1], iter([torch.randn(3, 4)]), 1 << 20) as lockstep:
        next(iter(lockstep))
        assert threading.active_count() > threads
    assert threading.active_count() == threads
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (slim, original) for m in model.modules())


def test_an_error_in_a_run_is_raised_and_paths_that_part_are_refused():
    slim, original = make_models()
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        Lockstep(slim, original, ["0"], [], [1], iter([torch.randn(3, 5)]), 1 << 20) as lockstep,
    ):
        list(lockstep)

    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    model, batches = Parting(), [torch.ones(64, 4), -torch.ones(64, 4)]
    with (
        pytest.raises(ConfigError, match=r"^the models: got runs that do not come to the same layers"),
        Lockstep(model, model, [], ["a", "b"], [1, 1], iter(batches), 1 << 20) as lockstep,
    ):
        list(lockstep)
