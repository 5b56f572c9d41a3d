"""What train.py's options do, and what it refuses."""

import argparse
import copy
import csv
import json
import random
import sys
from types import SimpleNamespace

import accelerate
import data
import loop
import numpy as np
import processes
import pytest
import timm
import torch
import validation
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.recipes import common, parse, train, trained, write_config
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from timm_autoslim.errors import AutoSlimError, ConfigError, DataError, WidthError
from timm_autoslim.training.dropout import disable_dropout

# ------------------------------------------------------------------------------------------------- training options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sandwich 1", "--sandwich 1: the widest and the narrowest are always trained"),
        ("--sandwich-delay 1", "--sandwich-delay 1.0: needed a share of the steps, from 0 to below 1"),
        ("--sandwich-delay -0.1", "--sandwich-delay -0.1: needed"),
        ("--distill-temperature 0", "--distill-temperature 0.0: needed a number above 0"),
        ("--distill-temperature nan", "--distill-temperature nan: needed"),
        ("--teacher resnet18 --teach-widest 1.5", "--teach-widest 1.5: needed a share from 0 to 1"),
        ("--teach-widest 0.5", "--teach-widest needs an outside --teacher"),
        ("--distill-teacher ema", "--distill-teacher ema needs the moving average: add --model-ema"),
        ("--distill-teacher ema --model-ema --teacher resnet18", "are two teachers: give one"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, "never", *flags.split())
    assert not (tmp_path / "never").exists()


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    args = parse("train", write_config(tmp_path_factory.mktemp("options"), model_kwargs={"drop_rate": 0.5}))
    args.num_classes = 10
    torch.manual_seed(0)
    return common.make_supernet(args).train()


UPDATE = 7


def one_step(folder, supernet, *argv, teacher=None, ema=None):
    """The losses of one step with these flags, of the same supernet and batch, and what took it."""
    args = parse("train", write_config(folder), *argv)
    sandwich = train.Sandwich(processes.make_accelerator(args), args, supernet.space, teacher)
    sandwich.begin(10, ema)
    torch.manual_seed(5)
    inputs, targets = torch.randn(8, 1, 16, 16), torch.randint(0, 10, (8,))
    losses = sandwich(supernet, inputs, targets, UPDATE, torch.Tensor.backward)
    supernet.zero_grad()
    flat = [torch.full((1,), float("nan")) if loss is None else loss.flatten() for loss in losses.values()]
    return torch.cat(flat).tolist(), sandwich, inputs


@pytest.mark.parametrize(
    ("flags", "differ"),
    [
        ("", []),
        ("--distill-temperature 1 --distill-loss kl --sampler independent --teach-widest 0", []),
        ("--sandwich-delay 0.7", []),  # 7 of 10 steps: over before update 7
        ("--sampler multiplier", [2, 3]),
        ("--distill-temperature 4", [1, 2, 3]),
        ("--distill-loss alpha", [1, 2, 3]),
        ("--distill-loss alpha --distill-temperature 4", [1, 2, 3]),
        ("--regularize-widest-only", [1, 2, 3]),
        ("--smoothing 0.3", [0]),
    ],
)
def test_an_option_changes_what_it_says_and_nothing_else(tmp_path, supernet, flags, differ):
    before, _, _ = one_step(tmp_path, supernet)
    after, _, _ = one_step(tmp_path, supernet, *flags.split())
    assert [index for index in range(4) if before[index] != after[index]] == differ


def test_the_delay_trains_the_widest_alone(tmp_path, supernet):
    before, _, _ = one_step(tmp_path, supernet)
    after, sandwich, inputs = one_step(tmp_path, supernet, "--sandwich-delay", "0.8")
    assert after[0] == before[0]
    assert (
        sandwich(supernet, inputs, torch.zeros(8, dtype=torch.long), UPDATE, torch.Tensor.backward)["narrowest_loss"]
        is None
    )
    assert sandwich(supernet, inputs, torch.zeros(8, dtype=torch.long), 8, torch.Tensor.backward)["narrowest_loss"] > 0
    supernet.zero_grad()


