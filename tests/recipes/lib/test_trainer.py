"""The loop itself, on a model of one layer; the other tests of the recipes run it through train.py."""

import copy
import dataclasses

import pytest
import torch
from helpers.recipes import parse_train
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.processes import make_accelerator
from timm_autoslim.recipes.lib.resume import find_start
from timm_autoslim.recipes.lib.trainer import Trainer, use_average
from timm_autoslim.recipes.lib.training import prepare


def make_training(folder, *argv, images=8):
    args = parse_train(folder, "-b", "4", *argv)
    accelerator, model = make_accelerator(args), torch.nn.Linear(3, 10)
    loader = DataLoader(TensorDataset(torch.randn(images, 3), torch.arange(images)), 4)
    return prepare(accelerator, args, find_start(accelerator, args, folder, {}), model, model, loader)


def learn(network, inputs, targets, update, backward):
    loss = F.cross_entropy(network(inputs), targets)
    backward(loss)
    return {"loss": loss}


def test_all_that_a_trainer_has_is_there_from_the_start(tmp_path):
    training = make_training(tmp_path)
    trainer = Trainer(training, learn)
    names, before = set(vars(trainer)), copy.deepcopy(training.model.state_dict())
    trainer.fit()
    assert set(vars(trainer)) == names
    assert not torch.equal(training.model.weight, before["weight"])
    assert (trainer.progress.epoch, trainer.progress.total) == (1, training.updates)
    with pytest.raises(dataclasses.FrozenInstanceError):
        training.model = None


def test_without_epochs_nothing_is_trained(tmp_path):
    training = make_training(tmp_path, "--epochs", "0")
    before = copy.deepcopy(training.model.state_dict())
    assert Trainer(training, learn).fit() == {}
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())
    assert training.updates == 0


def test_images_that_do_not_fill_an_update_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"8 training images do not fill one update of 16: lower --batch-size or --grad"
    ):
        make_training(tmp_path, "--grad-accum-steps", "4")


def test_the_average_is_there_for_the_length_of_a_block():
    model = torch.nn.Linear(2, 2)
    ema = ModelEmaV3(model)
    weight = model.weight.clone()
    torch.nn.init.zeros_(ema.module.weight)

    def interrupt():
        with use_average(model, ema):
            assert not model.weight.any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert torch.equal(model.weight, weight)
    with use_average(model, None):
        assert torch.equal(model.weight, weight)
