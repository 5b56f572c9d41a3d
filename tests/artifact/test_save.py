"""Slim models of any class: saved to a folder, and made again of a freshly built original."""

import copy
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers.models import randomise
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn

import timm_autoslim
from timm_autoslim import calibrate, convert, export, load, save
from timm_autoslim.errors import ArtifactError, OutputExistsError, StaleStatisticsError

IMAGES = torch.randn(4, 3, 16, 16)


class Attention(nn.Module):
    """Attention whose scale is a divisor, an attribute of the power +0.5."""

    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads, self.head_dim, self.root = heads, dim // heads, (dim // heads) ** 0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = (q @ k.transpose(-2, -1) / self.root).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, length, self.heads * self.head_dim))


class Net(nn.Module):
    """Two heads on a tower with attention, an auxiliary head in training, and a table that no checkpoint holds."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 3, 2, 1, groups=2)
        self.attention = Attention(32)
        self.aux = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        self.first, self.second = nn.Linear(32, classes), nn.Linear(32, 2)
        self.register_buffer("table", torch.linspace(0, 1, 16)[:, None, None], persistent=False)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu() + self.table
        aux = self.aux(x).mean((2, 3)) if self.training else None
        h = self.attention(self.wide(x).relu().flatten(2).transpose(1, 2)).mean(1)
        out = {"first": self.first(h), "second": self.second(h)}
        return {**out, "aux": aux} if self.training else out


def build(**arguments):
    torch.manual_seed(1)
    return Net(**arguments)


def make_slim(share=0.5, trained=True):
    supernet = convert(randomise(build()), IMAGES[:1])
    slim = supernet.extract(supernet.space.uniform(share))
    if trained:
        for module in slim.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.fill_(1)
    return slim


def equal(model, other):
    with torch.no_grad():
        ours, others = model.eval()(IMAGES), other.eval()(IMAGES)
    return all(torch.equal(ours[key], others[key]) for key in ("first", "second"))


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_saved_model_is_made_again_of_a_fresh_original(share, tmp_path):
    slim, original = make_slim(share), build()
    loaded = load(save(slim, tmp_path / "slim"), original)
    assert loaded is original
    assert equal(loaded, slim)
    assert loaded.autoslim == slim.autoslim
    assert loaded.attention.head_dim == slim.attention.head_dim
    assert loaded.attention.root == slim.attention.root
    assert {p.name for p in (tmp_path / "slim").iterdir()} == {"config.json", "model.safetensors"}
    again = load(save(loaded, tmp_path / "again"), build())
    assert equal(again, slim)


def test_a_model_of_another_type_and_mode_keeps_them(tmp_path):
    folder = save(make_slim(), tmp_path / "slim")
    original = build().double().eval().requires_grad_(False)
    loaded = load(folder, original)
    assert loaded.stem.weight.dtype == torch.float64
    assert not loaded.training
    assert not loaded.stem.weight.requires_grad


def test_a_layer_without_statistics_is_refused_unless_it_does_not_run(tmp_path):
    slim = make_slim(trained=False)
    with pytest.raises(StaleStatisticsError, match=r"calibrate"):
        save(slim, tmp_path / "slim")
    calibrate(slim, [IMAGES])
    with pytest.raises(StaleStatisticsError, match=r"aux\.1: .*example_input"):
        save(slim, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()
    assert equal(load(save(slim, tmp_path / "slim", example_input=IMAGES), build()), slim)


def test_an_original_of_another_shape_is_refused_and_stays(tmp_path):
    folder, original = save(make_slim(), tmp_path / "slim"), build(classes=6)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    with pytest.raises(ArtifactError, match=r"first\.(weight|bias).*got shape .*nothing was loaded"):
        load(folder, original)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert not hasattr(original, "autoslim")
    with pytest.raises(ArtifactError, match=r"which has none of this name"):
        load(folder, nn.Linear(2, 2))


def build_small():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(16, 3, 1)
    return nn.Sequential(*layers)


def make_small():
    supernet = convert(build_small().eval(), IMAGES)
    slim = supernet.extract(supernet.space.uniform(0.5))
    calibrate(slim, [IMAGES])
    return slim.eval()


# what changes a model by hand, and what the error names
BY_HAND = {
    "activation": (lambda m: m.__setitem__(2, nn.GELU()), "2 is: GELU, and was: ReLU"),
    "eps": (lambda m: setattr(m[1], "eps", 0.5), "1.eps is 0.5, and was 1e-05"),
    "stride": (lambda m: setattr(m[0], "stride", (2, 2)), "0.stride is (2, 2), and was (1, 1)"),
    "hook": (lambda m: m[0].register_forward_hook(lambda *a: 2 * a[2]), "0 is: Conv2d with 1 forward hook"),
    "layer more": (lambda m: m.append(nn.Conv2d(3, 3, 1)), "5 is new: Conv2d"),
    "layer without weights": (lambda m: m.append(nn.Sigmoid()), "5 is new: Sigmoid"),
}


@pytest.mark.parametrize("change", [*BY_HAND, "head", "narrowed number"])
def test_a_model_that_was_changed_by_hand_is_not_saved(change, tmp_path):
    further = {
        "head": (lambda m: m.__setitem__(4, nn.Conv2d(8, 5, 1)), "4.weight has the shape (5, 8, 1, 1), and had (3, 8"),
        "narrowed number": (lambda m: setattr(m[0], "out_channels", 5), "0.out_channels: got 5; needed: 8"),
    }
    apply, message = {**BY_HAND, **further}[change]
    slim = make_small()
    apply(slim)
    with pytest.raises(ArtifactError, match=rf"{re.escape(message)}.*undo changes by hand before save"):
        save(slim, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize("change", BY_HAND)
def test_an_original_that_was_built_otherwise_is_refused_and_stays(change, tmp_path):
    apply, message = BY_HAND[change]
    folder, original = save(make_small(), tmp_path / "slim"), build_small()
    apply(original)
    needed = r"nothing was loaded; give load\(\) the original, built as it was for convert\(\)"
    with pytest.raises(ArtifactError, match=rf"({re.escape(message)}|5\.weight.*got no such|5\.weight).*{needed}"):
        load(folder, original)
    assert original[0].weight.shape[0] == 16


def test_a_loaded_model_that_was_changed_by_hand_is_not_saved(tmp_path):
    loaded = load(save(make_small(), tmp_path / "slim"), build_small())
    loaded[2] = nn.GELU()
    with pytest.raises(ArtifactError, match="2 is: GELU, and was: ReLU"):
        save(loaded, tmp_path / "again")


def test_what_training_changes_is_saved_and_loaded(tmp_path):
    slim = nn.SyncBatchNorm.convert_sync_batchnorm(make_small())
    slim[1].momentum, slim[3].p = 0.01, 0.5
    slim[2].inplace = True
    slim.double().train()
    with torch.no_grad():
        slim[0].weight.mul_(2)
    original = build_small().double()
    original[3] = nn.Identity()
    loaded = load(save(slim, tmp_path / "slim"), original).eval()
    images = IMAGES.double()
    with torch.no_grad():
        expected = slim[4](slim[2](nn.functional.batch_norm(
            slim[0](images), slim[1].running_mean, slim[1].running_var, slim[1].weight, slim[1].bias, eps=slim[1].eps
        )))  # fmt: skip
    torch.testing.assert_close(loaded(images), expected)


class Counting(nn.Module):
    """It counts its calls, and keeps what it has seen."""

    def __init__(self, scale=0.5):
        super().__init__()
        self.body, self.scale = build_small(), scale
        self.calls, self.ready, self.size, self.share = 0, False, (0, 0), 0.0

    def forward(self, x):
        self.calls, self.ready, self.size, self.share = self.calls + 1, True, tuple(x.shape[2:]), x.shape[2] / 7
        return self.body(x) * self.scale


def test_what_a_forward_has_kept_is_no_other_model(tmp_path):
    model = Counting().eval()
    model(IMAGES)
    supernet = convert(model, IMAGES)
    slim = supernet.extract(supernet.space.uniform(0.5))
    calibrate(slim, [IMAGES])
    slim.eval()(IMAGES[..., :8])
    loaded = load(save(slim, tmp_path / "slim"), Counting()).eval()
    assert torch.equal(loaded(IMAGES), slim(IMAGES))
    save(loaded, tmp_path / "again")
    with pytest.raises(ArtifactError, match=r"scale is 1\.0, and was 0\.5"):
        load(tmp_path / "slim", Counting(scale=1.0))


def test_a_folder_of_before_outlines_is_loaded(tmp_path):
    slim = make_small()
    folder = save(slim, tmp_path / "slim")
    change_spec(folder, lambda content: content.pop("outline"))
    assert torch.equal(load(folder, build_small()).eval()(IMAGES), slim(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize(("rates", "classes"), [({"drop_rate": 0.2, "drop_path_rate": 0.2}, 3), ({}, 4)])
def test_an_exported_model_that_was_loaded_is_saved_as_it_was(rates, classes, tmp_path):
    arguments = {"channels": (16, 24, 32, 40), "stem_width": 8, "num_classes": 3}
    supernet = convert(timm.create_model("resnet10t", **arguments), torch.zeros(1, 3, 32, 32), base_args=arguments)
    slim = supernet.extract(supernet.space.uniform(0.5))
    calibrate(slim, [IMAGES])
    exported = timm.create_model(f"local-dir:{export(slim, tmp_path / 'slim')}", pretrained=True).eval()
    if classes != 3:
        exported.reset_classifier(classes)
        with pytest.raises(ArtifactError, match=r"fc\.weight has the shape \(4, \d+\), and had \(3, \d+\)"):
            save(exported, tmp_path / "again")
        return
    loaded = load(save(exported, tmp_path / "again"), timm.create_model("resnet10t", **arguments, **rates)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), exported(IMAGES))


@pytest.mark.slow
def test_a_part_that_was_changed_by_hand_is_not_saved(tmp_path):
    def build():
        body = timm.create_model("resnet10t", channels=(16, 24, 32, 40), stem_width=8, num_classes=0)
        return nn.Sequential(body, nn.Linear(40, 3))

    supernet = convert(build(), torch.zeros(1, 3, 32, 32))
    slim = supernet.extract(supernet.space.uniform(0.5))
    calibrate(slim, [IMAGES])
    for number, model in enumerate((slim, load(save(slim, tmp_path / "slim"), build()))):
        load(save(model[0], tmp_path / f"part{number}"), build()[0])
        model[0].act1 = nn.GELU()
        with pytest.raises(ArtifactError, match="act1 is: GELU, and was: ReLU"):
            save(model[0], tmp_path / "again")


def test_another_class_is_told_to_give_the_original(tmp_path):
    folder = save(make_small(), tmp_path / "slim")
    remedy = r"nothing was loaded; give load\(\) the original, built as it was for convert\(\)$"
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Conv2d(3, 4, 1))):
        with pytest.raises(ArtifactError, match=remedy):
            load(folder, model)


def change_spec(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["spec"]["sizes"].update({"stem.weight": [99, None, None, None]}), "sizes.stem.weight"),
        (lambda c: c["spec"]["attributes"].update({"attention.root": 7.7}), "attention.root"),
        (lambda c: c["spec"]["attributes"].update({"attention.head_dim": 99}), "attention.head_dim"),
        (lambda c: c["spec"]["attributes"].update({"__class__": 3}), "__class__"),
        (lambda c: c.pop("spec"), "timm_autoslim.save"),
        (lambda c: c.update(kind="other"), "timm_autoslim.save"),
        (lambda c: c.update(model_args={}), "create_model"),
        (lambda c: c["spec"].update(format=9), "format.*nothing was loaded; save the model again"),
        (lambda c: c["outline"].pop("modules"), "outline 'keys'.*save the model again"),
        (lambda c: c["outline"]["modules"].update({"stem": "x" * 999}), r"stem is: Conv2d, and was: x+\.\.\."),
    ],
)
def test_a_folder_that_says_something_else_is_refused(change, message, tmp_path):
    folder = save(make_slim(), tmp_path / "slim")
    change_spec(folder, change)
    with pytest.raises(ArtifactError, match=message):
        load(folder, build())


def test_weights_that_are_not_the_model_s_are_refused(tmp_path):
    folder = save(make_slim(), tmp_path / "slim")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "further": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"further.*needed: no such tensor"):
        load(folder, build())
    weights["first.bias"] = weights["first.bias"].long()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"first\.bias.*I64.*numbers like torch.float32"):
        load(folder, build())


def test_what_cannot_be_saved_is_told(tmp_path):
    with pytest.raises(ArtifactError, match=r"no spec.*supernet\.extract"):
        save(build(), tmp_path / "slim")
    slim = make_slim()
    slim.attention = Attention(32)
    with pytest.raises(ArtifactError, match=r"attention.*as in the model that was extracted"):
        save(slim, tmp_path / "slim")
    slim = make_slim()
    slim.first.weight.data[0] = float("nan")
    with pytest.raises(ArtifactError, match=r"first\.weight.*NaN"):
        save(slim, tmp_path / "slim")
    save(make_slim(), tmp_path / "slim")
    with pytest.raises(OutputExistsError):
        save(make_slim(), tmp_path / "slim")
    with pytest.raises(ArtifactError, match=r"meta"):
        load(tmp_path / "slim", build().to("meta"))


def test_a_timm_model_is_saved_too(tmp_path):
    def create():
        return timm.create_model("resnet10t", channels=(16, 24, 32, 40), stem_width=8, num_classes=3)

    supernet = convert(create(), torch.zeros(1, 3, 32, 32))
    slim = supernet.extract(supernet.space.uniform(0.5))
    calibrate(slim, [IMAGES])
    loaded = load(save(slim, tmp_path / "slim"), create())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IMAGES), slim.eval()(IMAGES))
    assert loaded.num_features == slim.num_features
    assert timm_autoslim.load is load


# ------------------------------------------------------------------------------------------------ configurations


@dataclasses.dataclass
class Sizes:
    width: int = 16
    hidden: int = 32
    stages: list = dataclasses.field(default_factory=lambda: [16, 32])


@dataclasses.dataclass(frozen=True)
class FrozenSizes:
    width: int = 16
    hidden: int = 32
    stages: tuple = (16, 32)


class Settings:
    """A configuration like those of transformers, of properties and plain attributes."""

    attribute_map = {"dim": "width"}  # noqa: RUF012

    def __init__(self):
        self.width, self.hidden, self.stages, self._kind = 16, 32, [16, 32], "vision"

    def __getattribute__(self, name):
        return super().__getattribute__(super().__getattribute__("attribute_map").get(name, name))

    def to_dict(self):
        return dict(vars(self))


def make_dict():
    return {"width": 16, "hidden": 32, "stages": [16, 32]}


CONFIGS = {
    "dict": make_dict,
    "dataclass": Sizes,
    "frozen dataclass": FrozenSizes,
    "namespace": lambda: SimpleNamespace(**make_dict()),
    "transformers": Settings,
}


def read(config, name):
    return config[name] if isinstance(config, dict) else getattr(config, name)


def show(config):
    return copy.deepcopy(config if isinstance(config, dict) else vars(config))


class Block(nn.Module):
    """A layer that reads its sizes of the configuration when it runs."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.reduce, self.expand = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        hidden = self.reduce(x).reshape(len(x), -1, read(self.config, "stages")[1]).relu()
        return x + self.expand(hidden.reshape(-1, read(self.config, "hidden"))).reshape(x.shape)


