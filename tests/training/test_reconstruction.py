"""Reconstruction: the weights of least squares, layer by layer."""

import copy

import pytest
import timm
import torch
from helpers.forks import run_in_processes
from helpers.models import TwoGroups
from torch import nn

from timm_autoslim import LayerReconstruction, calibrate, convert, export, reconstruct
from timm_autoslim.errors import ConfigError, DataError


class Redundant(nn.Module):
    """Every second channel of the hidden layer is a mixture of the others, so that half of it says all."""

    def __init__(self, kernel=1, groups=1):
        super().__init__()
        self.inner = nn.Conv2d(4, 16, kernel, padding=kernel // 2)
        self.outer = nn.Conv2d(16, 8, kernel, padding=kernel // 2, groups=groups)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            mixture = torch.randn(8, 8)
            self.inner.weight[8:] = torch.einsum("ij,jckl->ickl", mixture, self.inner.weight[:8])
            self.inner.bias[8:] = mixture @ self.inner.bias[:8]

    def forward(self, x):
        return self.head(self.outer(self.inner(x)).mean((2, 3)))


def make_images(n=100, side=6, channels=4):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def narrow(supernet, **widths):
    return supernet.extract(supernet.space.max().replace("inner", widths["inner"])).eval()


@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_redundant_is_removed_without_a_trace(kernel):
    torch.manual_seed(0)
    model, images = Redundant(kernel).eval(), make_images()
    supernet = convert(model, images[:2])
    slim = narrow(supernet, inner=8)
    with torch.no_grad():
        assert not torch.allclose(slim(images), model(images), atol=0.1)
        report = reconstruct(slim, supernet, images.split(25))
        # a padded border is the only thing that the mixture's bias says and the others do not
        atol = 1e-3 if kernel == 1 else 0.05
        assert torch.allclose(slim(images), model(images), atol=atol)
    outer = next(layer for layer in report.layers if layer.name == "outer")
    assert outer.after < 0.05 * outer.before
    assert report.images == 100
    assert [layer.name for layer in report.layers] == ["inner", "outer", "head"]


def test_grouped_convolutions_are_solved_group_by_group():
    torch.manual_seed(0)
    model, images = Redundant(groups=2).eval(), make_images()
    supernet = convert(model, images[:2])
    slim = supernet.extract(supernet.space.uniform(0.75)).eval()
    assert slim.outer.groups == 2
    report = reconstruct(slim, supernet, [images])
    outer = next(layer for layer in report.layers if layer.name == "outer")
    assert outer.inputs == slim.outer.weight[0].numel()
    assert outer.after < outer.before


def test_the_widest_subnet_is_left_as_it_is():
    torch.manual_seed(0)
    model, images = TwoGroups().eval(), torch.randn(40, 3, 8, 8)
    calibrate(model, [images])
    supernet = convert(model, images[:2])
    slim = supernet.extract()
    weights = {name: value.clone() for name, value in slim.named_parameters()}
    report = reconstruct(slim, supernet, [images])
    assert all(torch.equal(value, weights[name]) for name, value in slim.named_parameters())
    assert {layer.reason for layer in report.layers} == {"its outputs are right"}
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(slim.buffers(), model.buffers(), strict=True)
        if ours.is_floating_point()
    )


SMALL = {
    "resnet10t": {"channels": (8, 16, 16, 16), "stem_width": 8},
    "mobilenetv3_small_050": {},  # its BatchNorms have activations as children
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_batch_norms_have_the_statistics_of_the_slim_model_and_it_can_be_exported(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **SMALL[name])
    images = torch.randn(60, 3, 32 if name == "resnet10t" else 64, 32 if name == "resnet10t" else 64)
    calibrate(model, [images])
    supernet = convert(model.eval(), images[:2])
    slim = supernet.extract(supernet.space.uniform(0.5)).train()
    flags = [module.training for module in (*slim.modules(), *supernet.modules())]
    reconstruct(slim, supernet, images.split(20))
    assert flags == [module.training for module in (*slim.modules(), *supernet.modules())]
    calibrated = copy.deepcopy(slim)
    calibrate(calibrated, [images])
    for path, theirs in calibrated.named_modules():
        if isinstance(theirs, nn.BatchNorm2d):
            ours, deviation = slim.get_submodule(path), theirs.running_var.sqrt()  # the last stage has 60 values
            torch.testing.assert_close(ours.running_var.sqrt(), deviation, rtol=2e-2, atol=1e-6)
            torch.testing.assert_close(
                ours.running_mean / deviation, theirs.running_mean / deviation, rtol=0, atol=2e-2
            )
            assert ours.num_batches_tracked == 1  # small batches are joined
    export(slim, tmp_path / "slim")
    again = timm.create_model(f"local-dir:{tmp_path}/slim", pretrained=True).eval()
    assert torch.equal(again(images), slim.eval()(images))


@pytest.mark.slow
def test_transformers_are_reconstructed_and_the_original_may_be_the_ordered_model():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=32, patch_size=8).eval()
    images = torch.randn(80, 3, 32, 32)
    supernet = convert(model, images[:2], order="l1")
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    raw = copy.deepcopy(slim)
    report = reconstruct(slim, supernet.model, images.split(40))
    assert {layer.name for layer in report.layers if layer.reason is None} >= {"blocks.0.attn.qkv", "blocks.0.mlp.fc2"}
    fresh = torch.randn(40, 3, 32, 32)
    with torch.no_grad():
        target = model(fresh)
        assert (slim(fresh) - target).norm() < 0.7 * (raw(fresh) - target).norm()


def test_with_little_memory_fewer_images_are_used_where_layers_are_large():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1)
    )
    model = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.randn(300, 3, 64, 64)
    supernet = convert(model, images[:2])
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    size = 2 * 8 * 64 * 64 * 4  # bytes of what enters and leaves the first ReLU, of one image
    report = reconstruct(slim, supernet, images.split(50), memory_mib=max(1, 20 * 6 * size >> 20))
    rows = {layer.name: layer.rows for layer in report.layers}
    assert rows["0.0"] <= 30 * 64 * 64
    assert 30 < report.images <= 300
    assert rows["3"] == pytest.approx(0.8 * report.images, abs=2)


