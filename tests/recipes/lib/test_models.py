"""The supernet that the flags ask for."""

import pytest
import timm
import torch
from helpers.recipes import parse_train, run_train

from timm_autoslim.errors import AutoSlimError, WidthError
from timm_autoslim.recipes.lib.models import describe_input, make_supernet


def test_random_widths_are_choices_of_the_flags(tmp_path):
    flags = ["--choices", "layer1*=[3,8]", "layer2*=[2,5]"]
    args = parse_train(tmp_path, *flags, choices={"layer2*": [2, 5]}, min_width=0.5)
    space = make_supernet(args).space
    widths = {name: set() for name in space.names}
    for update in range(60):
        for name, width in space.sample(torch.Generator().manual_seed(update)).items():
            widths[name].add(width)
    assert widths["layer1.0.conv1"] == {3, 8}
    assert widths["layer2.0.conv1"] == widths["layer2.0.conv2"] == {2, 5, 8}
    assert widths["layer3.0.conv1"] == set(range(8, 17, 2))
    args = parse_train(tmp_path, choices={"layer2*": [2, 5]}, min_width=0.5)
    assert make_supernet(args).space["layer2.0.conv1"].choices == (2, 5, 8)
    with pytest.raises(WidthError, match=r"choices: got a glob \('stage2\*'\) that matches no group"):
        run_train(tmp_path, "other", "--choices", "stage2*=[8,16]")  # of another model


def test_a_configuration_of_another_model_is_refused(tmp_path):
    with pytest.raises(AutoSlimError, match=r"base 'resnet10t': cannot be created with .*'dims'"):
        run_train(tmp_path, "a", model_kwargs={"dims": [8, 16]})
    with pytest.raises(WidthError, match=r"freeze: got a glob \('stages.3'\) that matches no module"):
        run_train(tmp_path, "b", "--freeze", "stages.3")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_the_input_is_that_of_the_training_and_not_of_the_base(tmp_path):
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    assert "test_input_size" in model.pretrained_cfg
    args = parse_train(tmp_path)
    args.crop_pct, args.crop_mode, args.interpolation = 0.9, "squash", "bicubic"
    describe_input(model, args)
    expected = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "crop_pct": 0.9, "crop_mode": "squash",
                "interpolation": "bicubic"}  # fmt: skip
    assert {key: model.pretrained_cfg[key] for key in expected} == expected
    assert "test_input_size" not in model.pretrained_cfg
    assert model.pretrained_cfg["architecture"] == "resnet10t"
