"""The benchmark from a trained model: every way makes a network of the share of MACs that was asked for."""

import argparse
import json
import math

import pytest
import timm
import torch
from PIL import Image

from timm_autoslim import reconstruct
from timm_autoslim.recipes.benchmarks.lib.effort import count_effort
from timm_autoslim.recipes.benchmarks.lib.fitting import Pictures, fit
from timm_autoslim.recipes.benchmarks.lib.images import load_digits, measure_top1
from timm_autoslim.recipes.benchmarks.lib.pretrained_tables import draw, make_compute_table, make_table, make_tables
from timm_autoslim.recipes.benchmarks.lib.slim_networks import METHODS, Task, adopt, count_macs
from timm_autoslim.recipes.benchmarks.pretrained import (
    KEYS,
    load_model,
    plan,
    run_job,
    scale,
    split_stages,
)
from timm_autoslim.recipes.benchmarks.train_original import train_original


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, channels=(8, 16, 16, 32), stem_width=8).eval()
    images, targets = load_digits()
    batches = list(zip(images[:64].split(16), targets[:64].split(16), strict=True))
    return Task(model, model, batches, batches, [images for images, _ in batches], targets[:64], (0.5, 0.25), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_way_meets_its_share_and_leaves_the_model_alone(task, name):
    image, before = task.gradients[0][0][:1], {k: v.clone() for k, v in task.model.state_dict().items()}
    whole = count_macs(task.model, image)
    networks = list(METHODS[name](task))
    for share, network in zip(task.shares, networks, strict=True):
        used = count_macs(network.model, image) / (share * whole)
        assert 0.8 < used <= 1 + 1e-9  # so small a model has few widths
        assert (network.supernet is None) == name.startswith("torch-pruning")
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())


@pytest.mark.slow
def test_a_network_of_torch_pruning_is_one_of_our_supernet(task):
    images = task.batches[0]
    for network in METHODS["torch-pruning, taylor, one gradient"](task):
        ours = adopt(task.model, network, images[:2])
        assert count_macs(ours.model, images[:1]) == count_macs(network.model, images[:1])
        with torch.no_grad():
            torch.testing.assert_close(ours.model(images), network.model.eval()(images), rtol=1e-3, atol=1e-3)
        layers = reconstruct(ours.model, ours.supernet, task.batches).layers
        assert any(layer.after < layer.before for layer in layers)


def test_effort_is_counted_in_forwards_of_the_original(task):
    image = task.batches[0][:1]

    def act():
        for _ in range(3):
            outputs = task.model(image.repeat(2, 1, 1, 1))
        return outputs

    outputs, effort = count_effort(act, count_macs(task.model, image))
    assert len(outputs) == 2
    assert (effort + effort).compute == pytest.approx(12)


def test_a_backward_counts_two_forwards():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 4, 1))
    image = torch.randn(1, 8, 6, 6, requires_grad=True)
    _, effort = count_effort(lambda: model(image).sum().backward(), count_macs(model, image))
    assert effort.compute == pytest.approx(3)


def test_training_learns_the_images():
    torch.manual_seed(0)
    images, targets = load_digits()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))

    def loss(network, inputs, labels):
        return torch.nn.functional.cross_entropy(network(inputs), labels)

    seen = fit(
        model, Pictures(images[:600], targets[:600], -1.0), lambda x: x, loss, torch.optim.AdamW,
        epochs=3, batch=64, rate=1e-3, warmup=1, seed=0,
    )  # fmt: skip
    assert seen == 3 * 9 * 64
    assert measure_top1(model, (images[600:1000], targets[600:1000])) > 50


@pytest.mark.parametrize(("epochs", "seen"), [(0.25, 2 * 8), (1.5, 12 * 8)])
def test_a_part_of_an_epoch_has_a_part_of_the_steps(epochs, seen):
    images, targets = load_digits()
    rates, steps = [], torch.optim.SGD.step

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return steps(self, closure)

    def loss(network, inputs, labels):
        return torch.nn.functional.cross_entropy(network(inputs), labels)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    pictures = Pictures(images[:64], targets[:64], -1.0)
    count = fit(model, pictures, lambda x: x, loss, Optimizer, epochs=epochs, batch=8, rate=1.0)
    assert count == seen == 8 * len(rates)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * (1 - 8 / seen))))


def test_training_goes_on_from_the_epoch_that_was_asked_for(tmp_path):
    images, targets = load_digits()
    epochs = []

    def train(last):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
        epochs.clear()

        def stop(epoch, loss):
            epochs.append(epoch)
            if epoch == last:
                raise KeyboardInterrupt

        fit(
            model, Pictures(images[:64], targets[:64], -1.0), lambda x: x,
            lambda network, inputs, labels: torch.nn.functional.cross_entropy(network(inputs), labels),
            torch.optim.AdamW, epochs=20, batch=32, rate=1e-3, on_epoch=stop,
            checkpoint=tmp_path / "state", every=3,
        )  # fmt: skip
        return model

    with pytest.raises(KeyboardInterrupt):
        train(last=8)
    resumed = train(last=None).state_dict()
    assert epochs[0] == 7
    (tmp_path / "state").unlink()
    assert all(torch.equal(value, resumed[key]) for key, value in train(last=None).state_dict().items())