def test_the_sampler_is_the_one_asked_for(tmp_path, supernet):
    def drawn(*argv):
        _, sandwich, _ = one_step(tmp_path, supernet, *argv)
        return [widths for update in range(20) for widths in sandwich.random_widths(update)]

    uniform = {supernet.space.uniform(share / 1000) for share in range(1, 1001)}
    assert drawn("--sampler", "multiplier") == drawn("--sampler", "multiplier")
    assert drawn("--sampler", "multiplier") != drawn("--sampler", "multiplier", "--seed", "3")
    assert set(drawn("--sampler", "multiplier")) <= uniform
    assert not set(drawn()) & uniform


def test_the_subnet_of_a_loss_is_described(tmp_path, supernet):
    losses, sandwich, inputs = one_step(tmp_path, supernet, "--regularize-widest-only", teacher=(teach := Fixed()))
    assert sandwich.describe("narrowest_loss", 0, UPDATE) == "the narrowest subnet"
    for index in (0, 1):
        before, widths = sandwich.describe("random_loss", index, UPDATE).split("widths ")
        assert before == "the random subnet with the "
        with torch.no_grad(), disable_dropout(supernet):
            outputs = supernet(inputs, supernet.space.from_dict(json.loads(widths)))
        assert F.cross_entropy(outputs, teach(inputs).softmax(1)).item() == pytest.approx(losses[2 + index], rel=1e-5)


def taught(folder, name, monkeypatch, *argv):
    """Train for one update; returns its gradients, and those that labels alone and that distillation would give."""
    found, plain = [], train.Sandwich.__call__

    def noted(self, network, inputs, targets, update, backward):
        supernet, space = network, self.space
        subnets = [space.max(), space.min(), *self.random_widths(update)]
        state = copy.deepcopy(supernet.state_dict())
        with torch.no_grad():
            soft = self.teacher(inputs) if self.teacher else supernet(inputs)
        probabilities = (soft / self.args.distill_temperature).softmax(1)

        def gradients(distilled):
            for index, widths in enumerate(subnets):
                outputs = supernet(inputs, widths)
                if index and distilled:
                    scaled = outputs / self.args.distill_temperature
                    loss = F.cross_entropy(scaled, probabilities) * self.args.distill_temperature**2
                else:
                    loss = self.loss_fn(outputs, targets)
                loss.backward()
            return collected(supernet)

        expected = [gradients(False), gradients(True)]
        supernet.load_state_dict(state)  # running statistics
        losses = plain(self, network, inputs, targets, update, backward)
        found.append([collected(supernet), *expected])
        return losses

    monkeypatch.setattr(train.Sandwich, "__call__", noted)
    trained(folder, name, *argv, limit_train=64, batch_size=32, val_widths=[], calibration_images=32)
    return found[0]


def collected(supernet):
    flat = torch.cat([parameter.grad.flatten() for parameter in supernet.parameters()])
    supernet.zero_grad()
    return flat


@pytest.mark.parametrize("flags", [(), ("--distill-temperature", "3"), ("--teacher", "outside")])
def test_a_training_is_distilled(tmp_path, monkeypatch, flags):
    if "--teacher" in flags:
        save_teacher(tmp_path / "outside")
        flags = ("--teacher", str(tmp_path / "outside"))
    got, labels, formula = taught(tmp_path, "run", monkeypatch, *flags)
    torch.testing.assert_close(got, formula, atol=1e-5, rtol=1e-4)
    assert (got - labels).norm() > 0.1 * labels.norm()  # the same step by the labels alone


class Fixed(torch.nn.Module):
    """A teacher that answers by the images' mean."""

    def forward(self, inputs):
        return inputs.mean((1, 2, 3))[:, None] * torch.arange(10.0)