class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stem, self.block, self.head = nn.Linear(6, 16), Block(config), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).reshape(-1, read(self.config, "width")))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_stays_the_user_s(kind, tmp_path):
    make, rows = CONFIGS[kind], torch.randn(5, 6)
    config, fresh = make(), make()
    torch.manual_seed(0)
    model, sibling = Configured(config), Configured(config)
    before = sibling(rows)
    supernet = convert(model, rows[:1])
    widths = supernet.space.uniform(0.5)
    slim = supernet.extract(widths)
    assert {"config.width", "config.hidden"} & slim.autoslim.attributes.keys()
    assert torch.equal(slim(rows), supernet(rows, widths))
    assert show(config) == show(make())
    folder = save(slim, tmp_path / "slim")
    original, other = Configured(fresh), Configured(fresh)
    loaded = load(folder, original)
    assert torch.equal(loaded(rows), slim(rows))
    assert loaded.config is loaded.block.config
    assert read(loaded.config, "width") == read(slim.config, "width") < 16
    assert show(fresh) == show(make())
    assert other.config is fresh
    assert other(rows).shape == (5, 3)
    assert torch.equal(sibling(rows), before)
    again = load(save(loaded, tmp_path / "again"), Configured(fresh))  # the configuration serves once more
    assert torch.equal(again(rows), slim(rows))


