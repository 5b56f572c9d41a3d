"""What `convert` takes and refuses: inputs, outputs, shared modules and weights, wrappers, and forwards that raise."""

import collections
import dataclasses
import functools
import threading
import types

import pytest
import torch
import torch.distributed as dist
from helpers.zoo import Plain, arbitrary_widths, assert_same, randomise, snapshot
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.quantization import mobilenet_v2

from timm_autoslim import convert, cost
from timm_autoslim.errors import TraceError, WidthError
from timm_autoslim.supernet.space import Widths
from timm_autoslim.tracing import ops

IMAGE = torch.zeros(1, 3, 8, 8)
EXACT = 1e-12  # float64: rounding alone


class Net(Plain):
    """`Plain` in two steps, with a body between them that a test gives, and the layers that it needs."""

    def __init__(self, body=None, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = body

    def maps(self, x):
        """Return features (N, 8, H, W)."""
        x = self.bn(self.stem(x)).relu()
        return x + self.bn_outer(self.outer(self.bn_inner(self.inner(x)).relu()))

    def logits(self, x):
        return self.head(x.relu().mean((2, 3)))

    def forward(self, *inputs, **named):
        return self.body(self, *inputs, **named)


def images(*shape):
    return torch.randn(shape or (2, 3, 8, 8))


def tensors(out):
    """Return the tensors of an output, wherever they are in it."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    elif isinstance(out, (Slots, Slot)):
        out = [out.logits, out.maps] if isinstance(out, Slots) else out.both
    elif hasattr(out, "__dict__"):
        out = list(vars(out).values())
    return [t for value in out for t in tensors(value)] if isinstance(out, (list, tuple, collections.deque)) else []


def as_it_is(model):
    """Return all that a conversion could change in a model, gradients and flags included."""
    flags = {n: (p.requires_grad, id(p.grad), p._version) for n, p in model.named_parameters()}
    return flags, {n: b._version for n, b in model.named_buffers()}, snapshot(model)


def assert_untouched(before, model):
    after = as_it_is(model)
    assert before[:2] == after[:2]
    assert_same(before[2], after[2])


def converted(model, example=IMAGE, real=None, count=True, **given):
    """Convert a model, and check all that must hold of every conversion.

    `real` are inputs with data, two images; `count` is whether torch's counter and ours must agree on the MACs.
    """
    model = model.train()
    model.bn.eval()  # a mixture of modes
    model.stem.weight.requires_grad_(False)
    before, chance = as_it_is(model), torch.get_rng_state()
    supernet = convert(model, example, **given)
    assert torch.equal(chance, torch.get_rng_state())
    assert_untouched(before, model)
    model.eval()
    real = images() if real is None else real
    inputs, named = ((), real) if isinstance(real, dict) else (real if isinstance(real, tuple) else (real,), {})
    with torch.no_grad():
        whole = tensors(model(*inputs, **named))
        for found in (supernet(*inputs, **named), supernet(*inputs, widths=supernet.space.max(), **named)):
            assert all(torch.equal(a, b) for a, b in zip(tensors(found), whole, strict=True))
        for seed in range(3):
            widths = arbitrary_widths(supernet.space, torch.Generator().manual_seed(seed))
            plain = supernet.extract(widths)
            with FlopCounterMode(display=False) as counter:
                expected = tensors(plain(*inputs, **named))
            assert expected
            if count:
                assert counter.get_total_flops() == 2 * 2 * cost(supernet, widths).macs  # two images, two for a MAC
            assert cost(supernet, widths).params == sum(p.numel() for p in plain.parameters())
            if given.get("keep_output", True):
                assert [t.shape for t in expected] == [t.shape for t in whole]
            outs = [supernet(*inputs, widths, **named), supernet(*inputs, widths=widths, **named)]
            with supernet.at(widths):
                outs += [supernet(*inputs, **named), supernet(*inputs, widths, **named)]
            for out in outs:
                assert all(torch.equal(a, b) for a, b in zip(tensors(out), expected, strict=True))
    model.train()
    model.bn.eval()
    assert_untouched(before, model)
    return supernet


# -- inputs -----------------------------------------------------------------------------------------------------------


Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Batch:
    picture: torch.Tensor
    scale: float


class Bag(dict):
    def picture(self):
        return self["x"]


def masked(self, x, mask=None, times=1, negative=False):
    x = x * times if mask is None else x * mask
    return self.logits(self.maps(-x if negative else x))


def table(self, x, table):
    return self.logits(self.maps(x) * table)


def words(self, x, ids):
    return self.logits(self.maps(x) + self.embed(ids).mean(1)[:, :, None, None])


# the body, its example, and inputs with data; what the example gives as None, a number or a flag stays what it is
INPUTS = {
    "a tuple": (lambda s, x, y: s.logits(s.maps(x + y)), (IMAGE, IMAGE), (images(), images())),
    "a dict": (lambda s, *, x, y: s.logits(s.maps(x + y)), {"x": IMAGE, "y": IMAGE}, {"x": images(), "y": images()}),
    "an ordered dict": (
        lambda s, *, x, y: s.logits(s.maps(x + y)), collections.OrderedDict(x=IMAGE, y=IMAGE),
        {"x": images(), "y": images()},
    ),
    "None, a number and a flag": (masked, (IMAGE, None, 2, True), (images(), None, 3, False)),
    "None in a dict": (masked, {"x": IMAGE, "mask": None}, {"x": images(), "mask": images()}),
    "nested tuples": (
        lambda s, pair: s.logits(s.maps(pair[0] + pair[1][0])), ((IMAGE, (IMAGE, 7)),), ((images(), (images(), 7)),),
    ),
    "a list": (lambda s, pair: s.logits(s.maps(pair[0] + pair[1])), [IMAGE, IMAGE], ([images(), images()],)),
    "a named tuple": (
        lambda s, pair: s.logits(s.maps(pair.first + pair.second)), (Pair(IMAGE, IMAGE),), (Pair(images(), images()),),
    ),
    "a dict inside a tuple": (
        lambda s, batch: s.logits(s.maps(batch["x"] * batch["times"])), ({"x": IMAGE, "times": 2},),
        ({"x": images(), "times": 3},),
    ),
    "a dict of another class": (
        lambda s, batch: s.logits(s.maps(batch.picture())), (Bag(x=IMAGE),), (Bag(x=images()),)
    ),
    "a dataclass": (
        lambda s, batch: s.logits(s.maps(batch.picture * batch.scale)), Batch(IMAGE, 2.0), Batch(images(), 3.0)
    ),
    "a tensor without dimensions": (table, (IMAGE, torch.zeros(())), (images(), torch.tensor(2.0))),
    "a tensor that is no batch": (table, (IMAGE, torch.zeros(8, 8)), (images(), images(8, 8))),
    "a scale first": (
        lambda s, scale, x: s.logits(s.maps(x * scale)), (torch.zeros(()), IMAGE), (torch.tensor(2.0), images())
    ),
    "words beside images": (
        words, (IMAGE, torch.zeros(1, 5, dtype=torch.long)), (images(), torch.randint(0, 11, (2, 5))),
    ),
    "a larger batch": (table, (images(4, 3, 8, 8), torch.zeros(4, 1, 1, 1)), (images(), images(2, 1, 1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_every_form_go_through(name):
    body, example, real = INPUTS[name]
    supernet = converted(randomise(Net(body, embed=nn.Embedding(11, 8)) if body is words else Net(body)), example, real)
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}


def test_what_follows_the_inputs_is_the_widths_and_none_is_the_widest():
    seen = []

    def body(self, x, *further):
        seen.append((further, self.stem.out_channels))
        return self.logits(self.maps(x))

    one, two = convert(Net(body), IMAGE), convert(Net(body), (IMAGE, None))
    calls = {
        lambda: one(IMAGE): ((), 8),
        lambda: one(IMAGE, None): ((), 8),
        lambda: one(IMAGE, one.space.uniform(0.5)): ((), 4),
        lambda: two(IMAGE): ((), 8),
        lambda: two(IMAGE, None): ((None,), 8),
        lambda: two(IMAGE, None, None): ((None,), 8),
        lambda: two(IMAGE, None, two.space.uniform(0.5)): ((None,), 4),
        lambda: two(IMAGE, None, widths=two.space.uniform(0.5)): ((None,), 4),
    }
    for call, expected in calls.items():
        seen.clear()
        call()
        assert seen == [expected]


def test_widths_are_never_an_input_of_the_model():
    supernet = convert(Plain(), IMAGE)
    other = convert(Plain(16), IMAGE).space.max()
    assert isinstance(other, Widths)
    for call in (lambda: supernet(IMAGE, other), lambda: supernet(IMAGE, widths=other)):
        with pytest.raises(WidthError, match="got widths of another model"):
            call()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("image.png", "got a str without a tensor; needed: a tensor .N, C, H, W., or a tuple or dict of forward's"),
        ((1, 3, 8, 8), r"got a tuple without a tensor.*such as torch.zeros\(1, 3, 224, 224\)"),
        (IMAGE.numpy(), "got a ndarray without a tensor"),
        ({}, "got a dict without a tensor"),
        (torch.zeros(0, 3, 8, 8), r"got a tensor of the shape \(0, 3, 8, 8\), which is empty; needed: a tensor"),
        ((IMAGE, {"y": torch.zeros(1, 3, 0, 8)}), r"got a tensor of the shape \(1, 3, 0, 8\), which is empty"),
    ],
)
def test_an_example_without_data_to_run_on_is_refused(example, message):
    model = Plain()
    before = as_it_is(model)
    with pytest.raises(TraceError, match=f"^example_input: {message}"):
        convert(model, example)
    assert_untouched(before, model)


@pytest.mark.parametrize(
    ("example", "shape"),
    [(torch.zeros(1, 4, 8, 8), r"2, 4, 8, 8"), (torch.zeros(3, 8, 8), "2, 8, 8"), (torch.zeros(()), "")],
    ids=["channels", "no batch", "no dimensions"],
)
def test_an_example_of_another_shape_names_the_first_module_that_fails(example, shape):
    model = Plain()
    before = as_it_is(model)
    with pytest.raises(TraceError, match=rf"^stem: its forward raised .*given inputs of the shapes \[\({shape}\)\]"):
        convert(model, example)
    assert_untouched(before, model)


def test_inputs_that_the_forward_does_not_take_are_refused():
    for example, what in (((IMAGE, IMAGE), "positional"), ({"y": IMAGE}, "keyword argument 'y'")):
        with pytest.raises(TraceError, match=f"^the model: its forward raised TypeError.*{what}"):
            convert(Plain(), example)


# -- outputs ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    maps: object = None


class Slots:
    __slots__ = ("logits", "maps")

    def __init__(self, logits, maps):
        self.logits, self.maps = logits, maps


class Slot:
    __slots__ = "both"

    def __init__(self, *both):
        self.both = both


class Recursive(Result):
    """It holds itself."""

    def __init__(self, logits, maps):
        super().__init__(logits, maps)
        self.me = None


OUTPUTS = {
    "dict": lambda maps, logits: {"maps": maps, "logits": logits},
    "list": lambda maps, logits: [logits, maps],
    "tuple": lambda maps, logits: (logits, None, maps, 3),
    "named tuple": lambda maps, logits: Pair(maps, logits),
    "dataclass": lambda maps, logits: Result(logits, maps),
    "object with slots": lambda maps, logits: Slots(logits, maps),
    "object with one slot": lambda maps, logits: Slot(logits, maps),
    "deque": lambda maps, logits: collections.deque([maps, logits]),
    "nested dict": lambda maps, logits: {"out": {"maps": maps, "none": None}, "logits": [logits]},
    "list of dicts": lambda maps, logits: [{"maps": maps}, {"logits": logits}],
    "dataclass in a dict": lambda maps, logits: {"out": Result(logits, [maps])},
    "namespace": lambda maps, logits: types.SimpleNamespace(logits=logits, maps=(maps, "name")),
}


def with_output(form, **layers):
    def body(self, x):
        maps = self.maps(x)
        return form(maps, self.logits(maps))

    return randomise(Net(body, **layers))


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_keeps_its_channels(name):
    supernet = converted(with_output(OUTPUTS[name]))
    assert supernet.space.names == ("inner",)
    assert supernet.graph.fixed["stem.weight", 0] == "an output of the model"


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_may_shrink_where_the_user_says_so(name):
    supernet = converted(with_output(OUTPUTS[name]), keep_output=False)
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16, "head": 10}


def test_an_output_that_holds_itself_ends():
    def form(maps, logits):
        out = Recursive(logits, maps)
        out.me = out
        return out

    assert convert(with_output(form), IMAGE).space.names == ("inner",)


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (lambda maps, logits: None, "NoneType"),
        (lambda maps, logits: (t for t in (maps, logits)), "generator"),
        (lambda maps, logits: {"shape": maps.shape}, "dict"),
    ],
)
def test_a_forward_that_returns_no_tensor_is_refused(form, kind):
    model = with_output(form)
    before = as_it_is(model)
    with pytest.raises(TraceError, match=f"^the model: its forward returned a {kind} without a tensor in eval.*needed"):
        convert(model, IMAGE)
    assert_untouched(before, model)


class Inner(nn.Module):
    """Takes a dict by name and returns one, so that nothing passes by position."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, *, features):
        return {"y": {"z": self.conv(input=features["x"])}}


def test_modules_that_take_and_return_dicts_are_followed_and_say_how_wide_they_are():
    model = Net(lambda s, x: s.logits(s.part(features={"x": s.maps(x)})["y"]["z"]), part=Inner())
    supernet = converted(randomise(model))
    assert supernet.space.names == ("stem", "inner", "part.conv")
    plain = supernet.extract(supernet.space.from_dict({"stem": 3, "inner": 5, "part.conv": 2}))
    assert str(plain.part.conv) == "Conv2d(3, 2, kernel_size=(1, 1), stride=(1, 1))"


@pytest.mark.parametrize("name", ["nested dict", "dataclass", "object with slots"])
def test_reentrant_checkpoints_are_found_in_outputs_of_every_form(name):
    def body(self, x):
        maps = checkpoint(self.maps, x.requires_grad_(), use_reentrant=True)
        return OUTPUTS[name](maps.detach(), self.logits(maps))

    supernet = convert(randomise(Net(body)), IMAGE)
    with pytest.raises(TraceError, match="got reentrant gradient checkpointing"):
        supernet(images(), supernet.space.min())


# -- shared modules and weights ---------------------------------------------------------------------------------------


def two(**given):
    return {"a": nn.Conv2d(8, 8, 1, **given), "b": nn.Conv2d(8, 8, 1, **given)}


def twins(build, *leaves):
    """Return two modules, of which the second has tensors of the first."""
    first, second = build(), build()
    for leaf in leaves:
        setattr(second, leaf, getattr(first, leaf))
    return {"a": first, "b": second}


def one(module):
    return {"a": module, "b": module}


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask


def bottleneck():
    return nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1))


