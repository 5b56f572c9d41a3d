"""A folder is the same model as was exported, or is not written: what only hands changed, no folder describes."""

import copy
import functools

import pytest
import timm
import torch
import torchvision
from helpers.comparisons import same, state
from helpers.marks import slow_but
from torch import nn

import timm_autoslim
from timm_autoslim.errors import ArtifactError, StaleStatisticsError

KEEPS_ARGS = hasattr(timm.create_model("test_resnet"), "_model_args")  # timm from 1.0.31 on
SIZE = (3, 64, 64)


def half(model, size=SIZE, base=None, **kwargs):
    supernet = timm_autoslim.convert(model, torch.zeros(1, *size), base=base, **kwargs)
    model = supernet.extract(supernet.space.uniform(0.5))
    timm_autoslim.calibrate(model, [torch.randn(4, *size, generator=torch.Generator().manual_seed(0))])
    return model.eval()


@pytest.fixture(scope="module")
def resnet():
    return half(timm.create_model("resnet10t", num_classes=10))


@pytest.mark.skipif(not KEEPS_ARGS, reason="this timm does not keep the arguments of its models")
@pytest.mark.parametrize(
    ("base", "args"),
    [
        pytest.param("resnet10t", {"num_classes": 10, "output_stride": 8}, marks=pytest.mark.slow),
        ("resnet10t", {"num_classes": 10, "act_layer": "silu", "drop_rate": 0.3}),
        pytest.param("test_efficientnet", {"bn_eps": 0.1, "pad_type": "same"}, marks=pytest.mark.slow),
        pytest.param("test_vit", {"num_heads": 4, "img_size": (64, 96), "act_layer": "relu"}, marks=pytest.mark.slow),
    ],
)
def test_arguments_that_timm_keeps_are_in_the_folder(base, args, tmp_path):
    size = (3, *args.get("img_size", (64, 64)))
    model = half(timm.create_model(base, **args), size)
    timm_autoslim.export(model, tmp_path / "one")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'one'}", pretrained=True).eval()
    expected = {key: list(value) if isinstance(value, tuple) else value for key, value in args.items()}
    assert loaded.autoslim.copy_arguments() == expected
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert getattr(loaded, "drop_rate", 0) == args.get("drop_rate", 0)


@pytest.mark.slow
@pytest.mark.skipif(not KEEPS_ARGS, reason="this timm does not keep the arguments of its models")
def test_arguments_given_at_loading_are_in_the_next_folder(resnet, tmp_path):
    timm_autoslim.export(resnet, tmp_path / "one")
    dilated = timm.create_model(f"local-dir:{tmp_path / 'one'}", pretrained=True, output_stride=8)
    model = half(dilated)
    timm_autoslim.export(model, tmp_path / "two")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'two'}", pretrained=True).eval()
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    with pytest.raises(ArtifactError, match="when the folder was loaded again"):
        timm_autoslim.export(dilated.eval(), tmp_path / "three")  # its spec is that of the first folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "base", "named"),
    [
        (lambda: timm.create_model("resnet10t", act_layer=nn.SiLU), None, r"SiLU\(inplace=True\) in place of ReLU"),
        (
            lambda: timm.create_model("test_resnet", norm_layer=functools.partial(nn.BatchNorm2d, eps=0.1)),
            None,
            "eps=0.1",
        ),
        (
            lambda: torchvision.models.resnet18(norm_layer=functools.partial(nn.BatchNorm2d, eps=0.1)),
            "torchvision/resnet18",
            "first bn1: .*eps=0.1",
        ),
        (
            lambda: torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]),
            "torchvision/resnet50",
            "first dilation of the model: 4 in place of 1",
        ),
    ],
)
def test_arguments_that_no_folder_holds_are_refused(make, base, named, tmp_path):
    model = half(make(), base=base)
    with pytest.raises(ArtifactError, match=f"{named}.*pass base_args="):
        timm_autoslim.export(model, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_attribute_that_only_the_constructor_sets_is_named(tmp_path):
    args = {"aux_logits": False, "init_weights": False}
    model = torchvision.models.googlenet(transform_input=True, **args)
    model = half(model, base="torchvision/googlenet", base_args=args)
    with pytest.raises(ArtifactError, match="first transform_input of the model: True in place of False"):
        timm_autoslim.export(model, tmp_path / "one")
    timm_autoslim.export(model, tmp_path / "one", base_args={**args, "transform_input": True})


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _activation(model):
    model.layer1[0].act1 = nn.GELU()


def _stride(model):
    model.layer2[0].conv1.stride = (1, 1)


def _eps(model):
    model.layer1[0].bn1.eps = 0.1


def _hook(model):
    model.layer1.register_forward_hook(lambda _, __, out: 2 * out)


def _forward(model):
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)