@pytest.mark.parametrize(
    ("path", "value"),
    [("config.width", 99), ("config.name", 3), ("config.made", 3), ("config.__secret", 3), ("config.ratio", 2)],
)
def test_a_folder_may_only_narrow_numbers_that_a_configuration_has(path, value, tmp_path):
    class Named(SimpleNamespace):
        @property
        def made(self):
            raise AssertionError("a folder runs no code")

    config, rows = SimpleNamespace(**make_dict()), torch.randn(1, 6)
    supernet = convert(Configured(config), rows)
    folder = save(supernet.extract(supernet.space.uniform(0.5)), tmp_path / "slim")
    change_spec(folder, lambda c: c["spec"]["attributes"].update({path: value}))
    config = Named(**make_dict(), name="a", __secret=8, ratio=0.3)
    with pytest.raises(ArtifactError, match=path):
        load(folder, Configured(config))
    assert vars(config) == {**make_dict(), "name": "a", "__secret": 8, "ratio": 0.3}


def test_a_configuration_that_lost_a_number_is_not_saved(tmp_path):
    supernet = convert(Configured(SimpleNamespace(**make_dict())), torch.randn(1, 6))
    slim = supernet.extract(supernet.space.uniform(0.5))
    del slim.config.width
    with pytest.raises(ArtifactError, match=r"config\.width.*undo changes by hand"):
        save(slim, tmp_path / "slim")


