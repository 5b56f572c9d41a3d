"""What a forward may read: values of the model's own tensors and of constants, and checks that finite numbers pass."""

import os

import pytest
import torch
from helpers.conversions import IMAGE, Net, check_conversion, check_refusal, make_images
from helpers.marks import slow_but
from helpers.models import randomise
from torch import nn
from torch.nn import functional as F

from timm_autoslim import convert, cost
from timm_autoslim.tracing.record import Recorder
from timm_autoslim.tracing.values import KnownValues

STRIDES = torch.tensor([8.0, 16.0])


class Head(nn.Module):
    """A head of a detector: it scales what it predicts by the strides, whatever they are stored as."""

    def __init__(self, kind, use):
        super().__init__()
        self.use = use
        if kind == "buffer":
            self.register_buffer("stride", STRIDES.clone())
        elif kind == "parameter":
            self.stride = nn.Parameter(STRIDES.clone(), requires_grad=False)
        elif kind == "list of tensors":
            self.stride = [torch.tensor(8.0), torch.tensor(16.0)]
        else:
            self.stride = STRIDES.clone()

    def forward(self, x):
        return x * self.use(self, x)


USES = {
    "a number": lambda s, x: float(s.stride[0]),
    "item": lambda s, x: s.stride[1].item() / 8,
    "full": lambda s, x: torch.full((1, 1, 1, x.shape[-1]), s.stride[0], device=x.device),
    "a loop": lambda s, x: sum(float(stride) for stride in s.stride),
    "a condition": lambda s, x: 2 if s.stride[0] < s.stride[1] else 3,
    "a comparison": lambda s, x: 2 if max(s.stride[0], s.stride[1]) == 16 else 3,
    "a size": lambda s, x: torch.ones(1, 1, 1, int(s.stride[0]) // int(s.stride[0])),
    "a range": lambda s, x: sum(i for i in range(int(s.stride[0]))),
    "what follows": lambda s, x: float((s.stride[0] * 2 + 1).sqrt().clamp(max=3)),
}
TENSOR_USES = {
    "tolist": lambda s, x: s.stride.tolist()[1],
    "numpy": lambda s, x: float(s.stride.cpu().numpy()[0]),
    "a vector compared": lambda s, x: 2 if (s.stride > 7).all() else 3,
    "a vector counted": lambda s, x: int((s.stride > 9).sum()) + 1,
    "nonzero": lambda s, x: (s.stride > 9).nonzero().shape[0] + 1,
    "unique": lambda s, x: len(s.stride.unique()),
    "argmax": lambda s, x: int(s.stride.argmax()) + 1,
    "equal": lambda s, x: 2 if torch.equal(s.stride, s.stride.clone()) else 3,
    "allclose": lambda s, x: 2 if torch.allclose(s.stride, s.stride + 1e-9) else 3,
    "written in place": lambda s, x: float(s.stride.clone().mul_(2)[0]),
    "a view written": lambda s, x: write_view(s.stride.clone()),
}


def write_view(strides):
    doubled = strides * 2
    strides[1:] = 5
    return float(strides[1]) + float(doubled[1])


KINDS = ["attribute", "buffer", "parameter", "list of tensors"]


@pytest.mark.parametrize("kind", slow_but(["buffer", "list of tensors"], KINDS))
@pytest.mark.parametrize("use", USES)
def test_a_forward_may_read_a_tensor_of_the_model(kind, use):
    model = Net(lambda s, x: s.logits(s.part(s.maps(x))), part=Head(kind, USES[use]))
    assert check_conversion(model).space.max().to_dict() == {"stem": 8, "inner": 16}


@pytest.mark.parametrize("kind", slow_but(["parameter"], KINDS[:3]))
@pytest.mark.parametrize("use", TENSOR_USES)
def test_a_forward_may_read_whole_tensors_of_the_model(kind, use):
    model = Net(lambda s, x: s.logits(s.part(s.maps(x))), part=Head(kind, TENSOR_USES[use]))
    assert check_conversion(model).space.max().to_dict() == {"stem": 8, "inner": 16}


CONSTANTS = {
    "arange": lambda s, x: float(torch.arange(5, device=x.device)[3]),
    "arange on the CPU": lambda s, x: x.new_tensor(torch.arange(5).tolist())[3],
    "a tensor of numbers": lambda s, x: torch.tensor([1.0, 2.0], device=x.device).max().item(),
    "new_tensor": lambda s, x: int(x.new_tensor([3, 4])[1]),
    "a tensor on the CPU": lambda s, x: torch.tensor([2.0] * x.shape[-1]),
    "a table on the CPU": lambda s, x: torch.linspace(0, 1, x.shape[-1])[None, None, None],
    "zeros that are filled": lambda s, x: float(fill(torch.zeros(4, device=x.device))[2]),
    "numpy": lambda s, x: torch.from_numpy(torch.arange(8.0).numpy()),
    "a mask of booleans": lambda s, x: torch.ones(1, 8, device=x.device)[:, torch.arange(8, device=x.device) > 3].sum(),
    "meshgrid": lambda s, x: float(torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")).max()),
    "random numbers": lambda s, x: 2.0 + int(torch.rand((), device=x.device).item() * 0),
}  # fmt: skip


def fill(x):
    x[1:3] = 7
    return x


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_forward_may_read_constants(name):
    use = CONSTANTS[name]
    supernet = check_conversion(randomise(Net(lambda s, x: s.logits(s.maps(x) * use(s, x)))))
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}


CHECKS = {
    "isfinite": lambda x: not torch.isfinite(x).all(),
    "isnan": lambda x: x.isnan().any(),
    "isinf": lambda x: torch.isinf(x).any().item(),
    "both": lambda x: (torch.isnan(x) | torch.isinf(x)).any(),
    "a sum": lambda x: torch.isnan(x).sum() > 0,
    "of a mean": lambda x: torch.isnan(x.mean()),
    "unequal to itself": lambda x: (x != x).any(),
    "equal to infinity": lambda x: (x.abs() == float("inf")).any(),
    "logical": lambda x: torch.logical_or(torch.isinf(x).any(), torch.isnan(x).any()),
}


@pytest.mark.parametrize("name", CHECKS)
def test_numbers_are_finite_while_a_model_is_traced(name):
    def body(self, x):
        x = self.maps(x)
        if CHECKS[name](x):
            raise FloatingPointError
        return self.logits(x)

    assert check_conversion(randomise(Net(body))).space.max().to_dict() == {"stem": 8, "inner": 16}


def test_channels_that_decide_a_value_are_fixed():
    supernet = check_conversion(randomise(Net(lambda s, x: s.logits(s.maps(x) * s.bn.weight.mean().item()))))
    assert supernet.space.max().to_dict() == {"inner": 16}
    reason = "the model: its code reads numbers that are computed from bn.weight"
    assert supernet.graph.fixed["bn.weight", 0] == reason
    assert not supernet.repairs


def test_a_forward_may_read_a_dict_of_tensors():
    part = DictOfTensors()
    supernet = check_conversion(randomise(Net(lambda s, x: s.logits(s.part(s.maps(x))), part=part)))
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}
    slim = supernet.extract(supernet.space.uniform(0.5))
    assert slim.part.by_name == part.by_name


