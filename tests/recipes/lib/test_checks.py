"""Values that a flag cannot have are refused by name, before anything is touched."""

import argparse
import math

import pytest
from helpers.recipes import run_train, write_config

from timm_autoslim.errors import ConfigError, DataError
from timm_autoslim.recipes import run
from timm_autoslim.recipes.lib.checks import RANGES, SCHEDULERS, Range, check_values
from timm_autoslim.recipes.lib.configuration import check_config, list_actions, parse_args
from timm_autoslim.recipes.lib.flags import FLAGS
from timm_autoslim.recipes.lib.parser import share

ACTIONS = {flag: (recipe, action) for recipe in FLAGS for flag, action in list_actions(recipe).items()}
NUMBERS = {flag: pair for flag, pair in ACTIONS.items() if pair[1].type in (int, float, share)}


def test_every_flag_of_numbers_has_a_range():
    assert set(NUMBERS) == set(RANGES)


def check(flag, value):
    action = NUMBERS[flag][1]
    count = action.nargs if isinstance(action.nargs, int) else 1
    number = int(value) if action.type is int else float(value)
    check_config({flag: [number] * count if action.nargs else number}, "the test")


@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers_out_of_range_are_refused(flag):
    action, needed = NUMBERS[flag][1], RANGES[flag]
    bad = [-1e9, needed.low - 1, needed.high + 1, 1e300 if needed.high < math.inf else math.inf]
    bad += [needed.low] * needed.above + [needed.high] * needed.below + [math.inf, -math.inf, math.nan]
    for value in {value for value in bad if not needed.holds(value)}:
        if action.type is int and not math.isfinite(value):
            continue
        with pytest.raises(ConfigError, match=f"^--{flag.replace('_', '-')} .*: needed "):
            check(flag, value)
    check(flag, max(needed.low + (1 if action.type is int else 0.5), 0))