def test_the_moving_average_teaches_if_it_shall(tmp_path, supernet):
    ema = copy.deepcopy(supernet.model).eval()
    flags = ["--regularize-widest-only", "--model-ema"]
    before, _, _ = one_step(tmp_path, supernet, *flags, ema=ema)
    after, _, inputs = one_step(tmp_path, supernet, *flags, "--distill-teacher", "ema", ema=ema)
    assert [index for index in range(4) if before[index] != after[index]] == [1, 2, 3]
    with torch.no_grad(), disable_dropout(supernet):
        outputs = supernet(inputs, supernet.space.min())
        assert after[1] == pytest.approx(F.cross_entropy(outputs, ema(inputs).softmax(1)).item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in ema.parameters())


def save_teacher(folder, num_classes=10, **config):
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=num_classes, in_chans=1).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 16, 16), "num_classes": num_classes, **config}
    save_for_hf(model, folder, safe_serialization=True)
    return model


def test_an_outside_teacher_sees_images_normalised_as_its_own(tmp_path):
    images = torch.rand(3, 1, 16, 16)
    args = parse("train", write_config(tmp_path), "--teacher", str(tmp_path / "teacher"))
    args.num_classes = 10
    for mean, std in (((0.5,), (0.5,)), ((0.2,), (0.8,))):
        model = save_teacher(tmp_path / "teacher", mean=mean, std=std)
        teacher = common.make_teacher(args)
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        with torch.no_grad():
            expected = model((images - mean[0]) / std[0])
            torch.testing.assert_close(teacher((images - 0.5) / 0.5), expected, atol=1e-5, rtol=1e-4)


def test_an_outside_teacher_teaches(tmp_path):
    save_teacher(tmp_path / "teacher")
    options = ["--distill-loss", "alpha", "--channels-last"]
    teacher = ["--teacher", f"local-dir:{tmp_path / 'teacher'}"]
    folders = [
        trained(tmp_path, name, *options, *more)
        for name, more in {"alone": [], "taught": teacher, "both": [*teacher, "--teach-widest", "0.5"]}.items()
    ]
    alone, taught, both = (load_file(folder / "supernet.safetensors") for folder in folders)
    assert taught.keys() == alone.keys()  # the teacher is no part of what is kept
    for first, second in ((alone, taught), (taught, both)):
        assert any(not torch.equal(first[name], second[name]) for name in first)


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    save_teacher(tmp_path / "seven", num_classes=7)
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "seven"), r"has outputs \(7,\), but the data have 10 classes: fine-tune it"),
        (str(tmp_path / "empty"), r"gives no logits of images \(1, 16, 16\): "),
        ("resnet_of_nobody", r"gives no logits of images \(1, 16, 16\): .*resnet_of_nobody"),
        ("test_resnet_nowhere.in1k", r"gives no logits"),
    ):
        args = parse("train", write_config(tmp_path), "--teacher", name)
        args.num_classes = 10
        with pytest.raises(ConfigError, match=message):
            common.make_teacher(args)


def test_help_groups_the_options(capsys):
    with pytest.raises(SystemExit):
        common.parse_args("train", None, ["--help"])
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


# ----------------------------------------------------------------------------------------------------------- runs


def test_mixup_clipping_and_no_epochs(tmp_path):
    trained(tmp_path, "mixed", "--mixup", "0.2", "--clip-grad", "1", "--channels-last", "--lr-base", "0.1")
    assert (trained(tmp_path, "untrained", epochs=0) / "supernet.safetensors").is_file()


