"""What a subnet passes to functions of torch follows from what the widest passes, or the channels stay."""

import decimal
import math
import statistics

import numpy as np
import pytest
import torch
from helpers.models import randomise
from torch import nn

from timm_autoslim import convert
from timm_autoslim.errors import TraceError

IMAGE = torch.zeros(1, 3, 4, 4)


class Choosing(nn.Module):
    """Two widths, 12 and 8; the answer to a question about them chooses what is passed to a function of torch."""

    def __init__(self, ask, use):
        super().__init__()
        self.ask, self.use, self.answers, self.tables = ask, use, [], {"w12": 1}
        self.a, self.b, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1), nn.Linear(8, 5)
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor([float(i)])) for i in (2, 3)])

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x).relu()
        answer = self.ask(self, x.shape[1])
        self.answers.append(answer)
        return self.head(self.use(self, y, answer).mean((2, 3)))


def repeat(model, y, answer):
    for _ in range(3 if answer else 2):
        y = y + 1
    return y


USES = {
    "a number": lambda s, y, answer: y * (3 if answer else 2),
    "a tensor of a number": lambda s, y, answer: y * torch.tensor([3.0 if answer else 2.0]),
    "an array": lambda s, y, answer: y * torch.from_numpy(np.full(1, 3 if answer else 2, np.float32)),
    "a weight": lambda s, y, answer: y * (s.scales[1] if answer else s.scales[0]),
    "a slice": lambda s, y, answer: y[..., : 4 if answer else 3],
    "an index": lambda s, y, answer: torch.stack([y, y * 2])[1 if answer else 0],
    "a text": lambda s, y, answer: nn.functional.interpolate(y, (6, 6), mode="bilinear" if answer else "nearest"),
    "a number of calls": repeat,
}
QUESTIONS = {
    "float": lambda s, c: float(c) > 6,
    "a float on the left": lambda s, c: 0.5 * c > 3,
    "divmod": lambda s, c: divmod(24, c)[0] == 2,
    "an array": lambda s, c: np.ones(c).sum() > 6,
    "np.prod": lambda s, c: np.prod((c, 2)) > 12,
    "round": lambda s, c: round(c, -1) == 10,
    "a text": lambda s, c: f"{c}" == "12",
    "a text repeated": lambda s, c: len("x" * c) > 6,
    "a range": lambda s, c: len(range(c)) > 6,
    "a key": lambda s, c: s.tables.get(f"w{c}"),
    "Decimal": lambda s, c: decimal.Decimal(c) > 6,
    "frexp": lambda s, c: math.frexp(c)[1] == 4,
    "statistics": lambda s, c: statistics.mean([c, 4]) > 6,
    "int": lambda s, c: int(c) > 6,
    "its type": lambda s, c: type(c)(c) > 6,
    "a difference of sets": lambda s, c: not {c} - {12},
}


def check_answers(ask, use):
    """Convert; check that every width leaves the answer of the widest, and return the names of groups."""
    model = randomise(Choosing(ask, use)).eval()
    images = torch.randn(2, 3, 4, 4)
    supernet = convert(model, IMAGE)
    with torch.no_grad():
        assert torch.equal(supernet(images), model(images))
        answer = bool(model.answers[-1])
        for group in supernet.space.groups:
            for width in range(group.floor, group.size + 1):
                widths = supernet.space.from_dict({**supernet.space.max().to_dict(), group.name: width})
                slim = supernet.extract(widths)
                assert torch.equal(slim(images), supernet(images, widths))
                assert bool(slim.answers[-1]) is answer
    return supernet.space.names


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_that_chooses_a_number_alone_has_one_answer(question):
    assert "b" in check_answers(QUESTIONS[question], USES["a number"])


@pytest.mark.parametrize("use", USES)
def test_whatever_an_answer_chooses(use):
    assert "b" in check_answers(QUESTIONS["float"], USES[use])


def test_the_reason_names_the_line():
    supernet = convert(Choosing(QUESTIONS["float"], USES["a number"]).eval(), IMAGE)
    line = USES["a number"].__code__.co_firstlineno
    place = f"at tests/tracing/test_passing.py:{line}, which depends on the number of channels"
    assert f"the code passes another number or text {place}" in supernet.graph.fixed["a.weight", 0]
    path = convert(Choosing(QUESTIONS["float"], repeat).eval(), IMAGE).graph.fixed["a.weight", 0]
    assert "the code takes another path at tests/tracing/test_passing.py:" in path


def test_a_number_that_depends_on_gradients_and_on_a_size_is_found_in_each_of_the_runs():
    def use(model, y, answer):
        return y * (3 if answer and torch.is_grad_enabled() else 2)

    assert check_answers(QUESTIONS["float"], use) == ("b",)


@pytest.mark.parametrize(
    "compute",
    [float, lambda c: 1 / float(c), lambda c: 0.5 * c, lambda c: math.sqrt(float(c)), lambda c: 100.0 / c, int],
    ids=["float", "inverse", "left", "root", "quotient", "int"],
)
def test_a_number_that_is_a_power_of_a_size_holds_nothing(compute):
    assert check_answers(lambda s, c: 1, lambda s, y, _: y * compute(y.shape[1])) == ("a", "b")


@pytest.mark.parametrize("use", [lambda y, c: c * y, lambda y, c: c / y.exp(), lambda y, c: c - y, lambda y, c: y**c])
def test_arithmetic_of_a_size_and_a_tensor_is_a_call_of_the_model(use):
    assert check_answers(lambda s, c: 1, lambda s, y, _: use(y, y.shape[1])) == ("a", "b")


def test_the_type_of_a_size_is_refused_with_the_line():
    def ask(model, c):
        return type(c) is int

    with pytest.raises(TraceError, match=r"test_passing.py:\d+: got a path that changes .* ask isinstance"):
        convert(Choosing(ask, USES["a number"]).eval(), IMAGE)


class Keeping(nn.Module):
    """It computes a number of its width once, and keeps it in some place outside of itself."""

    number = None

    def __init__(self, keep):
        super().__init__()
        self.keep, self.memo = keep, None
        self.a, self.b, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(self.b(x / self.keep(self, x.shape[1])).relu().mean((2, 3)))


NUMBERS = {}


def on_class(model, c):
    if Keeping.number is None:
        Keeping.number = c
    return Keeping.number


def on_function(model, c):
    if not hasattr(on_function, "number"):
        on_function.number = float(c)
    return on_function.number


def in_default(model, c, numbers=[]):  # noqa: B006
    if not numbers:
        numbers.append(float(c))
    return numbers[0]


def in_module(model, c):
    return NUMBERS.setdefault("width", float(c))


def in_model(model, c):
    if model.memo is None:
        model.memo = float(c)
    return model.memo


def by_size(model, c):
    return NUMBERS.setdefault(c, float(c))


@pytest.mark.parametrize("keep", [on_class, on_function, in_default, in_module, in_model])
def test_a_number_that_is_kept_for_all_subnets_holds_the_channels_that_decide_it_and_no_others(keep):
    space = convert(randomise(Keeping(keep)).eval(), IMAGE).space
    assert space.names == ("b",)
    assert (Keeping.number, NUMBERS, hasattr(on_function, "number"), in_default.__defaults__) == (
        None,
        {},
        False,
        ([],),
    )


def test_a_number_that_is_kept_by_size_holds_nothing():
    assert convert(randomise(Keeping(by_size)).eval(), IMAGE).space.names == ("a", "b")
