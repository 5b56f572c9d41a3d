"""recipes/finetune.py: how images were prepared is written down; test_run.py runs it from end to end."""

import timm
from helpers.recipes import parse_train

from timm_autoslim.recipes.finetune import describe_input


def test_the_input_is_that_of_the_training_and_not_of_the_base(tmp_path):
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    assert "test_input_size" in model.pretrained_cfg
    args = parse_train(tmp_path)
    args.crop_pct, args.interpolation = 0.9, "bicubic"
    describe_input(model, args)
    expected = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "crop_pct": 0.9, "interpolation": "bicubic"}
    assert {key: model.pretrained_cfg[key] for key in expected} == expected
    assert "test_input_size" not in model.pretrained_cfg
    assert model.pretrained_cfg["architecture"] == "resnet10t"