def test_a_range_has_bounds_or_not():
    values = (-1, 0, 0.5, 1, 2, math.nan, math.inf)
    assert [value for value in values if Range(0, 1, "").holds(value)] == [0, 0.5, 1]
    assert [value for value in values if Range(0, 1, "", above=True, below=True).holds(value)] == [0.5]
    assert [value for value in values if Range(0, math.inf, "").holds(value)] == [0, 0.5, 1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--grad-accum-steps 0", "--grad-accum-steps 0: needed 1 or more"),
        ("--epochs -1", "--epochs -1: needed 0 or more"),
        ("--recovery-interval -1", "--recovery-interval -1: needed 0"),
        ("--checkpoint-hist 0", "--checkpoint-hist 0: needed 1"),
        ("-b 0", "--batch-size 0: needed 1"),
        ("--clip-grad -1", "--clip-grad -1.0: needed 0 or more"),
        ("--model-ema-decay 2", "--model-ema-decay 2.0: needed a number from 0 to below 1"),
        ("--scale 2 3", r"--scale \[2.0, 3.0\]: needed two shares above 0 and at most 1, the smaller one first"),
        ("--scale 1 0.5", r"--scale \[1.0, 0.5\]: needed two shares above 0 and at most 1, the smaller one first"),
        ("--ratio 2 1", r"--ratio \[2.0, 1.0\]: needed two numbers above 0, the smaller one first"),
        ("--mixup -1", "--mixup -1.0: needed 0 or more"),
        ("--smoothing 2", "--smoothing 2.0: needed a number from 0 to below 1"),
        ("--lr -1", "--lr -1.0: needed 0 or more"),
        ("--lr nan", "--lr nan: needed 0 or more"),
        ("--std 0", r"--std \[0.0\]: needed numbers above 0"),
        ("--std 0 0 0", r"--std \[0.0, 0.0, 0.0\]: needed numbers above 0"),
        ("--mean 0.1 0.2", r"--mean \[0.1, 0.2\]: needed one number, or one for each of --in-chans 1"),
        ("--opt sdg", "--opt sdg is unknown: needed one. Did you mean sgd?"),
        ("--opt adamw --opt-betas 0.9", r"--opt adamw cannot be made with --opt-betas \[0.9\]"),
        ("--opt-kwargs foo=1", r"--opt sgd cannot be made with .*--opt-kwargs {'foo': 1}: .*'foo'"),
        ("--sched cosin", "--sched cosin is unknown: needed one of cosine, .*. Did you mean cosine?"),
        ("--epochs 3 --warmup-epochs 3.5", "--warmup-epochs 3.5: needed at most --epochs 3, over which the learning"),
        ("--sched plateau", "--sched plateau steps by a metric, and these recipes step by updates"),
        ("--interpolation cubic", "--interpolation cubic is unknown: needed one of nearest, .*Did you mean bicubic?"),
        ("--remode pixels", "--remode pixels is unknown: needed one of const, rand, pixel. Did you mean pixel?"),
        ("--aa random", "--aa random is no policy of timm"),
        ("--mixup 0.2 -b 33", "--batch-size 33: --mixup and --cutmix pair images, and need an even number"),
        ("--crop-pct 1e-9", "--crop-pct 1e-09: needed a share from 0.01 to 1"),
        ("--subnet-sizes 1000000", "--subnet-sizes 1000000: resnet10t does not take such images: .*memory"),
        (
            "--initial-checkpoint nowhere.pth",
            "--initial-checkpoint nowhere.pth does not give weights of resnet10t: there is no such file",
        ),
        *(
            (f"{flag} {text}", f"{flag} {text}: needed KEY=VALUE")
            for flag in ("--model-kwargs", "--opt-kwargs", "--teacher-kwargs")
            for text in ("foo", "=3")
        ),
        ("--choices foo", "--choices: 'foo' is no width; needed widths of all groups, .* or of those"),
        ("--choices =3", "--choices: =3 has no glob; needed"),
        ("--in-chans 4 --mean 0.5 --std 0.5", r"--in-chans 4: images are read in gray \(1\) or in colour \(3\)"),
    ],
)
def test_values_that_cannot_be_are_refused_before_anything_is_touched(tmp_path, flags, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run_train(tmp_path, "never", *flags.split())
    assert not (tmp_path / "never").exists()


OF_NEW_TIMM = ("wsd", "rsqrt", "constant")


@pytest.mark.parametrize("flags", [*(f"--sched {name}" for name in SCHEDULERS if name not in OF_NEW_TIMM),
                                   "--opt adamw --opt-betas 0.9 0.99 --opt-eps 1e-7", "--opt lookahead_adam",
                                   "--opt lamb --opt-kwargs trust_clip=True", "--aa rand-m9-mstd0.5", "--aa augmix-m5",
                                   "--aa original", "--clip-grad 0"])  # fmt: skip
def test_what_timm_has_is_taken(flags):
    parse_args("train", None, flags.split())


def test_all_stages_are_checked_before_the_first_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "launch", lambda *_: pytest.fail("a stage was run"))
    command = ["-c", write_config(tmp_path), "--output", str(tmp_path), "--experiment", "all"]
    for flag, value in (("--finetune-lr", "-1"), ("--search-steps", "0"), ("--finetune-sched", "cosin")):
        with pytest.raises(
            ConfigError, match=f"--{flag.partition('-')[2].partition('-')[2].partition('-')[2]} {value}"
        ):
            run.main([*command, flag, value])
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(("runtime", "device"), [("cudagraph", "cpu"), ("eager", "gpu")])
def test_a_latency_that_cannot_be_measured_is_refused_before_any_work(runtime, device):
    args = argparse.Namespace(latency_runtime=runtime, latency_device=device, latency_threads=1)
    with pytest.raises(ConfigError, match=f"--latency {runtime} --latency-device {device}: .*default that works"):
        check_values(args)