class DictOfTensors(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_name = {"near": torch.tensor(8.0), "far": torch.tensor(16.0)}

    def forward(self, x):
        return x * self.by_name["near"] / float(self.by_name["far"]) * len(self.by_name.keys())


def test_a_mask_of_the_model_takes_rows_that_stay():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.arange(8) % 3 == 0)

        def forward(self, x):
            return x[:, :, self.mask]

    supernet = check_conversion(randomise(Net(lambda s, x: s.logits(s.a(s.maps(x))), a=Masked())))
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}


def test_a_value_that_data_were_written_to_is_unknown():
    def body(self, x):
        table = torch.zeros(4, device=x.device)
        table[1] = x.mean()
        return self.logits(self.maps(x) * float(table[0]))

    check_refusal(randomise(Net(body)), r"raised RuntimeError in train\(\) mode on the meta device")


def test_values_that_one_operator_writes_together_are_unknown():
    def body(self, x):
        tables = [torch.zeros(4, device=x.device), torch.zeros(4, device=x.device)]
        torch._foreach_add_(tables, 1)
        return self.logits(self.maps(x) * float(tables[1][0]))

    check_refusal(randomise(Net(body)), r"raised RuntimeError in train\(\) mode on the meta device")


def test_a_value_that_is_written_elsewhere_stays_known():
    def body(self, x):
        scale = torch.full((1, 8, 1, 1), 2.0, device=x.device)
        x = self.maps(x)
        x += scale
        return self.logits(x * scale.max().item())

    assert check_conversion(randomise(Net(body))).space.max().to_dict() == {"inner": 16}


