"""What a training starts from: local weights, zeroed branches, channels in order of importance."""

import argparse

import pytest
import timm
import torch
from helpers.marks import slow_but
from helpers.recipes import TINY, parse_train, run_train
from safetensors.torch import save_file

from timm_autoslim import CRITERIA
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes import train
from timm_autoslim.recipes.lib.models import create_model, make_supernet
from timm_autoslim.recipes.lib.starting_points import create_starting_model, is_trained, order_channels

MODEL = TINY["model_kwargs"]
PLAIN = {"model": "torchvision/squeezenet1_1", "model_kwargs": {}, "in_chans": 3, "img_size": 64}


def save_model(path, num_classes=10, in_chans=1, wrapped=False):
    torch.manual_seed(7)
    model = timm.create_model("resnet10t", num_classes=num_classes, in_chans=in_chans, **MODEL)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    return state


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_local_checkpoint_is_where_the_training_starts(tmp_path, name):
    state = save_model(tmp_path / name, wrapped=True)
    model = create_starting_model(parse_train(tmp_path, "--initial-checkpoint", str(tmp_path / name)))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "file" not in model.pretrained_cfg


def test_of_other_classes_and_channels_all_but_the_classifier_is_taken(tmp_path):
    state = save_model(tmp_path / "weights.pth", num_classes=7, in_chans=3)
    model = create_starting_model(parse_train(tmp_path, "--initial-checkpoint", str(tmp_path / "weights.pth")))
    stem = next(name for name in state if state[name].dim() == 4)
    for key, value in model.state_dict().items():
        if not key.startswith("fc.") and key != stem:
            assert torch.equal(value, state[key]), key
    torch.testing.assert_close(model.state_dict()[stem], state[stem].sum(dim=1, keepdim=True))
    assert model.num_classes == 10
    assert model.fc.weight.shape == (10, 16)


def test_torchvision_models_start_from_files_too(tmp_path):
    donor = create_model(parse_train(tmp_path, model="torchvision/squeezenet1_1", model_kwargs={}, in_chans=3,
                                    img_size=64, num_classes=5))  # fmt: skip
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    for classes in (5, 10):
        args = parse_train(tmp_path, "--initial-checkpoint", str(tmp_path / "weights.pth"), in_chans=3, img_size=64,
                     model="torchvision/squeezenet1_1", model_kwargs={}, num_classes=classes)  # fmt: skip
        for key, value in create_starting_model(args).state_dict().items():
            if classes == 5 or not key.startswith("classifier."):
                assert torch.equal(value, donor.state_dict()[key]), key


class Code:
    def __reduce__(self):
        return print, ("a pickle ran",)


