"""Held-out images in parts, scored by a loss or by the outputs of a trained model."""

import pytest
import timm
import torch
from helpers.searches import PRICES, held_out, make_supernet, width_of
from torch import nn
from torch.nn.functional import cross_entropy

from timm_autoslim import HeldOut, convert, soft_cross_entropy
from timm_autoslim.errors import ConfigError, DataError


def test_held_out_is_an_ordinary_evaluate_too():
    supernet = make_supernet()
    evaluate = held_out(supernet)
    whole = sum(PRICES[n] * 1.15 / w for n, w in width_of(supernet).items())
    assert evaluate(supernet) == pytest.approx(whole)
    with pytest.raises(DataError, match=r"HeldOut\(\): got no batches"):
        HeldOut([], lambda subnet, batch: 0.0)


def make_model(**settings):
    torch.manual_seed(0)
    return timm.create_model("resnet10t", channels=[8, 8, 16, 16], stem_width=8, **settings)


def test_the_score_by_outputs_is_the_distance_to_the_trained_model():
    model, images = make_model(num_classes=5).train(), torch.randn(2, 4, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate = HeldOut.by_outputs(model, list(images))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        logits = [model(batch) for batch in images]
        other = make_model(num_classes=5).requires_grad_(False).eval()
        other.fc.weight.mul_(0.5)
        expected = [soft_cross_entropy(other(batch), soft).item() for batch, soft in zip(images, logits, strict=True)]
        own = cross_entropy(logits[0], logits[0].softmax(1)).item()
        assert evaluate(other) == pytest.approx(sum(expected) / 2)
        assert evaluate.score(model, evaluate.batches[0]) == pytest.approx(own)
        assert own < expected[0]


def test_structured_outputs_and_several_inputs_are_scored_by_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model(num_classes=5)

        def forward(self, x, mask):
            return {"logits": self.body(x * mask), "more": [self.body(x)]}

    model, images = Pair().eval(), torch.randn(4, 3, 32, 32)
    parts = [(images, torch.ones(4, 1, 32, 32)), {"x": images, "mask": torch.ones(4, 1, 32, 32)}]
    evaluate = HeldOut.by_outputs(model, parts)
    supernet = convert(model, parts[0]).eval()
    with torch.no_grad(), supernet.at(supernet.space.max()):
        scores = [evaluate.score(supernet, part) for part in evaluate.batches]
        logits = model.body(images)
    assert scores == pytest.approx([cross_entropy(logits, logits.softmax(1)).item()] * 2)


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ([], DataError, "got no batches"),
        ([torch.zeros(2, 5, 32, 32)], DataError, r"batches\[0\]: got inputs \(2, 5, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32), DataError, "batches: got a"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_refused(inputs, error, text):
    with pytest.raises(error, match=text):
        HeldOut.by_outputs(make_model(num_classes=5), inputs)


def test_what_is_no_logits_is_refused():
    tokens = nn.Sequential(make_model(num_classes=0, global_pool=""), nn.Flatten(2))
    with pytest.raises(ConfigError, match=r"outputs: got no logits, and outputs .* of three dimensions any"):
        HeldOut.by_outputs(tokens, [torch.zeros(2, 3, 32, 32)])
    with pytest.raises(ConfigError, match="at least two classes: the softmax of one is always 1; give a loss"):
        HeldOut.by_outputs(make_model(num_classes=1), [torch.zeros(2, 3, 32, 32)])
