"""Accuracies of subnets, and batches that BatchNorm can measure."""

import csv

import pytest
import timm
import torch
from accelerate import Accelerator
from helpers.recipes import run_train
from torch.nn import functional as F

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib import validation


@pytest.mark.slow
def test_a_batch_too_small_for_batchnorm_is_refused(tmp_path):
    message = r"--batch-size 1 is too small: layer3\.0\.bn1 is a BatchNorm over one value per channel .*\(1, 2, 1, 1\)"
    with pytest.raises(ConfigError, match=message):
        run_train(tmp_path, "one", "-b", "1")
    assert not (tmp_path / "one" / "args.yaml").exists()
    run_train(tmp_path, "two", "-b", "2", "--limit-train", "36")
    run_train(
        tmp_path, "layernorm", "-b", "1", "--limit-train", "34", model="test_convnext", model_kwargs={}, img_size=32
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


def test_validated_subnets_are_calibrated(tmp_path):
    notes = []

    def look(accelerator, model, loader, name=""):
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        notes.append((name, norms[3].num_features, int(norms[3].num_batches_tracked)))
        return {"loss": 1.0, "top1": 2.0, "top5": 3.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "evaluate", look)
        run = run_train(tmp_path, "run", "--val-widths", "0.25", "0.75", "0.25")
    # 64 calibration images are two batches; the widest had four of its training before
    assert notes == [("widest", 8, 2), ("uniform_0.75", 6, 2), ("uniform_0.25", 2, 2), ("narrowest", 1, 2)]
    row = next(csv.DictReader((run / "summary.csv").open()))
    assert (row["eval_uniform_0.75_top5"], row["eval_narrowest_top1"]) == ("3.0", "2.0")
    with pytest.raises(
        ConfigError, match=r"--val-widths \[1\.5\]: needed shares of the channels, above 0 and at most 1"
    ):
        run_train(tmp_path, "never", "--val-widths", "1.5")


def test_accuracies_are_counted_over_all_images():
    outputs = torch.eye(8).flip(1).repeat(3, 1)[:23]  # the target's logit is the first, second, ... best
    targets = torch.arange(8).flip(0).repeat(3)[:23]
    outputs[0, targets[0]], outputs[1, targets[1]] = -1.0, 0.0
    accelerator = Accelerator()
    pairs = torch.utils.data.TensorDataset(outputs, targets)
    loader = accelerator.prepare(torch.utils.data.DataLoader(pairs, batch_size=5))
    accuracies = validation.evaluate(accelerator, torch.nn.Identity(), loader)
    ranks = [(row > row[target]).sum().item() for row, target in zip(outputs, targets, strict=True)]
    assert accuracies["top1"] == pytest.approx(100 * sum(rank == 0 for rank in ranks[2:]) / 23)
    assert accuracies["top5"] < 100
    assert accuracies["loss"] == pytest.approx(F.cross_entropy(outputs, targets).item(), rel=1e-5)


def test_epochs_without_validation_have_empty_cells(tmp_path):
    run = run_train(tmp_path, "run", "--val-interval", "2", epochs=3, limit_train=64)
    rows = list(csv.DictReader((run / "summary.csv").open()))
    assert [bool(row["eval_widest_top1"]) for row in rows] == [False, True, True]  # the last one always
    assert all(float(row["train_widest_loss"]) > 0 and row["lr"] for row in rows)
