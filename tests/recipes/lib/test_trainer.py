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


def make_training(folder, *argv, images=8, batch=4):
    args = parse_train(folder, "-b", str(batch), *argv)
    accelerator, model = make_accelerator(args), torch.nn.Linear(3, 10)
    loader = DataLoader(TensorDataset(torch.randn(images, 3), torch.arange(images)), batch)
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


def test_gradients_that_are_accumulated_are_those_of_all_images_together(tmp_path):
    weights = []
    for batch, flags in ((8, ()), (4, ("--grad-accum-steps", "2"))):
        torch.manual_seed(0)
        folder = tmp_path / str(batch)
        folder.mkdir()
        training = make_training(folder, *flags, batch=batch)
        Trainer(training, learn).fit()
        assert training.updates == 1
        weights.append(training.model.weight)
    torch.testing.assert_close(*weights)


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
