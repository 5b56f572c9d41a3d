"""What export refuses, and that it leaves nothing behind."""

import pytest
import torch
from helpers.comparisons import same, state
from helpers.exported import CASES, load, slim
from helpers.specs import changed, make_spec
from torch import nn

from timm_autoslim.artifact.apply import apply_spec
from timm_autoslim.artifact.bases import create_base
from timm_autoslim.artifact.build import build_slim
from timm_autoslim.artifact.export import export
from timm_autoslim.artifact.spec import Spec
from timm_autoslim.errors import ArtifactError, StaleStatisticsError


def refused(error, message, tmp_path, model, **kwargs):
    with pytest.raises(error, match=message):
        export(model, tmp_path / "deep" / "out", **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_spec_is_refused(tmp_path):
    message = r"ResNet: got no spec; needed: .*use supernet.extract\(widths\)"
    refused(ArtifactError, message, tmp_path, create_base("resnet10t"))
    model = slim("resnet10t")
    model.autoslim = model.autoslim.to_dict()
    refused(ArtifactError, r"ResNet: got an `autoslim` attribute \{.*\}, which is no spec", tmp_path, model)


def test_a_spec_without_a_base_is_refused_until_it_is_named(tmp_path):
    model = slim("resnet10t")
    model.autoslim = model.autoslim.replace(base=None, base_args={})
    refused(ArtifactError, "ResNet: got a spec without a base; needed: .*; pass base=", tmp_path, model)
    folder = export(model, tmp_path / "out", base="resnet10t")
    assert load(folder).autoslim == model.autoslim.replace(base="resnet10t")


def test_stale_statistics_are_refused(tmp_path):
    model = slim("resnet10t")
    model.layer2[0].bn2.num_batches_tracked.zero_()
    message = r"layer2\.0\.bn2: got BatchNorm statistics that are those of the widest subnet.*timm_autoslim\.calibrate"
    refused(StaleStatisticsError, message, tmp_path, model)


def test_the_widest_model_keeps_the_statistics_of_the_base(tmp_path):
    model = apply_spec(create_base("resnet10t"), make_spec("resnet10t", {}))
    assert same(state(model), state(load(export(model, tmp_path / "out"))))


def test_a_base_with_other_arguments_is_refused(tmp_path):
    narrow, attributes, _ = CASES["torchvision/squeezenet1_1"]
    model = build_slim(make_spec("torchvision/squeezenet1_1", narrow, attributes))
    model.features[0] = nn.Conv2d(3, 32, 3, stride=2)
    message = (
        r"features\.0\.weight: got shape \(32, 3, 3, 3\); needed: shape \(64, 3, 3, 3\) as the base and the spec "
        r"build it; pass base_args= with the arguments that 'torchvision/squeezenet1_1' was created with"
    )
    refused(ArtifactError, message, tmp_path, model)


def test_another_base_is_refused(tmp_path):
    model = slim("torchvision/squeezenet1_1")
    refused(ArtifactError, "needed: an integer from|needed: shape", tmp_path, model, base="torchvision/squeezenet1_0")
    model.autoslim = model.autoslim.replace(sizes={}, attributes={})
    refused(
        ArtifactError,
        "model: got a SqueezeNet; needed: an? AlexNet; pass base_args=",
        tmp_path,
        model,
        base="torchvision/alexnet",
    )


def test_missing_and_foreign_tensors_are_named(tmp_path):
    model = slim("torchvision/squeezenet1_1")
    model.register_buffer("extra", torch.zeros(2))
    refused(ArtifactError, r"extra: got shape \(2,\); needed: no such tensor", tmp_path, model)
    del model.extra
    model.features[0].bias = None
    refused(ArtifactError, r"features\.0\.bias: got no such tensor; needed: shape \(64,\)", tmp_path, model)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nn.SiLU, "needed: JSON data"), ({1: 2}, "needed: a text key"), (float("nan"), "needed: a number")],
)
def test_base_args_that_json_cannot_hold_are_refused(value, message, tmp_path):
    refused(ArtifactError, rf"spec 'base_args\.x'.*{message}", tmp_path, slim("test_vit"), base_args={"x": value})
    refused(ArtifactError, r"base_args: got \['x'\]; needed: a mapping", tmp_path, slim("test_vit"), base_args=["x"])


def test_tuples_in_base_args_are_the_lists_of_json(tmp_path):
    model = slim("test_vit")
    loaded = load(export(model, tmp_path / "out", base_args={"img_size": (96, 96)}))
    assert loaded.autoslim == model.autoslim.replace(base_args={"img_size": [96, 96]})
    assert loaded.autoslim.copy_arguments() == {"img_size": [96, 96]}
    assert same(state(model), state(loaded))


def test_base_args_that_load_weights_are_refused(tmp_path):
    refused(ArtifactError, "spec 'base_args.pretrained'", tmp_path, slim("resnet10t"), base_args={"pretrained": True})


def test_a_spec_that_does_not_fit_the_base_is_refused(tmp_path):
    model = slim("resnet10t")
    data = changed(model.autoslim.to_dict(), ["sizes", "conv1.0.weight"], [900, None, None, None])
    model.autoslim = Spec.parse(data)
    refused(ArtifactError, r"spec 'sizes\.conv1\.0\.weight': got \(900", tmp_path, model)


@pytest.mark.slow
def test_bases_that_cannot_be_built_on_the_meta_device_export(tmp_path):
    model = apply_spec(create_base("torchvision/regnet_y_400mf"), make_spec("torchvision/regnet_y_400mf", {}))
    assert same(state(model), state(load(export(model, tmp_path / "out"))))
