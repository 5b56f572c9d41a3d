"""One call from a trained model to a slim one."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from timm_autoslim import Budget, convert, cost, export, slim
from timm_autoslim.errors import BudgetError, ConfigError, DataError, EvaluationError

pytestmark = pytest.mark.filterwarnings("ignore:.*held-out images are few")


def make_model():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=10, channels=[8, 8, 16, 16], stem_width=8)


def make_batches(count=2, size=20):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def count_macs(model):
    return cost(convert(model, torch.zeros(1, 3, 32, 32))).macs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "share"),
    [("50%", 0.5), ({"macs": "60%"}, 0.6), ("macs<=55% and params<=60%", 0.55), ("macs=50%", 0.5), (["45%"], 0.45)],
)
def test_an_ordinary_model_within_the_budget_comes_back(budget, share, tmp_path):
    model, batches = make_model(), make_batches()
    before = copy.deepcopy(model.state_dict())
    smaller = slim(model, budget, batches, cross_entropy, progress=False, base_args={"num_classes": 10})
    assert type(smaller) is type(model)
    assert count_macs(smaller) <= share * count_macs(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for m in (model, smaller) for p in m.parameters())
    again = timm.create_model(f"local-dir:{export(smaller, tmp_path / 'slim')}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(batches[0][0]), smaller(batches[0][0]))


@pytest.mark.slow
def test_it_reproduces_the_model_better_than_its_bare_slices(monkeypatch):
    model, batches = make_model().eval(), make_batches(4)
    monkeypatch.setattr("timm_autoslim.slimming.slim.reconstruct", lambda *_, **__: None)
    bare = slim(model, "40%", batches, cross_entropy, progress=False)
    monkeypatch.undo()
    better = slim(model, "40%", batches, cross_entropy, progress=False)
    inputs = torch.cat([inputs for inputs, _ in batches])
    with torch.no_grad():
        errors = [(slimmer(inputs) - model(inputs)).norm() for slimmer in (better, bare)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.slow
def test_frozen_weights_and_rules_are_respected():
    model = make_model().requires_grad_(False)
    smaller = slim(model, "70%", make_batches(), cross_entropy, progress=False, freeze="layer1.*")
    assert smaller.layer1[0].conv1.out_channels == model.layer1[0].conv1.out_channels
    assert not any(parameter.requires_grad for m in (model, smaller) for parameter in m.parameters())


@pytest.mark.slow
def test_without_a_loss_no_targets_are_read():
    model, batches = make_model(), make_batches()
    images = [inputs for inputs, _ in batches]
    bare, paired, named = (
        slim(model, "50%", given, progress=False).eval()
        for given in (images, [(inputs, None) for inputs in images], [{"x": inputs} for inputs in images])
    )
    with torch.no_grad():
        assert torch.equal(bare(images[0]), paired(images[0]))
        assert torch.allclose(bare(images[0]), named(images[0]), atol=1e-4)  # whose statistics are summed otherwise


@pytest.mark.slow
def test_without_a_loss_subnets_are_ranked_by_the_outputs_of_the_model(monkeypatch):
    model, batches = make_model().eval(), make_batches()
    with torch.no_grad():
        soft = [(images, model(images).softmax(1)) for images, _ in batches]
    expected = slim(model, "30%", soft, cross_entropy, progress=False).state_dict()
    smaller = slim(model, "30%", batches, progress=False).state_dict()  # in two stages
    assert all(torch.equal(tensor, expected[name]) for name, tensor in smaller.items())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"maximize": True}, "loss: got none, with maximize=True"),
        ({"order": "taylor"}, 'loss: got none, with order="taylor"'),
    ],
)
def test_what_needs_a_loss_is_refused_without_one(settings, text):
    with pytest.raises(ConfigError, match=text):
        slim(make_model(), "50%", make_batches(), **settings)


def test_what_holds_no_inputs_is_refused_without_a_loss_too():
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(DataError, match=r"batch 0: got a list; needed: an iterable of inputs .*, or of pairs"):
        slim(make_model(), "50%", [[images]])
    with pytest.raises(DataError, match=r"batches: got none.*a generator that was read before is empty"):
        slim(make_model(), "50%", iter([]))

    class Two(nn.Module):
        def forward(self, before, after):
            return before + after

    with pytest.raises(DataError, match=r"batch 0: got inputs with .*'after'; .*slim reads a tuple of two as"):
        slim(Two(), "50%", [(images, images)])


@pytest.mark.slow
def test_batches_that_do_not_fit_the_statistics_of_the_model_are_refused_by_what_they_lack():
    model = make_model().eval()
    images = torch.randn(40, 3, 32, 32)
    model.train()(images)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # a mean over all batches
            norm.reset_running_stats()
    for _ in range(5):
        model(images)
    model.fc.weight.data.mul_(100)  # sure of its classes
    shifted = [images[:20] * 0.01 + 3, images[20:] * 0.01 - 3]
    with pytest.raises(EvaluationError, match=r"batches: got .* the original and of the widest.*of most classes"):
        slim(model, "50%", shifted, progress=False)


@pytest.mark.slow
def test_it_works_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        smaller = slim(make_model(), "60%", [images for images, _ in make_batches()], progress=False)
    assert all(parameter.dtype == torch.float32 for parameter in smaller.parameters())


@pytest.mark.parametrize(
    "targets", [torch.zeros(20, 10), torch.zeros(20, 10).long(), torch.zeros(20), {"boxes": torch.zeros(3, 4)}]
)
def test_targets_that_are_no_classes_need_a_loss(targets):
    batches = [(images, targets) for images, _ in make_batches()]
    with pytest.raises(ConfigError, match=r"loss: got none, and targets .*or, if the model tells classes"):
        slim(make_model(), "50%", batches)


def test_outputs_that_are_no_logits_need_a_loss():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=1, channels=[8, 8, 16, 16], stem_width=8)
    with pytest.raises(ConfigError, match=r"outputs: got no logits, .* \(20, 1\).*; give a loss of your own: slim"):
        slim(model, "50%", make_batches())


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "batches: got none"),
        (torch.zeros(2, 3, 32, 32), "batches: got a Tensor"),
        ([torch.zeros(2, 3, 32, 32)], "batch 0: got a Tensor; needed: an iterable of pairs.*leave out the loss"),
        ({"x": torch.zeros(2, 3, 32, 32)}, "batches: got a dict"),
        (None, "batches: got a NoneType"),
    ],
)
def test_what_is_no_pair_is_refused(batches, text):
    with pytest.raises(DataError, match=text):
        slim(make_model(), "50%", batches, cross_entropy)


@pytest.mark.slow
def test_budgets_that_cannot_be_met_are_refused():
    with pytest.raises(BudgetError, match="out of reach"):
        slim(make_model(), "0.01%", make_batches(), cross_entropy, progress=False)


@pytest.mark.slow
def test_progress_is_shown_unless_it_is_off(terminal):
    slim(make_model(), "90%", make_batches(), cross_entropy)
    assert "reconstruct" in terminal.readouterr().err
    slim(make_model(), "90%", make_batches(), cross_entropy, progress=False)
    assert not terminal.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reconstruction", "taylor"])
def test_several_inputs_and_structured_outputs(order):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, images, mask):
            return {"logits": self.body(images * mask)}

    model = Masked()
    batches = [((images, torch.ones(len(images), 1, 32, 32)), labels) for images, labels in make_batches()]

    def loss(outputs, labels):
        return cross_entropy(outputs["logits"], labels)

    smaller = slim(model, "50%", batches, loss, order=order, progress=False)
    assert 0.4 < count_macs(smaller.body) / count_macs(model.body) <= 0.5
    named = [({"images": images, "mask": mask}, labels) for (images, mask), labels in batches]
    again = slim(model, "50%", named, loss, order=order, progress=False)
    assert all(torch.equal(x, y) for x, y in zip(smaller.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("rules", "stages"), [({}, 2), ({"min": 0.05}, 1)])
def test_a_far_budget_is_met_in_stages(rules, stages, terminal, tmp_path):
    model, batches = make_model().eval(), make_batches(4)
    smaller = slim(model, "30%", batches, cross_entropy, base_args={"num_classes": 10}, **rules)
    assert (" 1/2 [" in terminal.readouterr().err) == (stages == 2)
    assert 0.28 < count_macs(smaller) / count_macs(model) <= 0.3
    again = timm.create_model(f"local-dir:{export(smaller, tmp_path / 'slim')}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(batches[0][0]), smaller(batches[0][0]))


@pytest.mark.slow
def test_stages_know_the_gradients_of_their_own_networks():
    smaller = slim(make_model(), "30%", make_batches(), cross_entropy, progress=False, order="taylor")
    assert all(parameter.grad is None for parameter in smaller.parameters())


@pytest.mark.slow
def test_a_budget_object_stands_for_itself():
    model, batches = make_model(), make_batches()
    limit = cost(convert(model, batches[0][0])).macs // 2
    budget = Budget((("macs", float(limit)),))
    smaller = slim(model, budget, batches, cross_entropy, divisor=4, progress=False, order=None)
    assert cost(convert(smaller, batches[0][0])).macs <= limit


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (np.zeros((20, 3, 32, 32), np.float32), r"batches\[0\]: got an array of numpy; .*from_numpy"),
        ([1, 2], r"batches\[0\]: got a list; .*; a dict holds inputs .* is a pair"),
        ((torch.zeros(20, 3, 32, 32),) * 4, r"batches\[0\]: got a tuple; .*; a dict holds inputs .* is a pair"),
    ],
)
def test_inputs_that_are_none_are_told_what_slim_takes(inputs, text):
    with pytest.raises(DataError, match=text):
        slim(make_model(), "50%", [(inputs, torch.zeros(20).long())], cross_entropy)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1, 0.37], ids=["accuracy", "other score"])
def test_a_score_of_a_trained_model_that_is_taken_for_a_loss_is_refused_before_the_search(scale, monkeypatch):
    model, batches = make_model(), make_batches()
    with torch.no_grad():  # with the statistics of the batches it is right for all of them
        pairs = [(images, model(images).argmax(1)) for images, _ in batches]
    monkeypatch.setattr("timm_autoslim.slimming.slim.search", lambda *_, **__: pytest.fail("searching"))

    def score(outputs, targets):
        return scale * (outputs.argmax(1) == targets).float().mean()

    needed = r"needed: numbers that are lower for better subnets; .*give maximize=True; else look at whether each batch"
    with pytest.raises(EvaluationError, match=needed):
        slim(model, "50%", pairs, score, progress=False)
    with pytest.raises(EvaluationError, match="leave out maximize=True"):
        slim(model, "50%", pairs, lambda outputs, targets: -score(outputs, targets), maximize=True, progress=False)
    for maximize, sign in ((True, 1), (False, -1)):
        with pytest.raises(pytest.fail.Exception, match="searching"):
            slim(model, "50%", pairs, lambda *pair, sign=sign: sign * score(*pair), maximize=maximize, progress=False)


def test_the_remedy_of_two_metrics_is_one_text():
    with pytest.raises(BudgetError, match=r'within all of them give "macs<=60% and params<=50%"; else call slim for'):
        slim(make_model(), {"macs": "60%", "params": "50%"}, make_batches(), cross_entropy, progress=False)


def test_several_budgets_are_refused():
    with pytest.raises(BudgetError, match="2 budgets; needed: one; call slim for each"):
        slim(make_model(), {"macs": ["50%", "30%"]}, make_batches(), cross_entropy, progress=False)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
            r"of torch.uint8, on which the model raises.*images.float\(\) / 255",
        ),
        (torch.zeros(4, 1, 32, 32), r"inputs \(4, 1, 32, 32\) of torch.float32.*look at their channels"),
    ],
)
def test_images_that_the_model_does_not_take_are_told_before_anything_is_traced(inputs, text):
    with pytest.raises(DataError, match=text):
        slim(make_model(), "50%", [(inputs, torch.zeros(4, dtype=torch.long))], cross_entropy)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda outputs, targets: cross_entropy(outputs, targets, reduction="none"), r"shape \(20,\).*reduction"),
        (lambda outputs, targets: cross_entropy(outputs, targets.float()), "loss: got RuntimeError: .*batch 0"),
    ],
)
def test_a_loss_that_is_no_number_is_told(loss, text):
    with pytest.raises(EvaluationError, match=text):
        slim(make_model(), "50%", make_batches(), loss)


def test_an_unknown_rule_is_one_of_slim():
    with pytest.raises(TypeError, match=r"slim\(\) got an unexpected keyword argument 'frezee': did you mean 'freeze'"):
        slim(make_model(), "50%", make_batches(), cross_entropy, frezee="layer1.*")
    with pytest.raises(TypeError, match=r"'example_input'; rules are freeze, min"):
        slim(make_model(), "50%", make_batches(), cross_entropy, example_input=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("macs<=500G", "macs<=500G: got a budget that the original is within"),
        ("0.1%", "out of reach"),
        ("latency_ms<=4", r"got no latency table; .*; give conditions=Conditions\(latency=LatencyTable\(\)\) to slim"),
        ({"macs": ["50%", "40%"]}, "got 2 budgets"),
    ],
)
def test_wrong_budgets_are_told_before_the_channels_are_ordered(budget, text, monkeypatch):
    monkeypatch.setattr("timm_autoslim.supernet.order.reorder_channels", lambda *_: pytest.fail("ordering"))
    with pytest.raises(BudgetError, match=text):
        slim(make_model(), budget, make_batches(), cross_entropy)


@pytest.mark.slow
def test_few_images_are_warned_of():
    with pytest.warns(UserWarning, match="40 held-out images are few"):
        slim(make_model(), "70%", make_batches(), cross_entropy, progress=False)


@pytest.mark.slow
def test_a_model_with_activations_in_its_norms_is_exported_after_it(tmp_path):
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    smaller = slim(model, "50%", make_batches(4), cross_entropy, progress=False, base_args={"num_classes": 10})
    again = timm.create_model(f"local-dir:{export(smaller, tmp_path / 'slim')}", pretrained=True)
    assert all(torch.equal(x, y) for x, y in zip(again.buffers(), smaller.buffers(), strict=True))


@pytest.mark.slow
def test_a_divisor_holds_for_all_widths():
    model = timm.create_model("resnet10t", num_classes=10, channels=[32, 32, 64, 64], stem_width=16)
    smaller = slim(model, "30%", make_batches(4), cross_entropy, progress=False, divisor=8)
    widths = {module.out_channels for module in smaller.modules() if isinstance(module, nn.Conv2d)}
    assert all(width % 8 == 0 for width in widths)


def test_several_budgets_in_a_list_are_refused():
    with pytest.raises(BudgetError, match="2 budgets"):
        slim(make_model(), ["macs<=50%", "macs<=30%"], make_batches(), cross_entropy, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(20, 20, 1), (1,) * 40])
def test_batches_of_one_image_are_joined(sizes):
    inputs, targets = (torch.cat(column)[: sum(sizes)].split(sizes) for column in zip(*make_batches(3), strict=True))
    model, pairs = make_model(), list(zip(inputs, targets, strict=True))
    assert count_macs(slim(model, "80%", pairs, cross_entropy, progress=False)) <= 0.8 * count_macs(model)


def test_one_image_in_all_is_refused():
    with pytest.raises(DataError, match=r"got one image, .*; needed: two images or more"):
        slim(make_model(), "80%", make_batches(1, 1), cross_entropy, progress=False)


@pytest.mark.parametrize("layout", [pytest.param(torch.contiguous_format, marks=pytest.mark.slow), torch.channels_last])
def test_weights_come_back_in_the_layout_that_they_had(layout):
    model = make_model().to(memory_format=layout)
    layouts = [weight.is_contiguous() for weight in model.parameters()]
    smaller = slim(model, "50%", make_batches(), cross_entropy, progress=False)
    assert all(weight.is_contiguous(memory_format=layout) for weight in smaller.parameters() if weight.dim() == 4)
    assert layout == torch.contiguous_format or not smaller.conv1[3].weight.is_contiguous()
    assert layouts == [weight.is_contiguous() for weight in model.parameters()]


def test_volumes_are_slimmed_too():
    """Their weights have five axes, which channels_last does not know."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 8, 1), nn.Flatten(), nn.Linear(64, 4))
    pairs = [(torch.randn(10, 3, 4, 4, 4), torch.randint(4, (10,))) for _ in range(3)]
    assert slim(model, "60%", pairs, cross_entropy, progress=False)[0].out_channels < 8
