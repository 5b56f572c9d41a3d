"""The flags of the recipes, and the numbers that they refuse."""

import pytest
from helpers.recipes import run_train

from timm_autoslim.errors import ConfigError
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--grad-accum-steps 0", "--grad-accum-steps 0: needed 1 or more"),
        ("--epochs -1", "--epochs -1: needed 0 or more"),
        ("--recovery-interval -1", "--recovery-interval -1: needed 0"),
        ("--checkpoint-hist 0", "--checkpoint-hist 0: needed 1"),
        ("-b 0", "--batch-size 0: needed 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        run_train(tmp_path, "never", *flags.split())
    assert not (tmp_path / "never" / "args.yaml").exists()
