"""Memory that building may take is limited, and random numbers that a file replaces are not drawn."""

import pytest
import torch
from helpers.comparisons import same, state
from helpers.exported import CASES, image, load, slim
from helpers.marks import slow_but
from torch import nn

from timm_autoslim.artifact import limits
from timm_autoslim.artifact.bases import construct_base
from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.limits import AllocationGuard, MemoryLimit
from timm_autoslim.errors import ArtifactError


def test_long_lists_of_numbers_are_not_multiplied():
    """The product of a list that a base makes a tensor of has millions of digits, which would take minutes."""
    for number in (10**6, 1e6):
        numbers = [number] * 200_000
        size, has_tensor = limits._bound_elements([numbers, torch.zeros(3)])
        assert limits.ENDLESS <= size < limits.ENDLESS**2
        assert has_tensor
        with AllocationGuard(limits.MAX_ELEMENTS):
            assert torch.tensor(numbers, dtype=torch.float64).sum() == 2 * 10**11


def test_nothing_is_allocated_for_a_tensor_beyond_the_limit():
    guard = AllocationGuard(100)
    with guard:
        assert torch.zeros(10, 9).numel() == 90
        with pytest.raises(MemoryError):
            torch.zeros(10**12)
    with pytest.raises(MemoryError), AllocationGuard(2**40):
        [torch.zeros(1) for _ in range(limits.MAX_TENSORS + 1)]
    with AllocationGuard(2**40):  # a large argument of a small result
        assert torch.arange(10**9, 10**9 + 3).numel() == 3


@pytest.mark.slow
def test_arguments_make_a_base_large_only_as_far_as_its_name_does():
    limit = MemoryLimit("resnet10t")
    assert limit.call(construct_base, "resnet10t", num_classes=3).num_classes == 3
    message = r"spec 'base_args': got .*'channels'.*; needed: arguments that build at most 536,870,912 numbers in "
    with pytest.raises(ArtifactError, match=message):
        limit.call(construct_base, "resnet10t", channels=(10**5, 1, 1, 1))
    small = MemoryLimit("vit_huge_patch14_224", file_elements=1000)
    with pytest.raises(ArtifactError, match="at most 67,108,864 numbers beside weights of 1,000 in 20,000 tensors"):
        small.call(construct_base, "vit_huge_patch14_224")


@pytest.mark.slow
def test_a_base_that_is_large_by_itself_is_built(monkeypatch):
    monkeypatch.setattr(limits, "MAX_ELEMENTS", 2**20)
    assert MemoryLimit("resnet10t").call(construct_base, "resnet10t").num_classes == 1000


# ---- random numbers that the file replaces at once


@pytest.fixture
def empty_is_nan():
    """Memory that nobody filled holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("base", slow_but(["resnet10t"], CASES))
def test_none_are_drawn_for_a_model_as_it_was_exported(base, empty_is_nan, tmp_path):
    exported = slim(base)
    folder = export(exported, tmp_path / "out")
    before = torch.get_rng_state()
    model = load(folder)
    # timm 1.0.16 makes embeddings by `randn`, which leaves nothing unfilled
    assert base == "test_vit" or torch.equal(torch.get_rng_state(), before)
    assert same(state(exported), state(model))
    with torch.no_grad():
        assert torch.equal(exported(image(exported)), model(image(exported)))
    for change in (
        {"num_classes": 7},
        {"num_classes": 0},
        {"in_chans": 1},
        {"pretrained_cfg_overlay": {"crop_pct": 1}},
    ):
        other = load(folder, **change)
        assert not any(tensor.isnan().any() for tensor in state(other).values())
        assert not torch.equal(torch.get_rng_state(), before)


class Drawn(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        nn.init.trunc_normal_(self.weight)
        other = nn.Parameter(torch.empty(4))
        nn.init.normal_(other)
        if use == "hidden":
            self.other = [other]  # no state dict has it
        elif use == "used":
            torch.linalg.eigh(self.weight)  # refuses NaN


@pytest.mark.parametrize(("use", "filled"), [("", False), ("hidden", True), ("used", True)])
def test_what_needs_its_random_numbers_has_them(use, filled, empty_is_nan):
    model = MemoryLimit("resnet10t", 1).call_unfilled(Drawn, use)
    assert model.weight.isnan().any() == (not filled)
    assert not filled or not any(tensor.isnan().any() for tensor in [model.weight, *getattr(model, "other", ())])
    assert (model.weight.abs() <= 2).all() == filled