def test_files_that_do_not_fit_are_refused_and_run_no_code(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": Code()}, path)
    refused = "does not give weights of resnet10t: .*Needed: a file of this model's weights"
    with pytest.raises(ConfigError, match=refused):
        create_starting_model(parse_train(tmp_path, "--initial-checkpoint", str(path)))
    assert "a pickle ran" not in capsys.readouterr().out
    state = save_model(path, num_classes=7)
    del state["layer2.0.conv1.weight"]
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"layer2.0.conv1.weight"):  # not silently left fresh, as the classifier is
        create_starting_model(parse_train(tmp_path, "--initial-checkpoint", str(path)))
    with pytest.raises(ConfigError, match=refused):
        create_starting_model(parse_train(tmp_path, "--initial-checkpoint", str(tmp_path / "nowhere.pth")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10t", "torchvision/resnet18"])
def test_weights_of_another_model_are_told_by_their_names_and_shapes(name, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=10).state_dict(), path)
    kwargs = {} if name == "torchvision/resnet18" else {"channels": [8, 8, 16, 16]}
    args = parse_train(tmp_path, "--initial-checkpoint", str(path), model=name, model_kwargs=kwargs, in_chans=3)
    text = (
        r"it holds the weights of another model: \d+ of \d+ tensors of the model are not in it, such as \S+; \d+ of \d+"
    )
    with pytest.raises(ConfigError, match=text) as raised:
        create_starting_model(args)
    assert "Is --model the right one?" in str(raised.value)
    assert "state_dict" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pretrained", "--initial-checkpoint", "x.pth"), "--pretrained and --initial-checkpoint are two starting"),
        (("--pretrained", "--zero-init-last"), "--zero-init-last would erase trained weights of --pretrained"),
        (("--order", "taylor", "--order-images", "0"), "--order-images 0: needed 1 or more"),
        (("--subnet-sizes", "16", "0"), r"--subnet-sizes \[16, 0\]: needed sides of images"),
    ],
)
def test_flags_that_contradict_are_refused(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        train.check_flags(parse_train(tmp_path, *flags))


def test_branches_may_start_at_zero(tmp_path):
    args = parse_train(tmp_path, "--zero-init-last", model_kwargs={**MODEL, "zero_init_last": False})
    model = create_starting_model(args)
    assert not model.layer1[0].bn2.weight.any()
    assert model.layer1[0].bn1.weight.all()
    with pytest.raises(ConfigError, match="no residual branch of torchvision/squeezenet1_1 ends in a BatchNorm"):
        create_starting_model(parse_train(tmp_path, "--zero-init-last", **PLAIN))


@pytest.mark.parametrize("order", slow_but(["l1", "taylor"], sorted(CRITERIA)))
def test_channels_are_ordered_in_place_and_the_widest_stays_the_same(tmp_path, order):
    torch.manual_seed(0)
    supernet = make_supernet(parse_train(tmp_path)).eval()
    before = {name: value.clone() for name, value in supernet.model.state_dict().items()}
    images, targets = torch.randn(8, 1, 16, 16), torch.arange(8)
    expected = supernet(images)
    order_channels(supernet, order, torch.nn.functional.cross_entropy, [(images, targets)])
    torch.testing.assert_close(supernet(images), expected, atol=1e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in supernet.parameters())
    if order != "bn_scale":  # all alike in a fresh model
        assert any(not torch.equal(value, before[name]) for name, value in supernet.model.state_dict().items())


def read_run(folder, name, *argv, **changes):
    """Run train.py; return the bytes of its supernet."""
    run = run_train(folder, name, *argv, limit_train=96, calibration_images=32, sched="none", **changes)
    return (run / "supernet.safetensors").read_bytes()


@pytest.mark.slow
def test_an_ordered_start_resumes_to_the_same_weights(tmp_path):
    flags = ("--order", "taylor", "--subnet-sizes", "16", "12")
    uninterrupted = read_run(tmp_path, "uninterrupted", *flags, epochs=2)
    read_run(tmp_path, "parts", *flags, epochs=1)
    (tmp_path / "parts" / "supernet.safetensors").unlink()
    assert read_run(tmp_path, "parts", *flags, "--resume", epochs=2) == uninterrupted
    assert read_run(tmp_path, "unordered", epochs=2) != uninterrupted


@pytest.mark.slow
def test_a_start_that_is_gone_is_not_missed_by_a_resumed_run(tmp_path, monkeypatch):
    save_model(tmp_path / "start.pth")
    flags = ("--initial-checkpoint", str(tmp_path / "start.pth"), "--order", "taylor")
    uninterrupted = read_run(tmp_path, "uninterrupted", *flags, epochs=2)
    read_run(tmp_path, "parts", *flags, epochs=1)
    (tmp_path / "parts" / "supernet.safetensors").unlink()
    (tmp_path / "start.pth").unlink()
    monkeypatch.delattr(train, "order_by_images")
    assert read_run(tmp_path, "parts", *flags, "--resume", epochs=2) == uninterrupted


def test_a_checkpoint_of_timm_s_train_script_is_read(tmp_path):
    args = parse_train(tmp_path)
    donor = create_model(args)
    path = tmp_path / "model_best.pth.tar"
    flags = argparse.Namespace(model="resnet10t", lr=0.1, model_kwargs={"a": [1]})
    content = {"epoch": 3, "arch": "resnet10t", "state_dict": donor.state_dict(), "version": 2, "args": flags,
               "metric": 71.5}  # fmt: skip
    torch.save(content, path)
    args = parse_train(tmp_path, "--initial-checkpoint", str(path))
    model = create_starting_model(args)
    assert all(torch.equal(tensor, donor.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert is_trained(args)
