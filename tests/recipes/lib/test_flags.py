"""The flags of the recipes."""

import pytest

from timm_autoslim.recipes.lib.configuration import parse_args


def test_help_groups_the_options(capsys):
    with pytest.raises(SystemExit):
        parse_args("train", None, ["--help"])
    groups = capsys.readouterr().out.split("\n\n")
    for title, flags in {
        "optimizer:": ("--opt", "--clip-grad", "--grad-accum-steps"),
        "learning rate schedule:": ("--epochs", "--lr-base", "--sched", "--warmup-epochs"),
        "augmentation and regularization:": ("--aa", "--mixup", "--reprob", "--smoothing"),
        "batch norm:": ("--sync-bn", "--calibration-images"),
        "model exponential moving average:": ("--model-ema", "--model-ema-decay"),
        "checkpoints and tracking:": ("--resume", "--recovery-interval", "--log-wandb"),
        "supernet:": ("--sandwich", "--sampler", "--sandwich-delay", "--regularize-widest-only"),
        "distillation:": (
            "--distill-loss",
            "--distill-temperature",
            "--distill-teacher",
            "--teacher",
            "--teach-widest",
        ),
    }.items():
        begin = next(index for index, group in enumerate(groups) if group.startswith(title))
        text = "\n\n".join(groups[begin : begin + 2])
        assert all(flag in text for flag in flags)