def close_over_a_layer(net):
    layer = net[0]
    net[1].register_forward_hook(lambda module, args, out: out + layer.bias.sum())


def close_over_the_model(net):
    net[1].register_forward_hook(lambda module, args, out: out + net[0].bias.sum())


def close_over_a_weight(net):
    bias = net[0].bias
    net[1].register_forward_hook(lambda module, args, out: out + bias.sum())


def close_over_another_kind(net):
    other = nn.Conv2d(1, 1, 1)
    net[1].register_forward_hook(lambda module, args, out: out + other.bias.sum())


@pytest.mark.parametrize("close", [close_over_a_layer, close_over_the_model, close_over_a_weight])
def test_a_deep_copy_whose_closures_run_another_model_is_not_saved(close, tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    close(net)
    slim = convert(net, torch.zeros(1, 4)).extract()
    save(slim, tmp_path / "slim")
    for copied in (copy.deepcopy(slim), ModelEmaV3(slim).module):
        with pytest.raises(
            ArtifactError, match=r"^the model: got code that can read a \w+ of another model as .*, beside"
        ):
            save(copied, tmp_path / "copied")


def test_a_layer_of_another_kind_outside_of_a_model_is_no_obstacle_to_save(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    close_over_another_kind(net)
    save(convert(net, torch.zeros(1, 4)).extract(), tmp_path / "slim")
