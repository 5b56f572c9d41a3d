"""Weights that the code finds outside of the module tree are named, with what holds them."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers.conversions import IMAGE, make_net
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from timm_autoslim import convert
from timm_autoslim.errors import ModelChangedError, NothingToSlimError, TraceError
from timm_autoslim.slicing.slices import shrink_model
from timm_autoslim.tracing.strays import explain_stray


class Holder:
    """Holds a layer outside of the module tree."""

    def __init__(self, layer):
        self.layer = layer

    def run(self, x):
        return self.layer(x)


def test_a_layer_that_an_object_holds_is_named_with_the_object():
    model = make_net(body=lambda s, x: s.logits(s.b(s.holder.run(s.maps(x)).relu())))
    model.holder = Holder(model.a)
    reason = r"in a subnet, a.\w+ has its full width: a is also held by an object of class Holder \(holder\)"
    with pytest.raises(NothingToSlimError, match=reason):
        convert(model, IMAGE)


def test_a_weight_that_an_object_holds_is_fixed_with_the_object_as_the_reason():
    model = make_net(body=lambda s, x: s.logits(s.b(F.conv2d(s.maps(x), s.holder.layer["w"]).relu())))
    model.holder = Holder({"w": model.a.weight})
    supernet = convert(model, IMAGE)
    reason = "a.weight is also held by an object of class Holder (holder), outside of the module tree; the forward must"
    assert reason in supernet.repairs[0]
    assert "inner" in supernet.space.names


class Slotted:
    __slots__ = ("part",)


@pytest.mark.parametrize("way", ["an object in a list", "an object of an object", "slots", "nothing"])
def test_the_holder_is_found(way):
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4)))
    inner = Holder(model[1])
    slotted = Slotted()
    slotted.part = model[1]
    values = {"an object in a list": [{"a": inner}], "an object of an object": Holder(inner), "slots": slotted}
    model[0].extra = values.get(way)
    text = explain_stray(model, "1.0.weight")
    if way == "nothing":
        assert text == "1.0.weight has its full width: the forward must find it as self.1.0.weight"
    else:
        kind = "Slotted" if way == "slots" else "Holder"
        assert f"1 is also held by an object of class {kind} (0.extra), outside of the module tree" in text


def test_a_list_of_modules_is_no_holder():
    model = nn.Sequential(nn.Linear(2, 3))
    model.ways = [model[0], (model[0],), {"a": torch.ones(1)}]
    assert "also held" not in explain_stray(model, "0.weight")


# ---------------------------------------------------------------------------------------------- hooks that read numbers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.o(self.b(self.a(x).relu()).relu())


class Trainer:
    """Holds the model, and has hooks."""

    def __init__(self, model, read=None):
        self.model, self.read, self.outputs = model, read, []

    def hook(self, module, args, out):
        return out * self.read(self.model)

    __call__ = hook

    def collect(self, module, args, out):
        self.outputs.append(out.shape)


READS = {
    "mean": lambda model: model.a.weight.mean(),
    "number": lambda model: float(model.a.weight.abs().sum()),
    "shape": lambda model: model.a.weight.shape[0],
    "attribute": lambda model: model.a.out_channels,
}
PLACES = {}


def hook_a_method(model, read):
    return Trainer(model, read).hook


def hook_a_callable(model, read):
    return Trainer(model, read)


def hook_a_method_of_what_the_model_holds(model, read):
    model.trainer = Trainer(model, read)
    return lambda module, args, out: out * read(model.trainer.model)


def close_over_an_object(model, read):
    trainer = Trainer(model)
    return lambda module, args, out: out * read(trainer.model)


def close_over_an_outer_module(model, read):
    outer = nn.Module()
    outer.model = model
    return lambda module, args, out: out * read(outer.model)


def close_over_a_global(model, read):
    PLACES["net"] = model
    return lambda module, args, out: out * read(PLACES["net"])


def close_over_a_set(model, read):
    models = {model}
    return lambda module, args, out: out * read(next(iter(models)))


def close_over_each_other(model, read):
    def first(n):
        return second(n - 1) if n else read(model)

    def second(n):
        return first(n - 1) if n else read(model)

    return lambda module, args, out: out * first(3)


FOLLOWED = [close_over_a_set, close_over_each_other]
FIXED = [hook_a_method, hook_a_callable, hook_a_method_of_what_the_model_holds]
REFUSED = [close_over_an_object, close_over_an_outer_module, close_over_a_global]


def attach(model, make, read):
    model.b.register_forward_hook(make(model, READS[read]))
    return model


def check_numbers(supernet, make, read):
    """A subnet and the extracted model compute what a model does that was narrowed itself."""
    widths, images = supernet.space.uniform(0.5), torch.randn(2, 3, 8, 8)
    narrowed = Net()
    narrowed.load_state_dict(supernet.model.state_dict())
    shrink_model(attach(narrowed, make, read), supernet.graph.slices(widths.values_))
    with torch.no_grad():
        expected = narrowed(images)
        assert torch.equal(supernet(images, widths), expected)
        assert torch.equal(supernet.extract(widths)(images), expected)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("make", [*FOLLOWED, *FIXED, *REFUSED])
def test_a_hook_that_reads_a_number_of_a_layer_is_followed_fixed_or_refused(make, read):
    model = attach(Net(), make, read)
    if make in REFUSED:
        with pytest.raises(TraceError, match=r"^b: got a forward hook \(<lambda>\) that can read a as .*a, also in a"):
            convert(model, IMAGE)
        return
    supernet = convert(model, IMAGE)
    assert supernet.space.names == (("b",) if make in FIXED or read == "number" else ("a", "b"))
    if make in FIXED and read != "number":
        assert re.match(r"b: a forward hook \(.*\) can read a as .*model\.a, which has its full", supernet.repairs[0])
    check_numbers(supernet, make, read)


@pytest.mark.parametrize("make", [*FIXED, *REFUSED, *FOLLOWED])
def test_a_hook_that_is_added_later_is_followed_or_refused(make):
    supernet = convert(Net(), IMAGE)
    attach(supernet.model, make, "mean")
    if make in FOLLOWED:
        check_numbers(supernet, make, "mean")
        return
    with pytest.raises(ModelChangedError, match=r"^b: got a forward hook \(.*\) that can read a of the original as "):
        supernet(torch.ones(1, 3, 8, 8), supernet.space.min())
    if make in REFUSED:  # the others are copied with the model
        with pytest.raises(ModelChangedError, match=r"can read a of the original"):
            supernet.extract()


def test_a_hook_of_an_object_that_holds_the_model_and_does_not_mention_it_holds_nothing():
    model = Net()
    trainer = Trainer(model)
    model.a.register_forward_hook(trainer.collect)
    model.b.register_forward_hook(lambda *args: trainer.collect(*args))
    supernet = convert(model, IMAGE)
    assert supernet.space.names == ("a", "b")
    assert not supernet.repairs
    trainer.outputs.clear()
    supernet(torch.ones(1, 3, 8, 8), supernet.space.min())
    assert trainer.outputs == [(1, 1, 8, 8), (1, 1, 8, 8)]


def test_a_number_that_the_forward_reads_of_a_layer_in_an_object_fixes_its_channels():
    model = make_net(body=lambda s, x: s.logits(s.b(s.a(s.maps(x)).relu()) * s.holder.layer.weight.mean()))
    model.holder = Holder(model.a)
    supernet = convert(model, IMAGE)
    assert "a" not in supernet.space.names
    assert any("holder" in reason for reason in supernet.repairs)


def test_a_weight_that_only_the_proof_sees_at_full_width_is_fixed():
    """Code of torch is not read, and so what it finds is not told from names."""

    class Norm(nn.Identity):
        def forward(self, x):
            return x * self.holder.layer.weight.mean()

    Norm.__module__ = "torch.nn.modules.none"
    model = make_net(body=lambda s, x: s.logits(s.norm(s.b(s.a(s.maps(x)).relu()))))
    model.norm = Norm()
    model.norm.holder = Holder(model.a)
    supernet = convert(model, IMAGE)
    assert "a" not in supernet.space.names
    assert any("a.weight has its full width" in reason for reason in supernet.repairs)


def test_a_class_that_holds_the_model_is_refused():
    class Kept(Net):
        kept = None

        def forward(self, x):
            return super().forward(x) * Kept.kept.a.out_channels

    Kept.kept = Kept()
    with pytest.raises(TraceError, match=r"^the model: got the forward that can read a as "):
        convert(Kept.kept, IMAGE)


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_of_all_modules_that_reads_the_model_is_refused(late):
    model = Net()
    supernet = convert(model, IMAGE)

    def hook(module, args, out):
        return out * model.a.weight.mean() if module.__class__ is nn.Conv2d else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        error = ModelChangedError if late else TraceError
        with pytest.raises(error, match=r"^the model: got a hook of all modules \(.*hook\) that can read a "):
            supernet(IMAGE, supernet.space.min()) if late else convert(model, IMAGE)
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------- objects that only stand beside them


def extract_features(model):
    return create_feature_extractor(model, {"a": "first", "o": "last"})


def look_at_gradients(model):
    class Cam:
        def __init__(self):
            self.model = model

        def save(self, module, args, out):
            self.act = out.detach()

        def __call__(self, images):
            return self.model(images)

    model.b.register_forward_hook(Cam().save)
    return model


@dataclass
class State:
    model: object
    steps: int = 0

    def hook(self, module, args, out):
        self.steps += 1


def count_in_a_dataclass(model):
    model.b.register_forward_hook(State(model).hook)
    return model


def count_in_a_dataclass_by_a_closure(model):
    state = State(model)

    def hook(module, args, out):
        state.steps += 1

    model.b.register_forward_hook(hook)
    return model


def collect_in_an_outer_module(model):
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.features = model, {}

        def make_hook(self, name):
            def hook(module, args, out):
                self.features[name] = out

            return hook

        def forward(self, images):
            self.model(images)
            return self.features

    model.b.register_forward_hook(Features().make_hook("b"))
    return model


def look_at_gradients_of_all(model):
    trainer = Trainer(model)
    model.b.register_full_backward_hook(lambda *_: [p.grad for p in trainer.model.parameters()] and None)
    return model


class Proxy:
    """Finds layers by special methods."""

    def __init__(self, model):
        self.kept = model

    def __getattr__(self, name):
        return getattr(self.__dict__["kept"], name)

    def __getitem__(self, name):
        return self.kept.get_submodule(name)

    def __call__(self):
        return self.kept.a

    def index(self):
        return self["a"]

    def call(self):
        return self()

    @property
    def layer(self):
        return self["a"]

    def __enter__(self):
        return self.kept.a

    def __exit__(self, *error):
        pass


def hook_with_a_block(proxy):
    def hook(module, args, out):
        with proxy as layer:
            return out * layer.weight.mean()

    return hook


PROXIES = {
    "an attribute": lambda proxy: lambda module, args, out: out * proxy.a.weight.mean(),
    "an index in a method": lambda proxy: lambda module, args, out: out * proxy.index().weight.mean(),
    "a call in a method": lambda proxy: lambda module, args, out: out * proxy.call().weight.mean(),
    "an index in a property": lambda proxy: lambda module, args, out: out * proxy.layer.weight.mean(),
    "a block": hook_with_a_block,
}


@pytest.mark.parametrize("way", PROXIES)
@pytest.mark.parametrize("late", [False, True])
def test_special_methods_that_taking_an_attribute_leads_to_are_followed(way, late):
    model = Net()
    supernet = convert(model, IMAGE) if late else None
    model.b.register_forward_hook(PROXIES[way](Proxy(model)))
    if supernet:
        with pytest.raises(ModelChangedError, match="can read a"):
            supernet(torch.ones(1, 3, 8, 8), supernet.space.min())
    else:
        with pytest.raises(TraceError, match="can read a"):
            convert(model, IMAGE)


BESIDE = [look_at_gradients, count_in_a_dataclass, count_in_a_dataclass_by_a_closure, collect_in_an_outer_module,
          look_at_gradients_of_all]  # fmt: skip


@pytest.mark.parametrize("stand", [extract_features, *BESIDE])
def test_code_that_does_not_reach_for_the_model_of_its_object_holds_nothing(stand):
    supernet = convert(stand(Net()), IMAGE)
    assert len(supernet.space) == (1 if stand is extract_features else 2)  # whose first features are an output
    assert not supernet.repairs


@pytest.mark.parametrize("stand", BESIDE)
def test_such_code_may_be_added_later(stand):
    supernet = convert(Net(), IMAGE)
    stand(supernet.model)
    widths = supernet.space.min()
    images = torch.ones(1, 3, 8, 8)
    assert torch.equal(supernet.extract(widths)(images), supernet(images, widths))


def test_what_a_forward_finds_is_looked_at_once(monkeypatch):
    model = make_net(body=lambda s, x: s.logits(s.b(s.a(s.maps(x)).relu()) * s.settings.gain))
    model.settings = SimpleNamespace(gain=2.0)
    supernet = convert(model, IMAGE)
    monkeypatch.setattr("timm_autoslim.tracing.strays.Walk", None)
    supernet.subnet(supernet.space.min())
