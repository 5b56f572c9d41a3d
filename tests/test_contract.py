"""An exported model keeps the contract of a timm model as far as its base does, family by family.

CI takes small members of the families; AUTOSLIM_CONTRACT=all takes one member of every timm class.
"""

import inspect
import os

import pytest
import timm
import torch
from contract import calibrated, facts, maker, scripted
from test_classes import MEMBERS
from zoo import TIMM

import timm_autoslim
from timm_autoslim.bases import create_hollow

ALL = os.environ.get("AUTOSLIM_CONTRACT") == "all"
SMALL = ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_byobnet", "test_nfnet", "test_mambaout"]
SMALL += ["mobilenetv3_small_050", "ese_vovnet19b_slim_dw", "deepseek_vit_412m", "torchvision/squeezenet1_1"]
# features of several stages, names of features that are no modules, encoders, heads with a norm, blocks of two outputs
SMALL += ["efficientvim_m1", "gemma4_vit_167m", "deepseek_vit_412m_enc", "efficientvit_m0", "tnt_s_legacy_patch16_224"]
# further families of the convolutional zoo
SMALL += ["mnasnet_050", "regnetx_002", "seresnet18", "vgg11", "mobilenetv1_100"]
SCRIPTED = ["test_resnet", "test_efficientnet", "test_vit"]


def cases():
    """By name, the side of the images and the arguments."""
    found = {member.name: (member.pixels, dict(member.arguments)) for member in TIMM}
    found |= {name: value for name, value in MEMBERS.items() if not name.startswith("torchvision/")}
    if ALL:
        return found
    found["torchvision/squeezenet1_1"] = (64, {})
    return {name: found[name] for name in SMALL}


CASES = cases()


def exported(name, folder):
    """The maker of a base, that of its slimmed and exported model, and the side of the images."""
    pixels, given = CASES[name]
    sized = "img_size" in inspect.signature(type(create_hollow(name, **given)).__init__).parameters
    args = {"num_classes": 10, **{k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}}
    args |= {"img_size": pixels} if sized else {}
    base = maker(name, **args)
    supernet = timm_autoslim.convert(base(), torch.zeros(1, 3, pixels, pixels), base=name, base_args=args)
    plain = calibrated(supernet.extract(supernet.space.uniform(0.5)))
    timm_autoslim.export(plain, folder)
    return base, maker(f"local-dir:{folder}", pretrained=True), pixels


def raised(fact, value):
    return isinstance(value, str) and fact != "output_fmt"


@pytest.mark.parametrize("name", CASES)
def test_a_slimmed_model_keeps_the_contract_of_its_base(name, tmp_path):
    base, slim, pixels = exported(name, tmp_path / "out")
    expected, got = facts(base, pixels), facts(slim, pixels)
    # where the base raises, as torchvision's models do, or breaks a promise, the slimmed one may do better
    wrong = {
        fact: (value, got[fact])
        for fact, value in expected.items()
        if got[fact] != value and not raised(fact, value) and not (value is False and got[fact] is True)
    }
    assert not wrong, wrong
    kept = [fact for fact, value in got.items() if value is True]
    headless = "reset_classifier" not in dir(base())  # timm's encoders
    assert len(kept) >= (8 if name.startswith("torchvision/") else 5 if headless else 15), got
    params = sum(p.numel() for p in slim().parameters())
    assert params < 0.7 * sum(p.numel() for p in base().parameters())
    if ALL:
        assert scripted(slim, pixels) == scripted(base, pixels)


@pytest.mark.parametrize("name", SCRIPTED if not ALL else [])
def test_scripting_is_kept(name, tmp_path):
    base, slim, pixels = exported(name, tmp_path / "out")
    assert scripted(base, pixels) is True
    assert scripted(slim, pixels) is True


def test_weights_of_another_checkpoint_load(tmp_path):
    _, slim, _ = exported("test_resnet", tmp_path / "out")
    model = slim()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", checkpoint_path=str(tmp_path / "tuned.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
