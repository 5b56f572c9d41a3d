"""recipes/validate.py: the accuracy of a model."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes import validate
from timm_autoslim.recipes.lib.image_sources import Digits

MODEL = ["--model", "resnet10t", "--model-kwargs", "channels=[8,8,16,16]", "stem_width=8", "--in-chans", "1"]
IMAGES = ["--dataset", "digits", "--img-size", "16", "--threads", "1"]


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1, channels=[8, 8, 16, 16], stem_width=8)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(10) == 3)  # all images are threes
    save_file(model.state_dict(), tmp_path / "threes.safetensors")
    return str(tmp_path / "threes.safetensors")


def test_the_accuracy_is_that_of_the_test_images(weights, capsys):
    validate.main([*MODEL, *IMAGES, "--initial-checkpoint", weights])
    threes = sum(target == 3 for _, target in Digits(False, "L"))
    shown = capsys.readouterr().out
    assert f"test top-1 {100 * threes / 360:.2f} %" in shown
    assert "Warning: that is hardly better than chance (10.0 %). Are these the weights of these classes" in shown


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (IMAGES, "^validate needs the model of your weights: give --model NAME"),
        ([*MODEL, *IMAGES], "^validate tests trained weights: give --initial-checkpoint FILE"),
        ([*MODEL, "--pretrained"], "^validate needs images: give --data-dir DIR"),
        ([*MODEL, *IMAGES, "--pretrained", "--initial-checkpoint", "x"], "are two starting points"),
    ],
)
def test_what_is_missing_is_said(flags, text):
    with pytest.raises(ConfigError, match=text):
        validate.main(flags)


def test_weights_of_other_classes_are_refused(tmp_path):
    model = timm.create_model("resnet10t", num_classes=7, in_chans=1, channels=[8, 8, 16, 16], stem_width=8)
    save_file(model.state_dict(), tmp_path / "seven.safetensors")
    with pytest.raises(ConfigError, match=r"^The weights of resnet10t are not of the 10 classes of the data: give"):
        validate.main([*MODEL, *IMAGES, "--initial-checkpoint", str(tmp_path / "seven.safetensors")])
