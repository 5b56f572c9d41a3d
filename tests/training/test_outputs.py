"""Models of several inputs and of structured outputs are trained, calibrated, scored and timed as all others."""

import dataclasses
from collections import OrderedDict, namedtuple

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from timm_autoslim import (
    HeldOut,
    LatencyTable,
    adaptive_alpha_divergence,
    calibrate,
    convert,
    cost,
    measure_latency,
    sandwich_step,
    search,
    soft_cross_entropy,
)
from timm_autoslim.errors import ConfigError, DataError
from timm_autoslim.training.outputs import compare, compares_logits, detach, find_read, separate

A, B = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 0])


class Siamese(nn.Module):
    """Two images through one encoder."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(32, 3)

    def encode(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def forward(self, first, second):
        return self.head(torch.cat((self.encode(first), self.encode(second)), 1))


class SiameseOfList(Siamese):
    def forward(self, images):
        return super().forward(*images)


class SiameseOfDict(Siamese):
    def forward(self, batch, scale=1.0):
        return super().forward(batch["first"], batch["second"]) * scale


INPUTS = {
    "tuple": (Siamese, (A, B)),
    "dict": (Siamese, {"first": A, "second": B}),
    "list": (SiameseOfList, [A, B]),
    "nested": (SiameseOfDict, ({"first": A, "second": B}, 2.0)),
}


@pytest.fixture(params=INPUTS)
def case(request):
    build, inputs = INPUTS[request.param]
    torch.manual_seed(0)
    return convert(build(), inputs), inputs


def run(subnet, inputs):
    if isinstance(inputs, dict):
        return subnet(**inputs)
    return subnet(*inputs) if isinstance(inputs, tuple) else subnet(inputs)


def seed():
    return torch.Generator().manual_seed(0)


def test_a_step_of_several_inputs_has_the_gradients_of_its_subnets(case):
    supernet, inputs = case
    step = sandwich_step(supernet.train(), supernet.space, inputs, LABELS, F.cross_entropy, generator=seed(), n=3)
    gradients = [p.grad.clone() for p in supernet.parameters()]
    supernet.zero_grad()
    wide = run(supernet, inputs)
    F.cross_entropy(wide, LABELS).backward()
    for widths in step.widths[1:]:
        with supernet.at(widths):
            soft_cross_entropy(run(supernet, inputs), wide.detach()).backward()
    for gradient, parameter in zip(gradients, supernet.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_several_inputs_calibrate_search_and_are_timed(case):
    supernet, inputs = case
    slim = supernet.extract(supernet.space.uniform(0.5))
    calibrate(slim, [inputs, inputs])
    assert int(slim.norm.num_batches_tracked) in (2, 4)  # once or twice a forward
    held_out = HeldOut([inputs], lambda subnet, batch: F.cross_entropy(run(subnet, batch), LABELS).item())
    assert search(supernet, {"macs": "60%"}, held_out, steps=2).networks
    assert measure_latency(slim, inputs, repeats=1) > 0
    assert cost(supernet, batch_size=2, dtype=torch.float32).peak_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_latency_of_several_inputs_is_predicted(case, runtime):
    supernet, inputs = case
    assert cost(supernet, latency=LatencyTable(runtime=runtime)).latency_ms > 0
    assert measure_latency(supernet.model, inputs, runtime=runtime, repeats=1) > 0


def test_a_teacher_gets_the_inputs_too(case):
    supernet, inputs = case
    other = type(supernet.model)().eval()
    sandwich_step(
        supernet, supernet.space, inputs, LABELS, F.cross_entropy, generator=seed(), teacher=other, teach_widest=0.5
    )


def test_a_list_in_place_of_a_tuple_is_told():
    supernet = convert(Siamese(), (A, B))
    with pytest.raises(ConfigError, match=r"inputs: got a list; needed: a tuple .* tuple\(inputs\)"):
        sandwich_step(supernet, supernet.space, [A, B], LABELS, F.cross_entropy, generator=seed())
    with pytest.raises(ConfigError, match=r"sizes: got inputs of the shapes"):
        sandwich_step(supernet, supernet.space, (A, B), LABELS, F.cross_entropy, generator=seed(), sizes=[4])
    with pytest.raises(DataError, match=r"batches\[0\]: got a list; .*several as a tuple"):
        calibrate(supernet.model, [[A, B]])


def test_images_by_name_are_resized():
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
                                      head=nn.Linear(8, 3)))  # fmt: skip
    supernet = convert(model, {"input": A})
    sizes = []
    model.conv.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    sandwich_step(supernet, supernet.space, {"input": A}, LABELS, F.cross_entropy, generator=seed(), sizes=[6])
    assert sizes == [8, 6, 6, 6]


@pytest.mark.parametrize(
    "batch", [(A, LABELS), [A, LABELS], {"input": A, "labels": LABELS}, ("a", "b"), (A * float("nan"),)]
)
def test_batches_with_labels_and_the_like_are_refused(batch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(DataError, match=r"batches\[1\]: got"):
        calibrate(model, [A, batch])


def test_labels_do_not_pass_for_an_optional_input():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x, mask=None):
            return self.norm(x)

    with pytest.raises(DataError, match=r"got a tuple.*\(inputs for inputs, _ in loader\)"):
        calibrate(Masked(), [(A, LABELS)])
    calibrate(Masked(), [(A, torch.ones(4, 1, 8, 8))])


# ------------------------------------------------------------------------------------------------ outputs


@dataclasses.dataclass(frozen=True)
class Result:
    logits: torch.Tensor
    auxiliary: torch.Tensor
    name: str = "result"


Pair = namedtuple("Pair", "logits auxiliary")
STRUCTURES = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"logits": a, "auxiliary": b},
    "ordered dict": lambda a, b: OrderedDict(logits=a, auxiliary=b),
    "named tuple": Pair,
    "dataclass": Result,
    "nested": lambda a, b: {"all": [a, (b, None)]},
}


class Several(nn.Module):
    """Two heads of equal classes, or other outputs."""

    def __init__(self, structure, second=3):
        super().__init__()
        self.structure = structure
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.first, self.second = nn.Linear(16, 3), nn.Linear(16, second)

    def forward(self, x):
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.structure(self.first(h), self.second(h))


def leaves(outputs):
    outputs = outputs["all"] if isinstance(outputs, dict) and "all" in outputs else outputs
    if isinstance(outputs, Result):
        return [outputs.logits, outputs.auxiliary]
    values = list(outputs.values() if isinstance(outputs, dict) else outputs)
    return [value[0] if isinstance(value, tuple) else value for value in values]


def loss_of_both(outputs, labels):
    return sum(F.cross_entropy(out, labels) for out in leaves(outputs))


def loss_of_first(outputs, labels):
    return F.cross_entropy(leaves(outputs)[0], labels)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("distill", [soft_cross_entropy, adaptive_alpha_divergence])
def test_subnets_learn_from_structured_outputs(structure, distill):
    torch.manual_seed(0)
    supernet = convert(Several(STRUCTURES[structure]), A).train()
    for loss, learning in ((loss_of_both, (True, True)), (loss_of_first, (True, False))):
        supernet.zero_grad(set_to_none=True)
        step = sandwich_step(supernet, supernet.space, A, LABELS, loss, generator=seed(), n=3, distill=distill)
        assert type(step.outputs) is type(supernet.model(A))
        assert not any(out.requires_grad for out in leaves(step.outputs))
        model = supernet.model
        assert (model.first.weight.grad is not None, model.second.weight.grad is not None) == learning
        narrow = supernet(A, widths=step.widths[2])
        pairs = list(zip(leaves(narrow), leaves(step.outputs), strict=True))[: 1 + learning[1]]
        expected = torch.stack([distill(a, b) for a, b in pairs]).mean()
        torch.testing.assert_close(step.losses[2], expected, rtol=1e-4, atol=1e-5)


def test_a_loss_of_the_user_s_gets_what_the_model_returns():
    supernet = convert(Several(STRUCTURES["dict"]), A)
    calls = []

    def distill(outputs, teacher):
        calls.append((outputs, teacher))
        return F.mse_loss(outputs["auxiliary"], teacher["auxiliary"])

    sandwich_step(supernet, supernet.space, A, LABELS, loss_of_both, generator=seed(), distill=distill)
    assert len(calls) == 3
    assert set(calls[0][1]) == {"logits", "auxiliary"}
    soft = lambda out, t: soft_cross_entropy(out, t)  # noqa: E731
    with pytest.raises(ConfigError, match=r"outputs: got a dict; needed: .*picked from what the model returns"):
        sandwich_step(supernet, supernet.space, A, LABELS, loss_of_both, generator=seed(), distill=soft)


def test_a_teacher_of_one_tensor_teaches_all_that_the_loss_reads():
    supernet = convert(Several(STRUCTURES["tuple"]), A)
    teacher = Several(lambda a, b: a).eval()
    step = sandwich_step(
        supernet, supernet.space, A, LABELS, loss_of_both, generator=seed(), teacher=teacher, teach_widest=1
    )
    with torch.no_grad():
        expected = sum(soft_cross_entropy(out, teacher(A)) for out in step.outputs) / 2
    torch.testing.assert_close(step.losses[0], expected)
    three = Several(lambda a, b: (a, b, a))
    with pytest.raises(ConfigError, match=r"teacher: got 3 tensors; needed: one tensor, or 2"):
        sandwich_step(supernet, supernet.space, A, LABELS, loss_of_both, generator=seed(), teacher=three)
    single = convert(Several(lambda a, b: a), A)
    with pytest.raises(ConfigError, match=r"teacher: got 3 tensors"):
        sandwich_step(single, single.space, A, LABELS, F.cross_entropy, generator=seed(), teacher=three)


def test_boxes_are_no_logits():
    def structure(a, b):
        return {"logits": a, "boxes": b.reshape(-1, 2, 4)}

    supernet = convert(Several(structure, second=8), A)

    def loss(outputs, labels):
        return F.cross_entropy(outputs["logits"], labels) + outputs["boxes"].square().mean()

    with pytest.raises(ConfigError, match=r"distill: got a loss of logits, and .*\(4, 2, 4\).*give distill= a func"):
        sandwich_step(supernet, supernet.space, A, LABELS, loss, generator=seed())
    only_logits = lambda outputs, labels: F.cross_entropy(outputs["logits"], labels)  # noqa: E731
    sandwich_step(supernet, supernet.space, A, LABELS, only_logits, generator=seed())


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_a_single_number_is_no_logits(shape):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1))
    model = nn.Sequential(model, nn.Flatten(0)) if shape == (4,) else model
    supernet, targets = convert(model, A), torch.zeros(shape)
    with pytest.raises(
        ConfigError, match=r"distill: got a loss of logits, .*the softmax of one is always 1; give dist"
    ):
        sandwich_step(supernet, supernet.space, A, targets, F.mse_loss, generator=seed())
    sandwich_step(supernet, supernet.space, A, targets, F.mse_loss, generator=seed(), distill=F.mse_loss)


def test_features_whose_width_shrinks_ask_for_a_loss():
    tower = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    supernet = convert(tower, A, keep_output=False)

    def loss(features, labels):
        return features.square().mean()

    with pytest.raises(ConfigError, match=r"distill: .*of the shape \(4, \d\) for \(4, 16\).*keep_output"):
        sandwich_step(supernet, supernet.space, A, LABELS, loss, generator=seed())

    def similarity(features, teacher):
        return F.mse_loss(*(F.normalize(x) @ F.normalize(x).T for x in (features, teacher)))

    sandwich_step(supernet, supernet.space, A, LABELS, loss, generator=seed(), distill=similarity)
    assert all(p.grad is not None for p in supernet.parameters())


@pytest.mark.slow
def test_googlenet_learns_as_torchvision_builds_it():
    model = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=3)
    images = torch.randn(2, 3, 64, 64)
    supernet = convert(model, images[:1]).train()

    def loss(outputs, labels):
        return F.cross_entropy(outputs.logits, labels) + 0.3 * F.cross_entropy(outputs.aux_logits1, labels)

    step = sandwich_step(supernet, supernet.space, images, LABELS[:2], loss, generator=seed(), n=2)
    assert type(step.outputs).__name__ == "GoogLeNetOutputs"
    assert model.aux1.fc2.weight.grad is not None
    assert model.aux2.fc2.weight.grad is None


def test_what_a_loss_reads():
    first = torch.randn(4, 3, requires_grad=True)
    outputs = separate({"features": first, "logits": first * 2, "count": torch.tensor(3)})
    assert find_read(outputs["logits"].sum(), outputs) == (1,)
    assert find_read(outputs["features"].sum() + outputs["logits"].sum(), outputs) == (0, 1)
    assert not detach(outputs)["logits"].requires_grad
    assert compares_logits(soft_cross_entropy)
    assert not compares_logits(F.mse_loss)
    with pytest.raises(ConfigError, match=r"no tensor"):
        compare(soft_cross_entropy, outputs, detach(outputs), ())


def test_sequences_of_logits_ask_for_a_loss():
    """Of (N, T, classes) and (N, classes, T) nothing tells which is which."""
    supernet = convert(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 11)), torch.zeros(1, 7, 6)).train()
    inputs, targets = torch.randn(4, 7, 6), torch.randint(0, 11, (4, 7))

    def loss(outputs, labels):
        return F.cross_entropy(outputs.transpose(1, 2), labels)

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ConfigError, match="of three dimensions any may be the classes"):
        sandwich_step(supernet, supernet.space, inputs, targets, loss, generator=generator)

    def distill(outputs, teacher):
        return F.cross_entropy(outputs.transpose(1, 2), teacher.softmax(-1).transpose(1, 2))

    sandwich_step(supernet, supernet.space, inputs, targets, loss, generator=generator, distill=distill)
    assert all(parameter.grad is not None for parameter in supernet.parameters())