def test_data_that_only_the_training_forward_reads_are_no_obstacle():
    def body(self, x):
        x = self.maps(x)
        if self.training and x.mean() > 100:
            x = x / 2
        return self.logits(x)

    supernet = check_conversion(randomise(Net(body)))
    (note,) = supernet.repairs
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}
    assert "raised RuntimeError in train() mode" in note
    assert "test_values.py:" in note
    assert "`if self.training and x.mean() > 100:`" in note
    assert note.endswith("so its forward in eval() mode alone was traced, and that in train() mode is unproven")


def test_a_refusal_names_the_line_and_the_part_that_would_do():
    def body(self, x):
        x = self.maps(self.body_of(x))
        return self.logits(x if x.mean() > 0 else -x)

    part = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=2))
    error = check_refusal(randomise(Net(body, body_of=part)), "without reading data values; replace .item")
    line = f"{os.path.join('tests', 'tracing', 'test_values.py')}:{body.__code__.co_firstlineno + 2}"
    assert f"{line}, `return self.logits(x if x.mean() > 0 else -x)`" in str(error)
    assert "or convert a part that has run before it: model.body_of has " in str(error)


def test_costs_know_the_values_too():
    supernet = convert(Net(lambda s, x: s.logits(s.part(s.maps(x))), part=Head("buffer", USES["full"])), IMAGE)
    assert cost(supernet, supernet.space.uniform(0.5), batch_size=2).peak_bytes > 0


@pytest.mark.slow
def test_a_decoder_with_a_causal_mask():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.words = nn.Conv2d(3, 16, 4, 4), nn.Embedding(11, 16)
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, batch_first=True), 1)
            self.head, self.bn = nn.Linear(16, 11), nn.BatchNorm2d(16)

        def forward(self, x, ids, mask=None):
            x = self.bn(self.stem(x)).flatten(2).transpose(1, 2)
            if mask is None:
                mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=x.device)
            return self.head(self.decoder(self.words(ids), x, tgt_mask=mask))

    ids = torch.randint(0, 11, (2, 5))
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for inputs in ((make_images(), ids), (make_images(), ids, mask)):
        supernet = check_conversion(randomise(Decoder()), inputs, inputs, count=False)
        assert cost(supernet, supernet.space.uniform(0.5)).macs < 0.4 * cost(supernet).macs


# -- the values themselves --------------------------------------------------------------------------------------------


def test_random_draws_have_their_own_seeds():
    """Whatever the widths are: the same path is taken at each."""

    class Dice(nn.Module):
        def forward(self, x):
            return torch.rand(len(x), device=x.device), torch.rand((), device=x.device).item()

    numbers = {Recorder(Dice()).run(torch.empty(n, device="meta"))[1] for n in (2, 3, 5)}
    assert len(numbers) == 1


def test_a_tensor_that_nobody_knows_is_none():
    values = KnownValues()
    assert values.read(torch.empty(2, device="meta")) is None


def test_functions_of_several_results_are_known():
    def body(self, x):
        mean, where = torch.arange(6.0, device=x.device).view(2, 3).max(1)
        return self.logits(self.maps(x) * (float(mean[1]) + int(where[0])) * F.one_hot(where)[0, 2].item())

    assert check_conversion(randomise(Net(body))).space.max().to_dict() == {"stem": 8, "inner": 16}