def test_a_diverged_training_stops_and_names_the_way_back(tmp_path):
    start = r"The loss is not finite at step 1 \(epoch 1 of 1\): widest_loss is nan of the widest subnet\."
    with pytest.raises(loop.NotFiniteError, match=start + " There is no checkpoint yet: lower --lr"):
        trained(tmp_path, "broken", lr=1e30)
    # One update an epoch: its loss is seen before it ruins the weights, so the weights are looked at too.
    good = trained(tmp_path, "good", batch_size=128)
    (good / "supernet.safetensors").unlink()
    kept = good / "checkpoints" / "update-00000001"
    message = rf"not finite at step 2 \(epoch 2 of 2\), .* is {kept}: lower --lr, .* and --resume from it"
    with pytest.raises(loop.NotFiniteError, match=message):
        trained(tmp_path, "good", "--resume", "--lr", "1e38", "--weight-decay", "1e6", epochs=2, batch_size=128)
    assert list((good / "checkpoints").iterdir()) == [kept]
    trained(tmp_path, "good", "--resume", epochs=2, batch_size=128)
    with pytest.raises(FloatingPointError, match="not finite"):  # an ordinary run's handlers catch it too
        trained(tmp_path, "again", lr=1e30)


def test_the_first_bad_loss_is_named():
    losses = [{"widest_loss": torch.tensor(1.0), "random_loss": torch.tensor([1.0, 2.0])} for _ in range(3)]
    losses[1]["random_loss"][1] = float("inf")
    losses[2]["widest_loss"] = torch.tensor(float("nan"))
    with pytest.raises(loop.NotFiniteError, match=r"at step 8 \(epoch 3\): random_loss is inf of random_loss, 1, 8\."):
        loop.check_losses(list(enumerate(losses, 7)), "epoch 3", lambda *what: ", ".join(map(str, what)))
    loop.check_losses(list(enumerate(losses[:1])), "epoch 3", None)


# ------------------------------------------------------------------------------------- batches, classes, precision


def test_a_batch_too_small_for_batchnorm_is_refused(tmp_path):
    message = r"--batch-size 1 is too small: layer3\.0\.bn1 is a BatchNorm over one value per channel .*\(1, 2, 1, 1\)"
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, "one", "-b", "1")
    assert not (tmp_path / "one" / "args.yaml").exists()
    trained(tmp_path, "two", "-b", "2", "--limit-train", "40")
    trained(
        tmp_path, "layernorm", "-b", "1", "--limit-train", "36", model="test_convnext", model_kwargs={}, img_size=32
    )