@pytest.mark.slow
def test_an_original_is_trained_and_loaded_again(tmp_path):
    for part in ("train", "test"):
        for label in range(2):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True)
            for index in range(16):
                Image.new("RGB", (16, 16), (250 * label, 10 * index, 0)).save(folder / f"{index}.png")
    options = argparse.Namespace(
        data_dir=tmp_path, output=tmp_path / "out.safetensors", model="resnet10t",
        model_kwargs={"channels": (8, 16, 16, 32), "stem_width": 8}, img_size=32, count=None, epochs=8, batch=8,
        rate=1e-2, seed=0, device="cpu", threads=torch.get_num_threads(),
    )  # fmt: skip
    assert train_original(options) > 90
    options.name, options.num_classes, options.checkpoint = "small", 2, options.output
    red = torch.tensor([250, 80, 0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert load_model(options)(scale(red)).argmax() == 1


def test_pictures_are_cropped_from_a_border_and_flipped_with_their_classes():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    pictures = Pictures(image.repeat(200, 1, 1, 1) + 1, torch.arange(200))
    drawn, targets = pictures.draw(torch.arange(200), torch.Generator().manual_seed(0))
    assert torch.equal(targets, torch.arange(200))
    assert drawn.shape == (200, 1, 4, 4)
    same = (drawn == image + 1).flatten(1).all(1)
    mirrored = (drawn == image.flip(3) + 1).flatten(1).all(1)
    assert 0 < same.sum() + mirrored.sum() < 200
    assert not drawn[0, 0].is_floating_point() or drawn.max() == 16


def test_the_table_has_means_over_the_seeds():
    row = {"method": "searched", "share": 0.5, "start": "cut", "teacher": None, "epochs": 0}
    rows = [row | {"seed": seed, "top1": 50.0 + 2 * seed} for seed in range(2)]
    rows += [row | {"seed": 0, "teacher": "labels", "epochs": 5, "top1": 81.25}, {"method": "x", "error": "none"}]
    rows.append(row | {"start": "reconstructed", "seed": 0, "top1": 60.0})
    table = make_table(rows)
    assert "| 50%, no training | 50%, 5 epochs | 25%, no training | 25%, 5 epochs |" in table
    assert "| searched | cut | labels | 51.0 ± 1.4 | 81.2 |  |  |" in table
    assert "| searched | reconstructed | nothing | 60.0 |  |  |  |" in table


def test_accuracy_stands_beside_all_compute(tmp_path):
    row = {"method": "searched", "share": 0.25, "start": "reconstructed", "seed": 0}
    found = row | {"teacher": None, "epochs": 0, "macs": 0.2496, "params": 785_000, "top1": 73.0}
    trained = row | {"teacher": "original", "epochs": 5, "top1": 79.0}
    rows = [found | {"compute": 70_000.0, "seconds": 240.0}, trained | {"compute": 160_000.0, "seconds": 360.0}]
    rows += [row | {"seed": 1, "top1": row["top1"] + 2} for row in rows]
    rows = [{"model": "lite0"} | row for row in rows]
    table = make_compute_table(rows)
    assert "| 25% | searched | reconstructed | 0 | 25.0% | 0.79M | 70k | 4.0 | 74.0 ± 1.4 | 2 |" in table
    assert "| 25% | searched | reconstructed | 5 | 25.0% | 0.79M | 160k | 6.0 | 80.0 ± 1.4 | 2 |" in table
    other = {"model": "convnext", "method": "torch-pruning", "start": "cut"}
    draw([*rows, *(row | other for row in rows)], tmp_path / "figure.svg")
    drawing = (tmp_path / "figure.svg").read_text()
    assert all(
        text in drawing for text in ("searched, reconstructed", "torch-pruning, cut", "lite0, 25%", "convnext, 50%")
    )


def test_every_model_has_tables_of_its_own():
    row = {"method": "searched", "share": 0.5, "start": "cut", "teacher": None, "epochs": 0, "seed": 0}
    row |= {"macs": 0.5, "params": 1_000_000, "compute": 1000.0, "seconds": 60.0}
    rows = [row | {"model": "lite0", "top1": 70.0}, row | {"model": "convnext", "top1": 80.0}]
    lite0, convnext = make_tables(rows).split("**convnext**")
    assert "**lite0**" in lite0
    assert "| 70.0 |" in lite0
    assert "| 80.0 |" in convnext
    assert "80.0" not in lite0


def test_a_name_says_the_epochs_between_two_stages():
    assert split_stages("searched, short stages") == ("searched", 1)
    assert split_stages("torch-pruning, taylor, stages") == ("torch-pruning, taylor", 5)
    assert split_stages("torch-pruning, taylor") == ("torch-pruning, taylor", 0)


def test_networks_of_modelopt_are_cut_alone():
    options = argparse.Namespace(
        starts=["cut", "reconstructed"], teachers=["original"], all_starts=True, trainings=[(0.5, 5)]
    )
    assert plan("ModelOpt, fastnas", options) == [(0.5, "cut", "original", 5)]
    assert len(plan("torch-pruning, taylor", options)) == 2


def test_a_job_that_fails_is_a_row(tmp_path):
    options = argparse.Namespace(
        results=tmp_path / "rows.jsonl", threads=torch.get_num_threads(), device="cpu", name="a"
    )
    run_job(("searched", 0), options)  # without any data
    (row,) = map(json.loads, options.results.read_text().splitlines())
    assert (row["model"], row["method"], row["seed"]) == ("a", "searched", 0)
    assert "error" in row
    assert not set(KEYS[2:]) & set(row)
