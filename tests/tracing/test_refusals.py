"""Models that cannot be converted are refused by name, and so are forwards that raise; the model stays as it was."""

import functools
import types

import pytest
import timm
import torch
from helpers.conversions import (
    IMAGE,
    Net,
    assert_untouched,
    check_conversion,
    check_refusal,
    make_conv,
    make_net,
    read_state,
    run_in_a_row,
)
from helpers.forks import run_in_processes
from helpers.models import TwoGroups, randomise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torchvision.models import detection
from torchvision.models.quantization import mobilenet_v2

from timm_autoslim import convert
from timm_autoslim.errors import TraceError

# -- kinds of modules and weights -------------------------------------------------------------------------------------


def compiled_in_place():
    model = make_net()
    model.b.compile(backend="eager")
    return model


def trained_in_eight_bits():
    model = make_net()
    model.a.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)


def observed():
    model = make_net()
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
        return make_net()


# a builder of the model, and the beginnings of two parts of the error: what was got, and the remedy
REFUSED = {
    "torch.compile": (
        lambda: torch.compile(make_net(), backend="eager"),
        "the model: got a module compiled by torch.compile", "convert its `_orig_mod"
    ),
    "torch.compile of a part": (
        lambda: make_net(torch.compile(make_conv(), backend="eager")),
        "a: got a module compiled by torch.compile", "convert its `_orig"
    ),
    "compile()": (
        compiled_in_place, r"b: got a module compiled in place by Module.compile\(\)", "convert the model before comp"
    ),
    "DataParallel": (
        lambda: nn.DataParallel(make_net()), "the model: got a module wrapped in DataParallel", "convert its `module`"
    ),
    "DataParallel of a part": (
        lambda: make_net(nn.DataParallel(make_conv())), "a: got a module wrapped in DataParallel", "convert its `module"
    ),
    "scripted": (lambda: torch.jit.script(TwoGroups()), "the model: got a scripted module", "convert the model before"),
    "traced": (
        lambda: torch.jit.trace(TwoGroups().eval(), IMAGE), "the model: got a scripted module", "convert the model"
    ),
    "traced part": (
        lambda: make_net(torch.jit.trace(make_conv(), torch.zeros(1, 8, 4, 4))), "a: got a scripted module", "convert"
    ),
    "lazy layer": (lambda: make_net(nn.LazyConv2d(6, 1)), "a: got a lazy module", "run the model once on data, then"),
    "lazy norm": (
        lambda: make_net(nn.Sequential(make_conv(), nn.LazyBatchNorm2d(affine=False))), r"a\.1: got a lazy module", "ru"
    ),
    "quantised": (
        lambda: make_net(torch.ao.nn.quantized.Conv2d(8, 6, 1)),
        r"a: got a quantised module \(torch\.ao\.nn\.quantized\..*Conv2d\)", "convert the model before quantising it",
    ),
    "dynamically quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(make_net().eval(), {nn.Linear}),
        r"head: got a quantised module \(.*\)", "convert the model before quantising it",
    ),
    "quantisation-aware": (
        trained_in_eight_bits, r"a: got a quantised module \(torch\.ao\.nn\.qat.*\)", "convert the model before quant"
    ),
    "observed": (
        observed, r"b\.observer: got a quantised module \(torch\.ao\.quantization\.observer\.MinMaxObserver\)", "conv"
    ),
    "integer weights": (
        lambda: make_net(EightBits()), r"a\.weight: got a quantised weight \(torch.int8\)", "convert the model before"
    ),
    "quantised buffer": (
        lambda: make_net(Quantised()), r"a\.weight: got a quantised weight \(torch.qint8\)", "convert the model before"
    ),
    "weight norm": (
        lambda: make_net(nn.utils.weight_norm(make_conv())),
        r"a: got a hook that computes a weight in each call \(torch\.nn\.utils\.weight_norm\.WeightNorm\)", "remove it",
    ),
    "spectral norm": (
        lambda: make_net(nn.utils.spectral_norm(make_conv())), r"a: got a hook .*SpectralNorm\)", "remove it .*or use p"
    ),
    "pruned": (
        lambda: make_net(prune.l1_unstructured(make_conv(), "weight", 0.5)), r"a: got a hook .*L1Unstructured\)",
        "remove it .*prune.remove",
    ),
    "inference tensors": (
        built_for_inference, r"stem\.weight: got a tensor made inside torch.inference_mode\(\)", "build and load the"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_cannot_be_sliced_is_refused_by_name(name):
    build, got, remedy = REFUSED[name]
    needed = "needed: ordinary modules, with weights that are floating point numbers"
    check_refusal(build(), f"^{got}; {needed}; {remedy}")


def test_models_that_are_spread_over_processes_are_refused_by_name(tmp_path):
    run_in_processes(1, refuse_spread_models, tmp_path)


def refuse_spread_models(rank):
    message = "^the model: got a module wrapped in DistributedDataParallel; needed: .*; convert its `module`"
    check_refusal(DistributedDataParallel(make_net()), message)
    sharded = FullyShardedDataParallel(make_net(), device_id=torch.device("cpu"))
    remedy = "convert the model before it is wrapped, and wrap the supernet in DistributedDataParallel"
    check_refusal(sharded, f"^the model: got a module sharded by FSDP; needed: .*; {remedy}")
    model, mesh = make_net(), init_device_mesh("cpu", (1,))
    fully_shard(model.a, mesh=mesh)
    check_refusal(model, rf"^a: got a module sharded by fully_shard \(FSDP2\); needed: .*; {remedy}")
    model = make_net(distribute_module(make_conv(), mesh))
    check_refusal(model, r"^a\.weight: got a tensor of torch\.distributed\.tensor\.DTensor; needed: .*; convert")


@pytest.mark.slow
def test_models_that_are_prepared_for_quantisation_are_converted():
    """Modules of torch.ao that still compute with floating point numbers."""
    layer = torch.ao.nn.intrinsic.ConvReLU2d(make_conv(), nn.ReLU())
    assert check_conversion(make_net(layer)).space.max().to_dict() == {"stem": 8, "inner": 16, "a.0": 6, "b": 8}
    model = randomise(mobilenet_v2(quantize=False, width_mult=0.1, num_classes=3)).eval()
    supernet = convert(model, torch.zeros(1, 3, 32, 32))
    widths, x = supernet.space.uniform(0.5), torch.randn(2, 3, 32, 32)
    assert torch.equal(supernet(x, widths), supernet.extract(widths)(x))


def test_integers_that_are_no_weights_are_not_refused():
    """Indexes are often parameters."""

    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.order = nn.Parameter(torch.arange(8).flip(0), requires_grad=False)

        def forward(self, x):
            return x[:, :, self.order]

    supernet = check_conversion(randomise_without(Net(lambda s, x: s.logits(s.a(s.maps(x))), a=Shuffle()), "a.order"))
    assert supernet.space.names == ("stem", "inner")


def randomise_without(model, name):
    """Randomise all parameters but this one."""
    path, _, leaf = name.rpartition(".")
    parameter = model.get_submodule(path)._parameters.pop(leaf)
    randomise(model).get_submodule(path)._parameters[leaf] = parameter
    return model


# -- forwards that raise ----------------------------------------------------------------------------------------------


def raises(self, x):
    self.maps(x)
    raise KeyError("mask")


# the forward, and the type of the exception on the meta device
READS = {
    "item": (lambda s, x: s.logits(s.maps(x) * (s.bn.weight.mean() * x.mean()).item()), "RuntimeError"),
    "if": (lambda s, x: s.logits(s.maps(x if x.mean() > 0 else -x)), "RuntimeError"),
    "int": (lambda s, x: s.logits(s.maps(x) * int(x.amax())), "RuntimeError"),
    "any": (lambda s, x: s.logits(s.maps(x.nan_to_num() if (x > 9).any() else x)), "RuntimeError"),
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
    error = check_refusal(
        Net(body), rf"its forward raised {kind} in train\(\) mode on the meta device .* without reading data values; "
    )
    assert type(error.__cause__).__name__ == kind


def test_a_module_that_reads_data_is_named():
    class Gate(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = Net(lambda s, x: s.logits(s.part(s.maps(x))), part=nn.Sequential(nn.ReLU(), Gate()))
    check_refusal(
        model, r"^part\.1: its forward raised RuntimeError.*given inputs of the shapes \[\(2, 8, 8, 8\)\]; needed: "
    )


def test_a_forward_that_raises_is_refused_with_the_cause_and_the_place():
    message = r"\('mask'\), in the code of the model after bn_outer had run; needed: a forward that"
    error = check_refusal(Net(raises), message)
    assert type(error.__cause__) is KeyError
    assert error.__cause__.args == ("mask",)

    class Late(nn.Module):
        def forward(self, x):
            return x if self.training else self.missing(x)

    check_refusal(
        nn.Sequential(nn.Conv2d(3, 8, 1), Late()),
        r"^1: its forward raised AttributeError in eval\(\) mode on the meta device .*'Late' object has no attribute",
    )


def test_an_interrupt_is_not_turned_into_an_error():
    def stop(self, x):
        raise KeyboardInterrupt

    model = Net(stop)
    before = read_state(model)
    with pytest.raises(KeyboardInterrupt):
        convert(model, IMAGE)
    assert_untouched(before, model)


GLOBAL = {}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_code_that_finds_the_model_by_an_unknown_way_is_refused_with_the_weight_and_the_line(training):
    """Run on the copy, it would move the statistics of the model."""
    model = make_net(body=lambda s, x: s.logits(s.b(globals()["GLOB" + "AL"]["net"].a(s.maps(x))))).train(training)
    GLOBAL["net"] = model
    check_refusal(
        model, r"^the model: got code that.* still reads a\.weight of the model itself \(at .*test_refusals.py:"
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_forward_that_is_bound_to_the_model_itself_is_followed(training):
    model = make_net().train(training)
    inner = model.forward
    model.forward = lambda x: 2 * inner(x)
    assert check_conversion(model).space.names == ("stem", "inner", "a", "b")


def test_a_forward_that_was_replaced_by_a_method_is_followed():
    for replace in (lambda model, f: types.MethodType(f, model), lambda model, f: functools.partial(f, model)):
        model = make_net()
        model.forward = replace(model, lambda self, x: 2 * run_in_a_row(self, x))
        assert check_conversion(model).space.names == ("stem", "inner", "a", "b")


def test_a_model_that_cannot_be_copied_is_refused_with_the_attribute():
    model = make_net()
    model.a.extra = (number for number in ())
    check_refusal(
        model, r"^a\.extra: cannot be copied \(TypeError: cannot pickle .*generator.*; needed: a model that copy.deep"
    )


def test_activations_that_a_hook_has_collected_are_no_obstacle():
    model = make_net()
    model.a.extra = [torch.ones(2, requires_grad=True) * 2]
    supernet = convert(model, IMAGE)
    assert supernet.extract(supernet.space.uniform(0.5)).a.extra[0].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("example", "remedy"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"give images as the model gets them, in torch.float32"),
        (torch.zeros(1, 1, 32, 32), r"give images of 3 channels, .* such as torch.zeros\(1, 3, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"give a batch of images, example_input\[None\]: of the shape \(1, 3, 32, 32\)"),
    ],
)
def test_an_example_that_is_no_batch_of_images_is_told_what_is_one(example, remedy):
    with pytest.raises(TraceError, match=remedy):
        convert(timm.create_model("resnet10t", num_classes=10), example)


DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)


@pytest.fixture(scope="module")
def detectors():
    with torch.device("meta"):
        return {
            name: getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3).eval()
            for name in DETECTORS
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_is_told_to_convert_its_backbone(name, detectors):
    image = torch.zeros(3, 64, 64)
    target = {"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "labels": torch.ones(1, dtype=torch.long)}
    for example in ([image], image[None], ([image], [target])):
        with pytest.raises(TraceError, match=r"convert its backbone alone, convert\(model\.backbone, "):
            convert(detectors[name], example)


@pytest.mark.slow
def test_a_detector_inside_of_a_model_is_named_by_its_path(detectors):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"net": detectors["ssd300_vgg16"]})

        def forward(self, x):
            return self.inner["net"](x)

    with pytest.raises(TraceError, match=r"convert\(model\.inner\.net\.backbone, "):
        convert(Wrapper(), torch.zeros(1, 3, 64, 64))
