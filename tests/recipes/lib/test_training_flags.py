"""The flags of the recipes that train."""

import pytest
from helpers.flags import assert_groups

from timm_autoslim import DISTILLATION_LOSSES
from timm_autoslim.recipes.lib.configuration import parse_args

RUN = {"train": [], "finetune": ["run"], "slim": []}


@pytest.mark.parametrize("recipe", RUN)
def test_all_recipes_that_train_have_the_same_groups_of_flags(recipe, capsys):
    expected = {
        "optimizer": ("--opt", "--opt-kwargs", "--clip-grad", "--grad-accum-steps"),
        "learning rate schedule": ("--epochs", "--lr", "--lr-base", "--sched", "--warmup-epochs"),
        "augmentation and regularization": ("--aa", "--mixup", "--reprob", "--smoothing"),
        "memory": ("--grad-checkpointing",),
        "batch norm": ("--sync-bn", "--calibration-images"),
        "model exponential moving average": ("--model-ema", "--model-ema-decay"),
        "checkpoints and tracking": ("--resume", "--recovery-interval", "--log-tensorboard", "--log-wandb"),
        "distillation": ("--teacher", "--teacher-kwargs", "--distill-loss", "--distill-temperature"),
    }
    assert_groups(recipe, expected, capsys)


def test_what_timm_calls_knowledge_distillation_is_understood():
    words = ["--kd-model-name", "resnet18", "--kd-model-kwargs", "drop_rate=0.2", "--kd-temperature", "4"]
    args = parse_args("train", None, words)
    assert (args.teacher, args.teacher_kwargs, args.distill_temperature) == ("resnet18", {"drop_rate": 0.2}, 4.0)


def test_values_are_read_as_what_they_are():
    words = ["--opt-betas", "0.9", "0.95", "--opt-kwargs", "amsgrad=True", "--scale", "70%", "1", "--no-resume"]
    args = parse_args("slim", None, words)
    assert (args.opt_betas, args.opt_kwargs) == ([0.9, 0.95], {"amsgrad": True})
    assert (args.scale, args.resume) == ([0.7, 1.0], False)


def test_losses_are_those_of_the_library():
    losses = [parse_args("train", None, ["--distill-loss", key]).distill_loss for key in DISTILLATION_LOSSES]
    assert losses == list(DISTILLATION_LOSSES)