def masks():
    return {name: Mask(mask) for mask in [torch.rand(8, 1, 1)] for name in ("a", "b")}


def chain(self, x):
    return self.logits(self.b(self.a(self.maps(x)).relu()))


def decoder(self, x):
    x = self.a(self.maps(x).permute(0, 2, 3, 1)).relu()
    return self.logits(F.linear(x, self.b.weight.t()).permute(0, 3, 1, 2))


def embedding_and_classifier():
    layers = {"a": nn.Embedding(10, 8), "b": nn.Linear(8, 10, bias=False)}
    layers["b"].weight = layers["a"].weight
    return layers


def through_a_list(self, x):
    return self.head(F.linear(self.a(self.maps(x).mean((2, 3))).relu(), self.a.kept[0].t()))


def keeps_its_weight_in_a_list():
    layer = nn.Linear(8, 6, bias=False)
    layer.kept = [layer.weight]
    return {"a": layer}


# the body, its layers, the groups, and what must be one and the same in an extracted model
SHARED = {
    "a module of two names": (chain, lambda: one(nn.Conv2d(8, 8, 1)), {}, ("a", "b")),
    "a norm of two names": (chain, lambda: one(nn.BatchNorm2d(8)), {}, ("a", "b")),
    "a block of two names": (chain, lambda: one(bottleneck()), {"a.0": 4}, ("a", "b")),
    "a block inside another": (
        chain, lambda: {"a": (block := bottleneck()), "b": nn.Sequential(block, nn.ReLU(), block)}, {"a.0": 4},
        ("a", "b.0", "b.2"),
    ),
    "a module that runs twice": (
        lambda s, x: s.logits(s.a(s.a(s.maps(x)).relu())), lambda: {"a": nn.Conv2d(8, 8, 1)}, {}, ()
    ),
    "a weight": (chain, lambda: twins(lambda: nn.Conv2d(8, 8, 1), "weight"), {}, ("a.weight", "b.weight")),
    "a weight and its transpose": (
        decoder, lambda: twins(lambda: nn.Linear(8, 6, bias=False), "weight"), {"a": 6}, ("a.weight", "b.weight")
    ),
    "an embedding that is also the classifier": (
        lambda s, x: s.b(s.maps(x).mean((2, 3)) + s.a(torch.zeros(len(x), dtype=torch.long, device=x.device))),
        embedding_and_classifier, {}, ("a.weight", "b.weight"),
    ),
    "running statistics": (
        chain, lambda: twins(lambda: nn.BatchNorm2d(8), "running_mean", "running_var"), {},
        ("a.running_mean", "b.running_mean"),
    ),
    "a buffer": (chain, masks, {}, ("a.mask", "b.mask")),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_stays_shared(name):
    body, layers, groups, same = SHARED[name]
    supernet = converted(randomise(Net(body, **layers())))
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16, **groups}
    assert not supernet.repairs
    plain = supernet.extract(supernet.space.uniform(0.5))
    found = [functools.reduce(getattr, path.split("."), plain) for path in same]
    assert all(part is found[0] for part in found)