def test_layers_that_cannot_be_solved_for_are_left_with_a_reason():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.shared = nn.Linear(6, 12), nn.Linear(12, 12)
            self.tied, self.head = nn.Linear(12, 12), nn.Linear(12, 3)
            self.tied.weight = self.shared.weight

        def forward(self, x):
            x = self.inner(x).relu()
            return self.head(self.tied(self.shared(self.shared(x)).relu()))

    torch.manual_seed(0)
    model, inputs = Twice().eval(), torch.randn(100, 6)
    supernet = convert(model, inputs[:2])
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    report = reconstruct(slim, supernet, [inputs])
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["shared"] == "it runs several times in a forward"
    assert reasons["tied"] == "its weight is shared with another layer"
    assert reasons["head"] is None
    assert "shared" in str(report)
    assert "left: it runs several times" in str(report)


def test_an_error_on_the_way_leaves_both_models_as_they_were():
    torch.manual_seed(0)
    model, images = Redundant().train(), make_images()
    supernet = convert(model, images[:2])
    slim = narrow(supernet, inner=8)
    before = {name: value.clone() for name, value in slim.state_dict().items()}

    def break_off(layer: LayerReconstruction):
        if layer.name == "outer":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(slim, supernet, [images], on_layer=break_off)
    assert all(torch.equal(value, before[name]) for name, value in slim.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in supernet.modules())


def test_batches_are_checked_and_needed():
    supernet = convert(Redundant().eval(), make_images(2))
    for batches, message in (
        ([], "^batches: got none; needed: an iterable"),
        ([3], r"^batches\[0\]: got"),
    ):
        with pytest.raises(DataError, match=message):
            reconstruct(narrow(supernet, inner=8), supernet, batches)


def test_another_original_or_no_slim_model_is_refused():
    images = make_images(4)
    supernet = convert(Redundant().eval(), images)
    slim = narrow(supernet, inner=8)
    with pytest.raises(ConfigError, match=r"^the slim model: got a Redundant that does not say its widths"):
        reconstruct(Redundant(), supernet, [images])
    with pytest.raises(ConfigError, match=r"^the original: got another model than that of the slim model's widths"):
        reconstruct(slim, TwoGroups().eval(), [torch.zeros(2, 3, 8, 8)])
    with pytest.raises(ConfigError, match=r"^the slim model: got inner.weight of the shape \(8, 4, 1, 1\)"):
        reconstruct(slim, Redundant(kernel=3).eval(), [images])
    with pytest.raises(ConfigError, match=r"^memory_mib: got 0"):
        reconstruct(slim, supernet, [images], memory_mib=0)