def _head(model):
    old, model.fc = model.fc, Doubled(model.fc.in_features, 10)
    model.fc.load_state_dict(old.state_dict())


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_activation, r"layer1\.0\.act1: GELU"),
        (_stride, r"layer2\.0\.conv1"),
        (_eps, r"layer1\.0\.bn1: .*eps=0\.1"),
        (_hook, "layer1 has a forward hook"),
        (_forward, "the model has a forward of its own"),
        (_head, "fc: Doubled"),
    ],
)
@pytest.mark.parametrize("silent", slow_but([True], [False, True]))
def test_changes_by_hand_are_refused(resnet, edit, named, silent, tmp_path):
    model = copy.deepcopy(resnet)
    if silent:  # with branches and a head at zero, real weights would show nothing
        for name, parameter in model.named_parameters():
            if name.endswith("bn2.weight") or name.startswith("fc"):
                parameter.data.zero_()
    edit(model)
    with pytest.raises(ArtifactError, match=f"{named}.*Changes by hand"):
        timm_autoslim.export(model, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_what_only_looks_on_or_only_counts_in_training_is_no_change(resnet, tmp_path):
    model = timm.layers.convert_sync_batchnorm(copy.deepcopy(resnet)).to(memory_format=torch.channels_last)
    model.layer1.register_forward_hook(lambda *_: None)
    model.drop_rate = 0.7
    model.layer1[0].bn1.momentum = 0.3
    before, random = state(model), torch.get_rng_state()
    training = [module.training for module in model.modules()]
    timm_autoslim.export(model, tmp_path / "one")
    assert same(state(model), before)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random)


def test_other_users_can_read_the_weights(resnet, tmp_path):
    timm_autoslim.export(resnet, tmp_path / "one")
    (tmp_path / "model").touch()
    modes = {path.stat().st_mode for path in ((tmp_path / "one").iterdir())}
    assert modes == {(tmp_path / "model").stat().st_mode}


@pytest.mark.parametrize(
    ("ruin", "got"),
    [
        (lambda model: model.fc.weight.data[0, 0].fill_(torch.nan), r"fc\.weight: got weights that are NaN"),
        (lambda model: model.to("meta"), r"conv1\.0\.weight: got a tensor on the meta device"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(resnet, ruin, got, tmp_path):
    model = copy.deepcopy(resnet)
    ruin(model)
    with pytest.raises(ArtifactError, match=got):
        timm_autoslim.export(model, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_compiled_model_is_told_apart(resnet, tmp_path):
    with pytest.raises(ArtifactError, match=r"got a compiled model; needed: .*export\(model\._orig_mod"):
        timm_autoslim.export(torch.compile(copy.deepcopy(resnet)), tmp_path / "one")


@pytest.mark.slow
def test_many_batches_of_training_renew_the_statistics(tmp_path):
    supernet = timm_autoslim.convert(timm.create_model("test_resnet", num_classes=3), torch.zeros(1, 3, 32, 32))
    model = supernet.extract(supernet.space.uniform(0.5)).train()
    foreign = model.conv1[1].running_var.clone()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    norm = model.conv1[1]
    with torch.no_grad():
        for batch in range(44):
            with pytest.raises(StaleStatisticsError, match=f"or were {44 - batch} batches of training short"):
                timm_autoslim.export(model, tmp_path / "one")
            model(images)
        model.conv1[1].momentum, reached = 1.0, norm.running_var.clone()
        model(images)
        assert ((reached - norm.running_var).abs() <= 0.01 * (foreign - norm.running_var).abs() + 1e-6).all()
    timm_autoslim.export(model, tmp_path / "one")


@pytest.mark.slow
def test_statistics_of_a_head_that_runs_in_training_alone_may_be_stale(tmp_path):
    args = {"init_weights": False, "aux_logits": True}
    model = half(torchvision.models.googlenet(**args), base="torchvision/googlenet", base_args=args)
    assert model.aux1.conv.bn.num_batches_tracked == 0  # calibrate() does not reach it
    timm_autoslim.export(model, tmp_path / "one")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'one'}", pretrained=True).eval()
    assert same(state(loaded), state(model))
    model.inception3a.branch1.bn.num_batches_tracked.zero_()
    with pytest.raises(StaleStatisticsError, match=r"^inception3a\.branch1\.bn: got BatchNorm"):
        timm_autoslim.export(model, tmp_path / "two")