def test_a_weight_that_a_list_holds_too_is_kept_whole():
    supernet = converted(randomise(Net(through_a_list, **keeps_its_weight_in_a_list())))
    assert supernet.space.names == ("inner",)


def test_a_shared_weight_collects_the_gradients_of_both_places():
    body, layers, *_ = SHARED["a weight and its transpose"]
    supernet = converted(randomise(Net(body, **layers())).double(), IMAGE.double(), images().double())
    widths = supernet.space.from_dict({"stem": 5, "inner": 16, "a": 3})
    plain, x = supernet.extract(widths), images().double()
    supernet(x, widths).square().mean().backward()
    plain.train().bn.eval()
    plain(x).square().mean().backward()
    whole = supernet.model.a.weight.grad
    torch.testing.assert_close(whole[:3, :5], plain.a.weight.grad, rtol=EXACT, atol=EXACT)
    assert not whole[3:].any()
    assert not whole[:, 5:].any()


# -- weights that are computed ----------------------------------------------------------------------------------------


class Standardised(nn.Module):
    def forward(self, weight):
        return weight - weight.mean((1, 2, 3), keepdim=True)


def parametrised(layer):
    register_parametrization(layer, "weight", Standardised())
    return layer


PARAMETRISED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "of the user's own": parametrised,
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_weights_are_followed_or_kept_whole(name, training):
    torch.manual_seed(0)
    model = randomise(Net(chain)).train()
    model.a, model.b = PARAMETRISED[name](nn.Conv2d(8, 6, 3, padding=1)), nn.Conv2d(6, 8, 1)
    supernet = converted(model, count=False)  # weights are computed once for all images
    assert "inner" in supernet.space.names
    assert ("a" in supernet.space.names) == (name in ("weight norm", "of the user's own"))
    supernet.train(training)
    widths = supernet.space.min()
    plain, x = supernet.extract(widths), images()
    with torch.no_grad():
        assert torch.equal(supernet(x, widths), plain(x))


