"""The order "reconstruction": units that explain most of what the next layers put out come first."""

import numpy as np
import pytest
import timm
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.models import TwoGroups, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_autoslim import baseline, calibrate, convert, reconstruct, uniform_at
from timm_autoslim.errors import DataError, WidthError
from timm_autoslim.supernet.order import score_units
from timm_autoslim.supernet.selection import collect_moments


class Hidden(nn.Module):
    """Hidden units, read by one linear layer; or, with `second`, by two."""

    def __init__(self, hidden, second=False):
        super().__init__()
        self.first, self.last = nn.Linear(6, hidden), nn.Linear(hidden, 3)
        self.second = nn.Linear(hidden, 2) if second else None

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x) if self.second is None else torch.cat([self.last(x), self.second(x)], 1)


def explain(features, outputs, chosen):
    """Return the share of the outputs' variance that linear regression on these features explains."""
    x, y = features[:, chosen], outputs - outputs.mean(0)
    x = x - x.mean(0)
    solution = np.linalg.lstsq(x, y, rcond=1e-7)[0]
    return 1 - ((y - x @ solution) ** 2).sum() / (y**2).sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 8), st.booleans())
def test_every_unit_is_the_one_that_explains_most_of_what_is_left(seed, hidden, second):
    """By brute force: least squares on every set of one more unit, in float64."""
    torch.manual_seed(seed)
    model, inputs = Hidden(hidden, second).eval(), torch.randn(400, 6)
    graph = convert(model, inputs[:2]).graph
    (scores,) = score_units(model, graph, "reconstruction", batches=[inputs])
    order = np.argsort(-scores).tolist()
    features = model.first(inputs).relu().detach().double().numpy()
    layers = [model.last, *filter(None, [model.second])]
    weights = [layer.weight.detach().double().numpy() for layer in layers]
    for count in range(hidden):
        totals = {
            unit: sum(explain(features, features @ w.T, [*order[:count], unit]) for w in weights)
            for unit in order[count:]
        }
        best, taken = max(totals.values()), totals[order[count]]
        assert taken >= best - 2e-3 * max(1.0, best)  # the floor and float32 decide between near equals


