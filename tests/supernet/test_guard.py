"""A model that changes after it was converted: what slices and costs count on is noticed at the next use."""

import copy
import io
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

from timm_autoslim import (
    baseline,
    convert,
    cost,
    cost_by_module,
    reach,
    sandwich_step,
    search,
    uniform_at,
)
from timm_autoslim.errors import ModelChangedError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem, a pool, a layer that is tied to another, a norm without weights, and a counter."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, affine=False), nn.MaxPool2d(2)
        self.one, self.two, self.three = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight
        self.act, self.drop, self.head = nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 5)
        self.calls, self.last_size = 0, (0, 0)

    def forward(self, x):
        self.calls, self.last_size = self.calls + 1, tuple(x.shape[-2:])
        x = self.pool(self.norm(self.stem(x)))
        x = self.act(self.three(self.two(self.one(x))))
        return self.head(self.drop(x.mean((2, 3))))


def make(name="net"):
    torch.manual_seed(0)
    if name == "net":
        model = Net()
    elif name == "vit":
        model = timm.create_model("test_vit", img_size=32, depth=2, num_classes=5)
    elif name == "swin":
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2),
            num_classes=5,
        )  # fmt: skip
    else:
        model = timm.create_model("resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=5)
    return convert(model.eval(), torch.zeros(1, 3, 64 if name == "swin" else 32, 64 if name == "swin" else 32)).eval()


def tie(model):
    model.three.weight = model.one.weight


def untie(model):
    model.two.weight = nn.Parameter(model.one.weight.detach().clone())


def replace(name, make_module):
    return lambda model: model.set_submodule(name, make_module())


def assign(name, attribute, value):
    return lambda model: setattr(model.get_submodule(name), attribute, value)


# model, what changes it, and what the error says
CHANGES = {
    "reset_classifier": ("resnet", lambda m: m.reset_classifier(7), "fc.weight has the shape (7, 32), and had (5, 32)"),
    "reset_classifier(0)": ("resnet", lambda m: m.reset_classifier(0), "fc.weight is gone; fc.bias is gone"),
    "set_input_size": ("vit", lambda m: m.set_input_size((64, 64)), "pos_embed has the shape (1, 17, 64)"),
    "set_input_size of buffers and numbers": (
        "swin", lambda m: m.set_input_size((128, 128), window_size=(4, 4)), "patch_embed.img_size is (128, 128)"
    ),
    "another kernel": (
        "resnet", replace("layer3.0.conv2", lambda: nn.Conv2d(24, 24, 5, padding=2, bias=False)),
        "layer3.0.conv2.weight has the shape (24, 24, 5, 5), and had (24, 24, 3, 3)",
    ),
    "another stride": ("net", assign("stem", "stride", (1, 1)), "stem.stride is (1, 1), and was (2, 2)"),
    "another pool": ("net", replace("pool", nn.Identity), "pool.kernel_size is gone, and was 2"),
    "a bias": ("resnet", assign("conv1.0", "bias", nn.Parameter(torch.ones(8))), "conv1.0.bias is new, of the shape"),
    "no bias": ("net", assign("three", "bias", None), "three.bias is gone"),
    "a layer more": ("net", lambda m: m.add_module("more", nn.Linear(2, 2)), "more.weight is new, of the shape (2, 2)"),
    "a layer in a leaf": ("net", lambda m: m.act.add_module("more", nn.Linear(2, 2)), "act.more.weight is new"),
    "a weight in a leaf": ("net", assign("act", "slope", nn.Parameter(torch.ones(8))), "act.slope is new"),
    "a weight by its data": (
        "net", lambda m: setattr(m.head.weight, "data", torch.ones(6, 8)), "head.weight has the shape (6, 8)"
    ),
    "a tie": ("net", tie, "three.weight is tied to one.weight, and was not tied"),
    "no tie": ("net", untie, "two.weight is not tied, and was tied to one.weight"),
    "statistics": (
        "net", replace("norm", lambda: nn.BatchNorm2d(6, affine=False)), "norm.running_mean has the shape (6,), and had"
    ),
    "another number of heads": ("vit", assign("blocks.0.attn", "head_dim", 2), "blocks.0.attn.head_dim is 2, and was"),
    "a parametrization": (
        "net", lambda m: parametrizations.weight_norm(m.stem), "stem.weight is gone; stem.parametrizations.weight."
    ),
}  # fmt: skip


COSTS_ALONE = ("another stride", "set_input_size of buffers and numbers")  # the forward goes on as the user wants it


def list_uses(supernet):
    """Return the uses that count on the slices of the model as it was, and those that count on its costs."""
    space, widths = supernet.space, supernet.space.uniform(0.5)
    generator, loss = torch.Generator(), nn.functional.cross_entropy

    def in_block():
        with supernet.at(widths):
            supernet(IMAGES)

    def train():
        sandwich_step(supernet, space, IMAGES, torch.tensor([0, 1]), loss, generator=generator)

    slices = [
        lambda: supernet(IMAGES, widths), lambda: supernet(IMAGES, space.max()), lambda: supernet.subnet(widths),
        in_block, train,
    ]  # fmt: skip
    costs = [
        supernet.extract, lambda: supernet.extract(widths), supernet.check_model, lambda: cost(supernet),
        lambda: cost(supernet, widths, batch_size=1), lambda: cost_by_module(supernet), lambda: reach(supernet),
        lambda: uniform_at(supernet, "macs", 0.7), lambda: search(supernet, ["70%"], lambda model: 1.0),
        lambda: baseline(supernet, ["70%"], lambda model: 1.0, "uniform"),
    ]  # fmt: skip
    return slices, costs


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_at_the_next_use(change):
    name, apply, text = CHANGES[change]
    supernet = make(name)
    widths = supernet.space.uniform(0.5)
    supernet.extract(widths)
    apply(supernet.model)
    slices, costs = list_uses(supernet)
    for use in costs if change in COSTS_ALONE else slices + costs:
        with pytest.raises(ModelChangedError, match=f"since it was converted .*{re.escape(text)}.*; convert it again"):
            use()
    assert all(p.grad is None for p in supernet.parameters())


def test_a_changed_model_that_is_converted_again_has_new_numbers():
    supernet = make("resnet")
    before = cost(supernet).macs
    supernet.model.reset_classifier(7)
    again = convert(supernet.model, IMAGES)
    assert cost(again).macs == before + 2 * 32


def functional(supernet, widths):
    parameters = {name: p.detach().clone() for name, p in supernet.named_parameters()}
    torch.func.functional_call(supernet, parameters, (IMAGES, widths))


def data_parallel(supernet, widths):
    """Run the replica that DataParallel makes, which has its parameters elsewhere."""
    modules = {id(module): module._replicate_for_data_parallel() for module in supernet.modules()}
    for module in supernet.modules():
        copied = modules[id(module)]
        for name, child in module._modules.items():
            copied._modules[name] = modules[id(child)]
        copied._former_parameters = {}
        for name, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[name] = None
            else:
                setattr(copied, name, parameter.detach().clone())
                copied._former_parameters[name] = getattr(copied, name)
    modules[id(supernet)](IMAGES, widths)


def load(supernet, _):
    supernet.load_state_dict({name: t.clone() for name, t in supernet.state_dict().items()}, assign=True)


# model, and what may happen to it
ALLOWED = {
    "another type": ("resnet", lambda s, w: s.double().float()),
    "half": ("net", lambda s, w: s.bfloat16().float()),
    "channels last": ("resnet", lambda s, w: s.to(memory_format=torch.channels_last)),
    "requires_grad": ("net", lambda s, w: s.requires_grad_(False)),
    "other weights": ("resnet", lambda s, w: [p.data.normal_() for p in s.parameters()]),
    "other tensors": ("resnet", load),
    "functional_call": ("resnet", functional),
    "DataParallel": ("resnet", data_parallel),
    "train": ("net", lambda s, w: s.train()(IMAGES, w)),
    "its own counters": ("net", lambda s, w: s(IMAGES)),
    "another size of images": ("resnet", lambda s, w: s(torch.zeros(1, 3, 64, 64))),
    "a hook": ("net", lambda s, w: s.model.three.register_forward_hook(lambda *_: None)),
    "SyncBatchNorm": ("resnet", lambda s, w: nn.SyncBatchNorm.convert_sync_batchnorm(s)),
    "another activation": ("net", lambda s, w: replace("act", nn.GELU)(s.model)),
    "another dropout": ("net", lambda s, w: replace("drop", nn.Identity)(s.model)),
    "the same head again": ("resnet", lambda s, w: s.model.reset_classifier(5)),
    "a number of the user's": ("net", lambda s, w: setattr(s.model, "epoch", 3)),
    "gradient checkpointing": ("vit", lambda s, w: s.model.set_grad_checkpointing()),
    "compile": ("net", lambda s, w: s.model.three.compile(backend="eager")),
}


@pytest.mark.parametrize("change", ALLOWED)
def test_what_changes_neither_slices_nor_costs_is_allowed(change):
    name, apply = ALLOWED[change]
    supernet = make(name)
    widths, costs = supernet.space.uniform(0.5), cost(supernet)
    supernet(IMAGES, widths)
    apply(supernet, widths)
    supernet.eval()
    with torch.no_grad():
        assert torch.equal(supernet(IMAGES, widths), supernet.extract(widths)(IMAGES))
    assert cost(supernet) == costs


def test_parametrizations_that_were_converted_are_allowed():
    model = Net().eval()
    parametrizations.weight_norm(model.three)
    supernet = convert(model, IMAGES).eval()
    widths = supernet.space.uniform(0.5)
    for _ in range(2):
        assert torch.equal(supernet(IMAGES, widths), supernet.extract(widths)(IMAGES))
    cost(supernet)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_supernet_notices_its_own_changes(how):
    supernet = make("resnet")
    widths = supernet.space.uniform(0.5)
    supernet(IMAGES, widths)
    if how == "deepcopy":
        other = copy.deepcopy(supernet)
    else:
        buffer = io.BytesIO()
        torch.save(supernet, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    for _ in range(2):
        assert torch.equal(other(IMAGES, widths), supernet(IMAGES, widths))
    other.model.reset_classifier(7)
    with pytest.raises(ModelChangedError, match=r"fc\.weight"):
        other(IMAGES, widths)
    supernet(IMAGES, widths)
    supernet.model = other.model
    with pytest.raises(ModelChangedError, match=r"fc\.weight"):
        supernet(IMAGES, widths)