def test_neither_the_callers_autocast_nor_inference_mode_nor_relus_in_place_change_anything():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    images = torch.randn(60, 3, 8, 8)
    supernet = convert(model, images[:2])
    slims = [supernet.extract(supernet.space.uniform(0.5)).eval() for _ in range(3)]
    report = reconstruct(slims[0], supernet, [images])
    assert [layer.reason for layer in report.layers] == ["its outputs are right", None, None]
    with torch.autocast("cpu", torch.bfloat16):
        reconstruct(slims[1], supernet, [images])
    with torch.inference_mode():
        reconstruct(slims[2], supernet, [images])
    for other in slims[1:]:
        assert all(
            torch.equal(ours, theirs) for ours, theirs in zip(slims[0].parameters(), other.parameters(), strict=True)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types_keep_their_type(dtype):
    torch.manual_seed(0)
    model, images = Redundant().eval().to(dtype), make_images().to(dtype)
    supernet = convert(model, images[:2])
    slim = narrow(supernet, inner=8)
    raw = copy.deepcopy(slim)
    reconstruct(slim, supernet, [images])
    with torch.no_grad():
        target = model(images)
        assert (slim(images) - target).norm() < 0.1 * (raw(images) - target).norm()
    assert {parameter.dtype for parameter in slim.parameters()} == {dtype}


class Keeping(nn.Module):
    """Keeps something in itself during its forward, and calls a layer by keyword."""

    def __init__(self, keeps):
        super().__init__()
        self.keeps = keeps
        self.inner, self.outer, self.head = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x):
        x = skip = self.inner(x).relu()
        if self.keeps:
            self.skip = x
        x = self.outer(x).relu() + (self.skip if self.keeps else skip)
        return self.head(input=x.mean((2, 3)))


def test_what_a_forward_keeps_in_a_module_meets_no_other_batch():
    weights = []
    for keeps in (False, True):
        torch.manual_seed(0)
        model, images = Keeping(keeps).eval(), make_images(80)
        supernet = convert(model, images[:2])
        slim = supernet.extract(supernet.space.uniform(0.5)).eval()
        report = reconstruct(slim, supernet, [images[:50], images[50:]])
        assert [layer.name for layer in report.layers] == ["inner", "outer", "head"]
        weights.append(slim.head.weight)
    assert torch.equal(*weights)


def test_a_shared_bias_and_narrowed_positions_are_left():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 2)
    ).eval()
    model[1].bias = model[2].bias
    tied = convert(model, make_images(2))
    report = reconstruct(tied.extract(tied.space.uniform(0.5)), tied, [make_images()])
    assert [layer.reason for layer in report.layers[1:3]] == ["its bias is shared with another layer"] * 2
    mixer = timm.models.mlp_mixer.MlpMixer(img_size=16, patch_size=4, embed_dim=16, num_blocks=1, num_classes=3).eval()
    pictures = torch.randn(40, 3, 16, 16)
    supernet = convert(mixer, pictures[:2])
    report = reconstruct(supernet.extract(supernet.space.uniform(0.5)), supernet, [pictures])
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["blocks.0.mlp_tokens.fc1"] == "it mixes positions that are narrowed"
    assert reasons["blocks.0.mlp_channels.fc2"] is None


def test_an_original_in_another_order_is_refused():
    torch.manual_seed(0)
    model, images = Redundant().eval(), make_images()
    with torch.no_grad():
        model.inner.weight.mul_(torch.rand(16, 1, 1, 1) + 0.1)
    supernet = convert(model, images[:2], order="l1")
    slim = narrow(supernet, inner=8)
    with pytest.raises(ConfigError, match=r"^the original: got a model whose layer inner is another one"):
        reconstruct(slim, model, [images])


class Gated(nn.Module):
    """A gate that reads a mean over channels, as CBAM has it."""

    def __init__(self):
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(1, 1, 7, padding=3)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x * self.gate(x.mean(1, keepdim=True)).sigmoid())


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_that_reads_a_mean_over_channels_is_no_sign_of_another_order(seed):
    torch.manual_seed(seed)
    model, images = Gated().eval(), torch.randn(60, 3, 12, 12)
    supernet = convert(model, images[:2])
    slim = supernet.extract(supernet.space.uniform(0.25)).eval()
    before = (slim(images) - model(images)).square().mean()
    reconstruct(slim, supernet, images.split(20), progress=False)
    assert (slim(images) - model(images)).square().mean() < before


