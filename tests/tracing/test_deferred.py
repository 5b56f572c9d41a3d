"""Operators that run when their result is read: once, on the CPU, and before their inputs are written to."""

import torch

from timm_autoslim.tracing.deferred import DeferredCall, Value, copy_later, fill_later, get_later, make_tensor

aten = torch.ops.aten


def test_an_operator_runs_once_and_when_its_result_is_read():
    runs = []

    def compute():
        runs.append(1)
        return torch.tensor([1.0, 4.0])

    value = Value(compute)
    call = DeferredCall(aten.sqrt.default, (value,), {}, 0)
    assert not runs
    assert [call.get_result(0).tolist() for _ in range(2)] == [[1.0, 2.0]] * 2
    assert len(runs) == 1
    assert call.get_result(1) is None


def test_results_know_the_tensors_that_they_follow_from():
    tensor = torch.empty(2, device="meta")
    root = Value(copy_later(torch.ones(2), torch.float64), root=tensor)
    call = DeferredCall(aten.add.Tensor, (root, Value(fill_later((2,), True))), {}, 0)
    result = Value(get_later(call, 0), inputs=call.inputs)
    assert result.evaluate().tolist() == [2.0, 2.0]
    assert result.evaluate().dtype == torch.float64
    assert [root is tensor for root in result.list_roots()] == [True]


def test_what_follows_from_an_unknown_value_is_unknown():
    value = Value(fill_later((2,), False))
    call = DeferredCall(aten.logical_not.default, (value,), {}, 0)
    value.memory.unknown = True
    assert call.get_result(0) is None
    assert make_tensor(["text"], torch.float32) is None


def test_empty_tensors_are_zeros_and_random_ones_have_a_seed():
    empty = DeferredCall(aten.empty.memory_format, ([3],), {"device": torch.device("meta")}, 0)
    assert empty.get_result(0).tolist() == [0.0] * 3
    before = torch.get_rng_state()
    one, other, third = (DeferredCall(aten.rand.default, ([3],), {}, seed).get_result(0) for seed in (1, 1, 2))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(before, torch.get_rng_state())