def test_a_bias_of_another_length_is_found_by_the_proof(monkeypatch):
    """Torch runs such a convolution on the meta device."""
    rule = ops.RULES["convolution"]

    def forgetful(flow, op):
        rule(flow, dataclasses.replace(op, arguments={**op.arguments, "bias": None}))

    monkeypatch.setattr(ops, "RULES", {**ops.RULES, "convolution": forgetful})
    for layer in (conv(), nn.ConvTranspose2d(8, 6, 1), nn.Conv2d(8, 6, 1, groups=2)):
        supernet = converted(net(layer))
        assert any(reason.startswith("a: as a subnet it") for reason in supernet.repairs)
        assert ("a.bias", 0) in supernet.graph.fixed


# -- refused ----------------------------------------------------------------------------------------------------------


def held(value):
    """Return what a value is, by identity."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return type(value), id(value), [(name, id(v)) for name, v in inside]


def outline(model):
    """Return what every module holds: for models whose tensors cannot be compared."""
    return {
        path: {name: held(value) for name, value in vars(module).items()}
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }


def comparable(model):
    """Return whether all that a model holds are ordinary tensors."""
    held = [*model.parameters(), *model.buffers()]
    strange = any(isinstance(m, (torch.jit.ScriptModule, FullyShardedDataParallel)) for m in model.modules())
    packed = any(not isinstance(v, torch.Tensor) for v in model.state_dict().values())
    return not (strange or packed or any(nn.parameter.is_lazy(t) or t.is_inference() for t in held))


def refused(model, message, example=IMAGE):
    """Check that a model is refused with this message, and is then what it was before."""
    values = as_it_is(model) if comparable(model) else None
    shape = outline(model)
    with pytest.raises(TraceError, match=message) as caught:
        convert(model, example)
    assert outline(model) == shape
    if values:
        assert_untouched(values, model)
    return caught.value


def net(layer=None, body=chain):
    """Return a network in training mode; this layer, from 8 to 6 channels, is at the path `a`."""
    model = randomise(Net(body, a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(6, 8, 1)))
    if layer is not None:
        model.a = layer
    return model


def conv():
    return nn.Conv2d(8, 6, 1)


def compiled_in_place():
    model = net()
    model.b.compile()
    return model


def trained_in_eight_bits():
    model = net()
    model.a.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)


def observed():
    model = net()
    model.b.observer = torch.ao.quantization.MinMaxObserver()
    return model


class EightBits(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 8, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x.movedim(1, -1), self.weight.float()).movedim(-1, 1)


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.quantize_per_tensor(torch.ones(6, 8), 0.1, 0, torch.qint8))

    def forward(self, x):
        return F.linear(x.movedim(1, -1), self.weight.dequantize()).movedim(-1, 1)


def built_for_inference():
    with torch.inference_mode():
        return net()


WRAPPED = {
    "torch.compile": (lambda: torch.compile(net()), "the model: got a module compiled by torch.compile; convert its "),
    "torch.compile of a part": (lambda: net(torch.compile(conv())), "a: got a module compiled by torch.compile"),
    "compile()": (compiled_in_place, r"b: got a module compiled in place by Module.compile\(\); convert the model be"),
    "DataParallel": (lambda: nn.DataParallel(net()), "the model: got a module wrapped in DataParallel; convert its"),
    "DataParallel of a part": (lambda: net(nn.DataParallel(conv())), "a: got a module wrapped in DataParallel"),
    "scripted": (lambda: torch.jit.script(Plain()), "the model: got a scripted module; convert the model before"),
    "traced": (lambda: torch.jit.trace(Plain().eval(), IMAGE), "the model: got a scripted module; convert the mod"),
    "traced part": (lambda: net(torch.jit.trace(conv(), torch.zeros(1, 8, 4, 4))), "a: got a scripted module"),
    "lazy layer": (lambda: net(nn.LazyConv2d(6, 1)), "a: got a lazy module; run the model once on data"),
    "lazy norm": (lambda: net(nn.Sequential(conv(), nn.LazyBatchNorm2d(affine=False))), "a.1: got a lazy module"),
    "quantised": (
        lambda: net(torch.ao.nn.quantized.Conv2d(8, 6, 1)),
        r"a: got a quantised module \(torch\.ao\.nn\.quantized\..*Conv2d\); convert the model before quantising it",
    ),
    "dynamically quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(net().eval(), {nn.Linear}), "head: got a quantised module"
    ),
    "quantisation-aware": (trained_in_eight_bits, r"a: got a quantised module \(torch.ao.nn.qat"),
    "observed": (observed, r"b.observer: got a quantised module \(torch.ao.quantization.observer.MinMaxObserver\)"),
    "integer weights": (lambda: net(EightBits()), r"a.weight: got a quantised weight \(torch.int8\); convert the mod"),
    "quantised buffer": (lambda: net(Quantised()), r"a.weight: got a quantised weight \(torch.qint8\)"),
    "weight norm": (
        lambda: net(nn.utils.weight_norm(conv())),
        r"a: got a hook that computes a weight anew in each call \(torch.nn.utils.weight_norm.WeightNorm\); remove it",
    ),
    "spectral norm": (lambda: net(nn.utils.spectral_norm(conv())), "a: got a hook .*SpectralNorm.*or use parametriz"),
    "pruned": (lambda: net(prune.l1_unstructured(conv(), "weight", 0.5)), "a: got a hook .*L1Unstructured.*prune.rem"),
    "inference tensors": (built_for_inference, r"stem.weight: got a tensor made inside torch.inference_mode\(\); bui"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_a_module_that_cannot_be_sliced_is_refused_by_name(name):
    build, message = WRAPPED[name]
    refused(build(), f"^{message}.*needed: ordinary modules, with weights that are floating point numbers$")


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_spreads_a_model_over_processes_is_refused_by_name(alone):
    refused(DistributedDataParallel(net()), "^the model: got a module wrapped in DistributedDataParallel; convert its")
    refused(
        FullyShardedDataParallel(net(), device_id=torch.device("cpu")), "^the model: got a module sharded by FSDP; "
    )
    model = net()
    fully_shard(model.a, mesh=alone)
    refused(model, r"^a: got a module sharded by fully_shard \(FSDP2\); convert the plain model, and wrap the supernet")
    refused(net(distribute_module(conv(), alone)), r"^a.weight: got a tensor of torch.distributed.tensor.DTensor; conv")


def test_what_is_only_ready_to_be_wrapped_is_converted():
    """Modules of torch.ao that still compute with floating point numbers."""
    layer = torch.ao.nn.intrinsic.ConvReLU2d(conv(), nn.ReLU())
    assert converted(net(layer)).space.max().to_dict() == {"stem": 8, "inner": 16, "a.0": 6, "b": 8}
    model = randomise(mobilenet_v2(quantize=False, width_mult=0.1, num_classes=3)).eval()
    supernet = convert(model, torch.zeros(1, 3, 32, 32))
    widths, x = supernet.space.uniform(0.5), torch.randn(2, 3, 32, 32)
    assert torch.equal(supernet(x, widths), supernet.extract(widths)(x))


def test_integers_that_are_no_weights_are_left_alone():
    """Indexes are often kept as parameters."""

    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.order = nn.Parameter(torch.arange(8).flip(0), requires_grad=False)

        def forward(self, x):
            return x[:, :, self.order]

    supernet = converted(randomise_without(Net(lambda s, x: s.logits(s.a(s.maps(x))), a=Shuffle()), "a.order"))
    assert supernet.space.names == ("stem", "inner")


def randomise_without(model, name):
    """Leave this parameter as it is."""
    path, _, leaf = name.rpartition(".")
    kept = model.get_submodule(path)._parameters.pop(leaf)
    randomise(model).get_submodule(path)._parameters[leaf] = kept
    return model


# -- forwards that raise ----------------------------------------------------------------------------------------------


def raises(self, x):
    self.maps(x)
    raise KeyError("mask")


# the forward, and what the error says of it
READS = {
    "item": (lambda s, x: s.logits(s.maps(x) * s.bn.weight.mean().item()), "RuntimeError"),
    "if": (lambda s, x: s.logits(s.maps(x if x.mean() > 0 else -x)), "RuntimeError"),
    "int": (lambda s, x: s.logits(s.maps(x) * int(x.amax())), "RuntimeError"),
    "any": (lambda s, x: s.logits(s.maps(x.nan_to_num() if x.isnan().any() else x)), "RuntimeError"),
    "nonzero": (lambda s, x: s.logits(s.maps(x))[x.mean((1, 2, 3)).nonzero()[:, 0]], "NotImplementedError"),
    "a boolean mask": (lambda s, x: s.maps(x)[x[:, :1].expand(-1, 8, -1, -1) > 0], "NotImplementedError"),
    "unique": (lambda s, x: s.maps(x).unique(), "NotImplementedError"),
    "tolist": (lambda s, x: s.logits(s.maps(x) * x.flatten().tolist()[0]), "NotImplementedError"),
    "numpy": (lambda s, x: s.logits(s.maps(x) * float(x.numpy().mean())), "TypeError"),
    "repeats": (lambda s, x: s.logits(s.maps(x)).repeat_interleave((x.mean((1, 2, 3)) > 0).long(), 0), "RuntimeError"),
}


@pytest.mark.parametrize("name", READS)
def test_a_forward_that_reads_data_is_refused(name):
    body, kind = READS[name]
    error = refused(
        Net(body), rf"its forward raised {kind} in train\(\) mode on the meta device .* without reading data values; "
    )
    assert type(error.__cause__).__name__ == kind


def test_a_module_that_reads_data_is_named():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = Net(lambda s, x: s.logits(s.part(s.maps(x))), part=nn.Sequential(nn.ReLU(), Gate()))
    refused(
        model, r"^part\.1: its forward raised RuntimeError.*given inputs of the shapes \[\(2, 8, 8, 8\)\]; needed: "
    )


def test_a_forward_that_raises_is_refused_with_the_cause_and_the_place():
    error = refused(Net(raises), r"\('mask'\), in the code of the model after bn_outer had run; needed: a forward that")
    assert type(error.__cause__) is KeyError
    assert error.__cause__.args == ("mask",)

    class Late(nn.Module):
        def forward(self, x):
            return x if self.training else self.missing(x)

    refused(
        nn.Sequential(nn.Conv2d(3, 8, 1), Late()),
        r"^1: its forward raised AttributeError in eval\(\) mode on the meta device .*'Late' object has no attribute",
    )


def test_what_stops_the_program_is_no_error_of_the_model():
    def stop(self, x):
        raise KeyboardInterrupt

    model = Net(stop)
    before = as_it_is(model)
    with pytest.raises(KeyboardInterrupt):
        convert(model, IMAGE)
    assert_untouched(before, model)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_forward_that_is_bound_to_the_model_itself_is_refused(training):
    """Run on the copy, it would move the statistics of the model."""
    model = net().train(training)
    inner = model.forward
    model.forward = lambda x: 2 * inner(x)
    refused(
        model,
        r"^the model: its forward runs on the weights of this very model.*needed: .* types.MethodType\(function, mod",
    )


def test_a_forward_that_was_replaced_by_a_method_is_followed():
    for replace in (lambda model, f: types.MethodType(f, model), lambda model, f: functools.partial(f, model)):
        model = net()
        model.forward = replace(model, lambda self, x: 2 * chain(self, x))
        assert converted(model).space.names == ("stem", "inner", "a", "b")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            threading.Lock(),
            r"^a\.kept: cannot be copied \(TypeError: cannot pickle .*lock.*; needed: a model that copy.deep",
        ),
        (
            [torch.ones(2, requires_grad=True) * 2],
            r"^a\.kept: cannot be copied \(RuntimeError: Only Tensors created expl",
        ),
    ],
    ids=["lock", "activation"],
)
def test_a_model_that_cannot_be_copied_is_refused_with_the_attribute(value, message):
    model = net()
    model.a.kept = value
    refused(model, message)


# -- where the model is, and where it is converted --------------------------------------------------------------------


def test_a_model_without_data_is_converted():
    model = net().to("meta")
    before = outline(model)
    supernet = convert(model, IMAGE)
    assert outline(model) == before
    widths = supernet.space.from_dict({"stem": 5, "inner": 7, "a": 2, "b": 8})
    plain = supernet.extract(widths)
    assert plain.a.weight.shape == (2, 5, 1, 1)
    assert plain.a.weight.is_meta
    assert supernet(IMAGE.to("meta"), widths).shape == plain(IMAGE.to("meta")).shape == (1, 10)
    assert cost(supernet, widths).params == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu"), lambda: torch.device("meta")],
    ids=["inference_mode", "no_grad", "autocast", "meta"],
)
def test_the_context_of_the_call_changes_nothing(context):
    expected = convert(net(), IMAGE, order="l1")
    model = net()
    model.load_state_dict(expected.model.state_dict())
    with context():
        supernet = convert(model, IMAGE, order="l1")
    assert supernet.space.max() == expected.space.max()
    assert supernet.graph.fixed == expected.graph.fixed
    supernet.train()(images(), supernet.space.min()).sum().backward()
    assert all(p.grad is not None for p in supernet.parameters())


def test_layers_that_are_dropped_by_chance_are_traced_along_one_path():
    def body(self, x):
        x = self.maps(x)
        for layer in self.layers:
            if not self.training or torch.rand([]) < 0.5:
                x = x + layer(x)
        return self.logits(x)

    supernet = converted(randomise(Net(body, layers=nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(8)))))
    assert supernet.space.max().to_dict() == {"stem": 8, "inner": 16}
    assert not supernet.repairs


def test_a_model_that_keeps_an_activation_can_be_extracted_after_a_pass_with_gradients():
    class Keeping(Plain):
        def forward(self, x):
            self.last = self.stem(x)
            return super().forward(x)

    images = torch.randn(2, 3, 16, 16)
    supernet = convert(Keeping().eval(), images)
    widths = supernet.space.min()
    kept = supernet(images, widths)
    assert torch.equal(supernet.extract(widths)(images), kept)