def test_norms_behind_layers_that_are_not_solved_for_are_renewed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.ConvTranspose2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )
    images = torch.randn(60, 3, 6, 6)
    calibrate(model, [images])
    supernet = convert(model.eval(), images[:2])
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    reconstruct(slim, supernet, [images])
    calibrated = copy.deepcopy(slim)
    calibrate(calibrated, [images])
    torch.testing.assert_close(slim[2].running_mean, calibrated[2].running_mean, rtol=1e-3, atol=1e-4)


def test_a_model_of_inference_tensors_is_refused():
    supernet = convert(Redundant().eval(), make_images(2))
    with torch.inference_mode():
        slim = narrow(supernet, inner=8)
    with pytest.raises(ConfigError, match=r"^the slim model: got tensors that were made in torch.inference_mode"):
        reconstruct(slim, supernet, [make_images()])


class Pair(nn.Module):
    """Two images, a number that scales the second, and outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = nn.Conv2d(4, 16, 1), nn.Conv2d(4, 16, 1)
        self.outer, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, before, after, scale=None):
        x = self.inner(before).relu() + self.other(after * (1 if scale is None else scale)).relu()
        x = self.outer(x).relu()
        return {"logits": self.head(x.mean((2, 3))), "maps": [x]}


def give_pairs(form, images, others):
    """Return batches of a pair of images in one of the forms that `convert` takes."""
    pairs = zip(images.split(30), others.split(30), strict=True)
    if form == "tuple":
        return list(pairs)
    return [{"before": before, "after": after, "scale": torch.ones(())} for before, after in pairs]


@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize("as_supernet", [True, False])
def test_several_inputs_and_structured_outputs(form, as_supernet):
    torch.manual_seed(0)
    model, batches = Pair().eval(), give_pairs(form, make_images(100), make_images(100).flip(0))
    supernet = convert(model, batches[0])
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    report = reconstruct(slim, supernet if as_supernet else model, batches)
    assert report.images == 100
    assert {layer.name for layer in report.layers if layer.reason is None} == {"outer", "head"}


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs_give_the_same_weights_as_one(form):
    """A model that gets its image in two halves, and one that gets it whole."""

    class Halves(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, left, right):
            return self.model(torch.cat([left, right], 3))

    torch.manual_seed(0)
    model, images = Redundant().eval(), make_images(100)
    one = convert(model, images[:2])
    slim = narrow(one, inner=8)
    reconstruct(slim, one, images.split(64))  # no batch has to be joined
    halves = [part.split(3, dim=3) for part in images.split(64)]
    batches = halves if form == "tuple" else [{"left": left, "right": right} for left, right in halves]
    two = convert(Halves(copy.deepcopy(model)), batches[0])
    other = two.extract(two.space.max().replace("model.inner", 8)).eval()
    reconstruct(other, two, batches)
    assert all(torch.equal(x, y) for x, y in zip(slim.parameters(), other.model.parameters(), strict=True))


def test_a_model_that_takes_one_image_without_a_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 6, 1), nn.Flatten(0), nn.Linear(96, 2)).eval()
    images = list(make_images(60))
    with torch.no_grad():
        model[0].weight[8:], model[0].bias[8:] = model[0].weight[:8], model[0].bias[:8]
    supernet = convert(model, images[0])
    assert not supernet.takes_any_batch_size
    slim = supernet.extract(supernet.space.max().replace("0", 8)).eval()
    raw = copy.deepcopy(slim)
    report = reconstruct(slim, model, images)
    assert report.images == 60
    assert next(layer for layer in report.layers if layer.name == "2").reason is None
    with torch.no_grad():
        errors = [sum((net(x) - model(x)).norm() for x in images) for net in (slim, raw)]
    assert errors[0] < 0.01 * errors[1]


def test_batches_that_are_none_of_the_inputs_are_refused():
    model, images = Pair().eval(), make_images(4)
    supernet = convert(model, (images, images))
    slim = supernet.extract(supernet.space.uniform(0.5))
    for batch in ((images,), {"before": images, "middle": images}, [images, images]):
        with pytest.raises(DataError, match=r"^batches\[0\]: got a (tuple|dict|list); needed: inputs of the model's"):
            reconstruct(slim, supernet, [batch])


@pytest.mark.forks
@pytest.mark.slow
def test_two_processes_reconstruct_as_one_on_all_images(tmp_path):
    def work(rank, distributed=True):
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=10, channels=(8, 16, 16, 16), stem_width=8).eval()
        every = torch.randn(120, 3, 32, 32)
        calibrate(model, [every])
        own = every[60 * rank : 60 * rank + 60] if distributed else every
        supernet = convert(
            model, every[:2], order="reconstruction", batches=own.split(20), distributed=distributed
        ).eval()
        slim = supernet.extract(supernet.space.uniform(0.5)).eval()
        report = reconstruct(slim, supernet, own.split(20), distributed=distributed)
        rows = torch.tensor([[layer.rows, layer.before or 0, layer.after or 0] for layer in report.layers])
        return {**slim.state_dict(), "images": torch.tensor(report.images), "rows": rows}

    first, second = run_in_processes(2, work, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first if name != "rows")
    alone = work(0, distributed=False)
    assert alone["images"] == 120
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.forks
@pytest.mark.slow
def test_a_process_without_batches_is_refused_in_all_of_them(tmp_path):
    def work(rank):
        images = make_images(20)
        supernet = convert(Redundant().eval(), images[:2])
        messages = []
        for call in (
            lambda batches: reconstruct(narrow(supernet, inner=8), supernet, batches, distributed=True),
            lambda batches: convert(Redundant(), images[:2], order="reconstruction", batches=batches, distributed=True),
        ):
            try:
                call([] if rank else [images])
            except DataError as error:
                messages.append(str(error))
        return messages

    for messages in run_in_processes(2, work, tmp_path):
        assert [message.partition(";")[0] for message in messages] == ["batches: got none in 1 of 2 processes"] * 2


class Siamese(nn.Module):
    """One encoder of two images."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, before, after):
        return self.head((self.encoder(before) - self.encoder(after)).abs().mean((2, 3)))