def test_looking_at_the_batch_leaves_the_model_as_it_was():
    model = timm.create_model("resnet10t", in_chans=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validation.check_batch(model, model, torch.randn(2, 1, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    for count, also in ((1, r"\."), (2, ", or --sync-bn")):
        with pytest.raises(ConfigError, match=f"which has no variance. Give --batch-size 2 or more{also}"):
            validation.check_batch(model, model, torch.randn(1, 1, 32, 32), count)


def test_a_class_that_the_model_does_not_have_is_named(tmp_path):
    images = [(Image.new("L", (16, 16)), target) for target in (0, 1, 2, 3)]
    subset = data.Subset(images, classes=3)
    assert subset[2][1] == 2
    with pytest.raises(DataError, match=r"Image 3 has the class 3, but the model has 3 classes \(0 to 2\): give"):
        subset[3]
    args = parse("train", write_config(tmp_path), "-b", "1", "-j", "1")
    args.num_classes, args.interpolation, args.crop_pct = 3, "bilinear", 1.0
    with pytest.raises(DataError, match="Image 3 has the class 3"):
        list(data.plain_loader(args, images))  # from a worker process too


def test_float16_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(ConfigError, match=r"float16 needs a GPU .* give --amp-dtype bfloat16"):
            trained(tmp_path, "half", "--amp", "--amp-dtype", "float16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16_trains_in_bfloat16(tmp_path):
    seen = []
    hook = register_module_forward_hook(
        lambda module, _, output: seen.append(output.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = trained(tmp_path, "bf16", "--amp", "--channels-last", "--recovery-interval", "3", img_size=32)
    finally:
        hook.remove()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.bfloat16 in seen
    weights = load_file(run / "supernet.safetensors")
    assert all(value.dtype == torch.float32 for name, value in weights.items() if "num_batches" not in name)
    full = load_file(trained(tmp_path, "fp32", "--channels-last", img_size=32) / "supernet.safetensors")
    assert any(not torch.equal(value, full[name]) for name, value in weights.items())


def test_channels_last_reaches_weights_and_images(tmp_path, monkeypatch):
    seen = []
    plain = train.Sandwich.__call__

    def look(self, network, inputs, *given):
        seen.append([x.is_contiguous(memory_format=torch.channels_last) for x in (inputs, *network.parameters())
                     if x.dim() == 4 and x.shape[1] > 1])  # fmt: skip
        return plain(self, network, inputs, *given)

    monkeypatch.setattr(train.Sandwich, "__call__", look)
    color = {"in_chans": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    for flags, expected in ((["--channels-last"], True), ([], False)):
        trained(tmp_path, str(expected), *flags, **color)
        assert seen[-1][0] == expected
        assert all(seen[-1]) == expected


def test_synchronised_norms_are_ordinary_ones_in_one_process(tmp_path):
    plain, synced = (trained(tmp_path, name, *flags) for name, flags in {"plain": (), "sync": ("--sync-bn",)}.items())
    first, second = (load_file(folder / "supernet.safetensors") for folder in (plain, synced))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(ConfigError, match="--sync-bn needs GPUs: torch's SyncBatchNorm does not run on CPUs"):
        processes.synchronize_norms(argparse.Namespace(num_processes=2, device=torch.device("cpu")), torch.nn.ReLU())


# -------------------------------------------------------------------------------- widths, validation, tracking


def test_choices_of_groups_are_what_is_drawn(tmp_path):
    config = write_config(tmp_path, choices={"layer2*": [2, 5]}, min_width=0.5)
    args = parse("train", config, "--choices", "layer1*=[3,8]", "layer2*=[2,5]")
    args.num_classes = 10
    space = common.make_supernet(args).space
    drawn = {name: set() for name in space.names}
    for update in range(60):
        for name, width in space.sample(torch.Generator().manual_seed(update)).items():
            drawn[name].add(width)
    assert drawn["layer1.0.conv1"] == {3, 8}
    assert drawn["layer2.0.conv1"] == drawn["layer2.0.conv2"] == {2, 5, 8}
    assert drawn["layer3.0.conv1"] == set(range(8, 17, 2))
    args = parse("train", config)
    args.num_classes = 10
    assert common.make_supernet(args).space["layer2.0.conv1"].choices == (2, 5, 8)
    with pytest.raises(WidthError, match=r"choices=\{'stage2\*': ...\}: the glob matches no group"):
        trained(tmp_path, "other", "--choices", "stage2*=[8,16]")  # of another model


def test_a_configuration_of_another_model_is_refused(tmp_path):
    with pytest.raises(AutoSlimError, match=r"'resnet10t' cannot be created with .*'dims'"):
        trained(tmp_path, "a", model_kwargs={"dims": [8, 16]})
    with pytest.raises(WidthError, match=r"freeze='stages.3': the glob matches no module"):
        trained(tmp_path, "b", "--freeze", "stages.3")
    assert not (tmp_path / "a").exists()


def test_the_same_seed_gives_the_same_run(tmp_path):
    runs = [trained(tmp_path, name, "--seed", seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))]
    first, again, other = ((folder / "supernet.safetensors").read_bytes() for folder in runs)
    assert first == again
    assert first != other


def test_validated_subnets_are_calibrated(tmp_path):
    seen = []

    def look(accelerator, model, loader, name=""):
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        seen.append((name, norms[3].num_features, int(norms[3].num_batches_tracked)))
        return {"loss": 1.0, "top1": 2.0, "top5": 3.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "evaluate", look)
        run = trained(tmp_path, "run", "--val-widths", "0.25", "0.75", "0.25")
    # 64 calibration images are two batches; the widest has the four of its training
    assert seen == [("widest", 8, 4), ("uniform_0.75", 6, 2), ("uniform_0.25", 2, 2), ("narrowest", 1, 2)]
    row = next(csv.DictReader((run / "summary.csv").open()))
    assert (row["eval_uniform_0.75_top5"], row["eval_narrowest_top1"]) == ("3.0", "2.0")
    with pytest.raises(ConfigError, match=r"--val-widths 1\.5: needed shares of the channels, above 0 and at most 1"):
        trained(tmp_path, "never", "--val-widths", "1.5")


def test_accuracies_are_counted_over_all_images():
    outputs = torch.eye(8).flip(1).repeat(3, 1)[:23]  # the target's logit is the first, second, ... best
    targets = torch.arange(8).flip(0).repeat(3)[:23]
    outputs[0, targets[0]], outputs[1, targets[1]] = -1.0, 0.0
    accelerator = Accelerator()
    pairs = torch.utils.data.TensorDataset(outputs, targets)
    loader = accelerator.prepare(torch.utils.data.DataLoader(pairs, batch_size=5))
    found = validation.evaluate(accelerator, torch.nn.Identity(), loader)
    ranks = [(row > row[target]).sum().item() for row, target in zip(outputs, targets, strict=True)]
    assert found["top1"] == pytest.approx(100 * sum(rank == 0 for rank in ranks[2:]) / 23)
    assert found["top5"] < 100
    assert found["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-5)


def test_epochs_without_validation_have_empty_cells(tmp_path):
    run = trained(tmp_path, "run", "--val-interval", "2", epochs=3)
    rows = list(csv.DictReader((run / "summary.csv").open()))
    assert [bool(row["eval_widest_top1"]) for row in rows] == [False, True, True]  # the last one always
    assert all(float(row["train_widest_loss"]) > 0 and row["lr"] for row in rows)


def test_trackers_that_are_not_installed_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ConfigError, match=f"--log-{name}: {name} is not installed: pip install {name}"):
            trained(tmp_path, "never", f"--log-{name}")


def test_a_resumed_run_is_the_same_run_at_weights_and_biases(tmp_path, monkeypatch):
    started = []
    fake = SimpleNamespace(init=lambda **given: started.append(given) or SimpleNamespace(log=logged, finish=print))
    steps = []

    def logged(values, step, **_):
        steps.append((step, sorted(values)[:2]))

    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [accelerate.utils.LoggerType.WANDB])
    run = trained(tmp_path, "run", "--log-wandb", "--wandb-project", "mine")
    trained(tmp_path, "run", "--log-wandb", "--wandb-project", "mine", "--resume", epochs=2)
    first, second = started
    assert first["project"] == "mine"
    assert first["id"] == second["id"] == (run / "wandb_id.txt").read_text()
    assert (first["resume"], first["name"], first["dir"]) == ("allow", "run", str(run))
    assert first["config"]["batch_size"] == 32
    assert [step for step, _ in steps] == [4, 4, 8, 8]
    assert [names[0] for _, names in steps] == ["lr", "val/images_per_s"] * 2


def test_images_are_augmented_by_seed_epoch_and_image_alone(tmp_path):
    args = parse("train", write_config(tmp_path, color_jitter=0.4), "--aa", "rand-m9", "--reprob", "0.5")
    args.num_classes, args.interpolation = 10, "bilinear"
    source = data.Digits(True, "L")

    def batches(indices, epoch, **changes):
        for name, value in changes.items():
            setattr(args, name, value)
        loader = data.training_loader(args, source, indices)
        loader.dataset.epoch = epoch
        state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        images = torch.stack([loader.dataset[item][0] for item in range(len(indices))])
        assert torch.equal(state[0], torch.get_rng_state())
        assert state[1:] == (random.getstate(), str(np.random.get_state()))
        return images

    indices = list(range(40, 72))
    first = batches(indices, 0)
    torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(batches(indices[::-1], 0).flip(0), first)
    assert not torch.equal(batches(indices, 1), first)
    assert not torch.equal(batches(indices, 0, seed=7), first)