def test_a_copy_of_a_unit_comes_after_all_that_say_something_new():
    torch.manual_seed(0)
    model, inputs = Hidden(8).eval(), torch.randn(500, 6)
    with torch.no_grad():
        model.first.weight[4:], model.first.bias[4:] = model.first.weight[:4], model.first.bias[:4]
        model.last.weight[:, :4] *= 3  # the copies are less important by magnitude, too
    supernet = convert(model, inputs[:2], order="reconstruction", batches=inputs.split(100))
    first = supernet.model.first.weight
    assert len({tuple(row.tolist()) for row in first[:4]}) == 4  # one of each pair, then the other
    slim = supernet.extract(supernet.space.from_dict({"first": 4}))
    reconstruct(slim, supernet, inputs.split(100))
    torch.testing.assert_close(slim(inputs), model(inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "kwargs", "size"), [
    ("resnet10t", {"channels": (16, 16, 32, 32), "stem_width": 8}, 32),
    pytest.param("densenet121", {"block_config": (1, 1, 1, 1), "growth_rate": 8}, 32, marks=pytest.mark.slow),
    ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}, 32),
    pytest.param("mobilenetv3_small_050", {}, 32, marks=pytest.mark.slow),
    pytest.param("test_convnext", {}, 64, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_model_computes_the_same_and_is_left_alone(name, kwargs, size):
    torch.manual_seed(0)
    model, images = timm.create_model(name, num_classes=10, **kwargs).eval(), torch.randn(8, 3, size, size)
    before = snapshot(model)
    supernet = convert(model, images[:1], order="reconstruction", batches=(part for part in images.split(4)))
    assert_same(snapshot(model), before)
    assert any(not torch.equal(tensor, model.state_dict()[key]) for key, tensor in supernet.model.state_dict().items())
    torch.testing.assert_close(supernet.model.eval()(images), model(images), rtol=1e-3, atol=1e-3)


def test_channels_of_one_unit_that_say_the_same_count_once():
    """Unit 0 is constant over the four positions, each of which is an input of the linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 5, bias=False)).eval()
    weight = torch.zeros(5, 8)
    weight[0, :4], weight[1:, 4:] = 0.25, torch.eye(4) * 0.5**0.5
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None])
        model[2].weight.copy_(weight)
    images = torch.randn(2000, 2, 2, 2)
    images[:, 0] = images[:, 0, :1, :1]
    (scores,) = score_units(model, convert(model, images[:2], min=1).graph, "reconstruction", batches=[images])
    assert scores[1] > scores[0]  # unit 1 alone leaves a third of the outputs, unit 0 alone two thirds


def test_layers_of_very_many_inputs_are_not_recorded(monkeypatch):
    monkeypatch.setattr("timm_autoslim.supernet.selection.MOST_CHANNELS", 7)
    model, inputs = Hidden(8).eval(), torch.randn(50, 6)
    assert list(collect_moments(model, [inputs])) == ["first"]
    supernet = convert(model, inputs[:2], order="reconstruction", batches=[inputs])  # by magnitude then
    torch.testing.assert_close(supernet(inputs), model(inputs))


def test_it_needs_batches_of_finite_images():
    model, images = randomise(TwoGroups()).eval(), torch.randn(4, 3, 8, 8)
    with pytest.raises(WidthError, match="batches: got None"):
        convert(model, images, order="reconstruction")
    with pytest.raises(DataError, match="none"):
        convert(model, images, order="reconstruction", batches=iter(()))
    with pytest.raises(DataError, match="not finite"):
        convert(model, images, order="reconstruction", batches=[images / 0])
    with pytest.raises(DataError, match="a Tensor"):
        convert(model, images, order="reconstruction", batches=images)
    supernet = convert(model, images)
    with pytest.raises(WidthError, match="choose another criterion"):
        baseline(supernet, {"macs": "60%"}, lambda subnet: 0.0, "importance", criterion="reconstruction")


def test_covariances_are_those_of_the_inputs():
    torch.manual_seed(0)
    model, images = randomise(TwoGroups()).eval(), torch.randn(40, 3, 8, 8) + 100
    stem = collect_moments(model, images.split(16))["stem"]
    rows = images.movedim(1, -1).reshape(-1, 3).double()
    assert stem.count == len(rows)
    torch.testing.assert_close(stem.x[0], rows.mean(0))
    torch.testing.assert_close(stem.xx[0], torch.cov(rows.T, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(4, 2), nn.Conv1d(4, 2, 1), nn.Conv2d(4, 2, 1)])
def test_an_example_without_a_batch_has_its_channels_where_its_layer_has_them(layer):
    torch.manual_seed(0)
    inputs = torch.randn(4, *range(5, 5 + len(getattr(layer, "kernel_size", ()))))
    (moments,) = collect_moments(nn.Sequential(layer), [inputs]).values()
    torch.testing.assert_close(moments.x[0], inputs.reshape(4, -1).mean(1).double())


@pytest.mark.slow
def test_slim_models_of_a_trained_model_are_better_than_by_magnitude():
    """Digits: three seeds, each cut to a third of the MACs and reconstructed; nothing is trained afterwards."""
    from timm_autoslim.recipes.benchmarks.reconstruction import DIGITS, measure_top1, split_digits, train

    gains = []
    for seed in range(3):
        torch.manual_seed(seed)
        model, (training, testing) = DIGITS["resnet"](), split_digits(seed)
        train(model, training, 6, seed)
        batches, top1 = torch.split(training[0], 200), {}
        for order in ("l1", "reconstruction"):
            supernet = convert(model.eval(), training[0][:2], order=order, batches=batches).eval()
            slim = supernet.extract(uniform_at(supernet, "macs", "30%"))
            calibrate(slim, batches)
            reconstruct(slim, supernet, batches)
            top1[order] = measure_top1(slim, testing)
        gains.append(top1["reconstruction"] - top1["l1"])
    assert np.mean(gains) > 0, gains


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs_give_the_order_of_one(form):
    class Halves(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, left, right):
            return {"logits": self.model(torch.cat([left, right], 1))}

    torch.manual_seed(0)
    model, inputs = Hidden(8, second=True).eval(), torch.randn(100, 6)
    one = convert(model, inputs[:1], order="reconstruction", batches=inputs.split(50))
    halves = [part.split(3, dim=1) for part in inputs.split(50)]
    batches = halves if form == "tuple" else [{"left": left, "right": right} for left, right in halves]
    two = convert(Halves(model), batches[0], order="reconstruction", batches=batches)
    assert torch.equal(two.model.model.first.weight, one.model.first.weight)
    with pytest.raises(DataError, match=r"^batches\[0\]: got a (tuple|dict); needed: inputs of the model's forward"):
        convert(
            Halves(model), batches[0], order="reconstruction", batches=[(inputs,) if form == "tuple" else {"x": inputs}]
        )
