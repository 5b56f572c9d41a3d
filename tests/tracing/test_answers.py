"""What a forward asks about a tensor, beside its size, has the answers of a run with data."""

import pytest
import torch
from helpers.models import randomise
from torch import is_grad_enabled, nn
from torch.overrides import has_torch_function_unary

from timm_autoslim import convert
from timm_autoslim.tracing.answers import answer_gradients, answer_place


class Joining(nn.Module):
    """Where the answer is yes, two branches are added, so that their channels are one unit."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask
        self.a, self.b, self.c, self.d = (nn.Conv2d(n, m, 1) for n, m in ((3, 12), (3, 12), (12, 8), (12, 8)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        return self.head((self.c(a + b) if self.ask(self, a) else self.c(a) + self.d(b)).mean((2, 3)))


QUESTIONS = {
    "gradients": lambda s, x: torch.is_grad_enabled(),
    "gradients by name": lambda s, x: is_grad_enabled(),
    "gradients of C": lambda s, x: torch._C.is_grad_enabled(),
    "gradients in training": lambda s, x: s.training and torch.is_grad_enabled(),
    "gradients in evaluation": lambda s, x: not s.training and torch.is_grad_enabled(),
    "requires_grad": lambda s, x: x.requires_grad,
    "grad_fn": lambda s, x: x.grad_fn is not None,
    "is_leaf": lambda s, x: not x.is_leaf,
    "a weight": lambda s, x: s.a.weight.requires_grad,
    "device": lambda s, x: x.device.type == "cpu",
    "device of a weight": lambda s, x: s.a.weight.device == torch.device("cpu"),
    "device of a new tensor": lambda s, x: torch.empty(1, device=x.device).device.type == "cpu",
    "is_meta": lambda s, x: not x.is_meta,
    "is_cpu": lambda s, x: x.is_cpu,
    "get_device": lambda s, x: x.get_device() == -1,
    "type": lambda s, x: x.type() == "torch.FloatTensor",
    "one memory": lambda s, x: x.data_ptr() != x.clone().data_ptr() and x.data_ptr() == x.view(-1).data_ptr(),
    "overridden": lambda s, x: not has_torch_function_unary(x),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_path_of_a_run_with_data_is_traced(question):
    model = randomise(Joining(QUESTIONS[question])).eval()
    images = torch.randn(2, 3, 4, 4)
    supernet = convert(model, images[:1])
    assert supernet.space.names == ("a", "c")
    widths = supernet.space.from_dict({"a": 5, "c": 3})
    slim = supernet.extract(widths)
    for training in (True, False):
        for module in (supernet, slim, model):
            module.train(training)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                assert torch.equal(supernet(images), model(images))
                assert torch.equal(supernet(images, widths), slim(images))


def test_without_a_question_gradients_change_nothing():
    assert convert(Joining(lambda s, x: False).eval(), torch.zeros(1, 3, 4, 4)).space.names == ("a", "b", "c")


def test_a_path_with_gradients_that_cannot_run_is_noted():
    def ask(model, x):
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return False

    repairs = convert(Joining(ask).eval(), torch.zeros(1, 3, 4, 4)).repairs
    assert len(repairs) == 2
    assert all("with gradients enabled, about which its code asks: that path is unproven" in text for text in repairs)


def test_answers_of_gradients():
    questions = ("requires_grad", "is_leaf")
    assert [answer_gradients(q, True, False) for q in questions] == [True, True]
    assert [answer_gradients(q, False, True) for q in questions] == [True, False]
    assert [answer_gradients(q, False, False) for q in questions] == [False, True]
    assert answer_gradients("grad_fn", False, False) is None
    assert answer_gradients("grad_fn", False, True) is not None


def test_answers_of_places():
    meta, gpu = torch.empty(2, device="meta"), torch.device("cuda", 1)
    assert answer_place("device", meta, gpu) == gpu
    assert answer_place("is_cuda", meta, gpu)
    assert not answer_place("is_cpu", meta, gpu)
    assert answer_place("get_device", meta, gpu) == 1
    assert answer_place("type", meta, gpu) == "torch.cuda.FloatTensor"
    data = torch.empty(2)
    assert answer_place("device", data, gpu) == torch.device("cpu")
    assert answer_place("data_ptr", data, gpu) == data.data_ptr()