def test_batch_norms_that_run_twice_have_the_statistics_of_both_runs():
    torch.manual_seed(0)
    model, images = Siamese(), make_images(120)
    batches = list(zip(images.split(30), (2 * images.flip(0) + 1).split(30), strict=True))
    calibrate(model, batches)
    supernet = convert(model.eval(), batches[0])
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    report = reconstruct(slim, supernet, batches)
    reasons = {layer.name: layer.reason for layer in report.layers}
    twice = "it runs several times in a forward"
    assert reasons == {"encoder.0": twice, "encoder.3": twice, "head": None}
    # the first norm has the inputs that it has in the end; the second one's first run had a first norm of its own
    calibrated = copy.deepcopy(slim)
    calibrate(calibrated, batches)
    for name, rtol in (("encoder.1", 1e-2), ("encoder.4", 0.3)):
        ours, theirs = slim.get_submodule(name), calibrated.get_submodule(name)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=rtol, atol=rtol / 2)
        torch.testing.assert_close(ours.num_batches_tracked, theirs.num_batches_tracked)


def test_a_layer_behind_narrowed_ones_that_are_left_is_no_sign_of_another_order():
    torch.manual_seed(0)
    model, images = Siamese().eval(), make_images(60)
    model.encoder[1], model.encoder[4] = nn.Identity(), nn.Identity()
    with torch.no_grad():
        model.encoder[3].weight[:, :8] *= 0.01  # what is left of the encoder says something else altogether
    batches = list(zip(images.split(30), images.flip(0).split(30), strict=True))
    supernet = convert(model, batches[0], freeze="head")
    slim = supernet.extract(supernet.space.uniform(0.5)).eval()
    report = reconstruct(slim, supernet, batches)
    head = report.layers[-1]
    assert head.name == "head"
    assert head.before > 0.9 > 0.95 * head.after


def test_progress_is_shown_unless_it_shall_not(terminal):
    torch.manual_seed(0)
    model, images = Redundant(), make_images()
    supernet = convert(model, images[:2])
    reconstruct(narrow(supernet, inner=8), supernet, [images])
    assert "/3 [" in terminal.readouterr().err
    reconstruct(narrow(supernet, inner=8), supernet, [images], progress=False)
    assert terminal.readouterr().err == ""
