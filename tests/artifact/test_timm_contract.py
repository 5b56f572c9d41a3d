"""An exported model keeps the contract of a timm model as far as its base does, family by family.

CI takes small members of the families. `AUTOSLIM_CONTRACT=all pytest tests/artifact/test_timm_contract.py` takes a
member of every timm class (helpers/members.py), 111 of them, and compares their scripting too: half an hour on one
core, and 2.3 GB. It is run before a release, and after every change of the artifact and slicing packages.
"""

import inspect
import os

import pytest
import timm
import torch
from helpers.members import MEMBERS
from helpers.timm_contract import calibrated, facts, maker, scripted
from helpers.zoo import TIMM

import timm_autoslim
from timm_autoslim.artifact.bases import create_meta_base

ALL = os.environ.get("AUTOSLIM_CONTRACT") == "all"
SMALL = ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_byobnet", "test_nfnet", "test_mambaout"]
SMALL += ["mobilenetv3_small_050", "ese_vovnet19b_slim_dw", "deepseek_vit_412m"]
# features of several stages, names of features that are no modules, encoders, heads with a norm, blocks of two outputs
SMALL += ["efficientvim_m1", "gemma4_vit_167m", "qwen3_vit_88m_enc", "efficientvit_m0", "tnt_s_legacy_patch16_224"]
# further families of the convolutional zoo
SMALL += ["mnasnet_050", "regnetx_002", "regnety_002", "vgg11", "mobilenetv1_100", "mobilenetv2_050"]
# further ways to attend: pooled, shifted, by channels, by classes, in levels
SMALL += ["beit_base_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "levit_256d"]
SMALL += ["test_coatnet", "swiftformer_xs", "efficientvit_l1"]
# tables of coordinates that set_input_size computes anew
SMALL += ["test_vit_relpos"]
LAYERS = {"layers": [1, 1, 1, 1]}
# members of the zoo that are made smaller here, and torchvision's
SHORT = {
    **dict.fromkeys(("resnet26", "resnext50_32x4d", "resnetblur18", "seresnet18"), LAYERS),
    "densenet121": {"block_config": [3, 3, 2, 2]},
    **{f"torchvision/{name}": {} for name in ("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v2", "resnet18")},
    "torchvision/mnasnet0_5": {},
    "torchvision/googlenet": {"init_weights": False},
}
SCRIPTED = ["test_resnet", "test_efficientnet", "test_vit"]


def cases():
    """By name, the side of the images and the arguments."""
    members = {member.name: (member.pixels, dict(member.arguments)) for member in TIMM}
    members |= {name: value for name, value in MEMBERS.items() if not name.startswith("torchvision/")}
    if ALL:
        return members
    return {name: members[name] for name in SMALL} | {name: (64, args) for name, args in SHORT.items()}


CASES = cases()


def exported(name, folder):
    """The maker of a base, that of its slim and exported model, and the side of the images."""
    pixels, args = CASES[name]
    sized = "img_size" in inspect.signature(type(create_meta_base(name, **args)).__init__).parameters
    base_args = {"num_classes": 10, **{k: list(v) if isinstance(v, tuple) else v for k, v in args.items()}}
    base_args |= {"img_size": pixels} if sized else {}
    base = maker(name, **base_args)
    supernet = timm_autoslim.convert(base(), torch.zeros(1, 3, pixels, pixels), base=name, base_args=base_args)
    model = calibrated(supernet.extract(supernet.space.uniform(0.5)))
    timm_autoslim.export(model, folder)
    return base, maker(f"local-dir:{folder}", pretrained=True), pixels


def raised(fact, value):
    return isinstance(value, str) and fact != "output_fmt"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_slim_model_keeps_the_contract_of_its_base(name, tmp_path):
    base, slim, pixels = exported(name, tmp_path / "out")
    expected, got = facts(base, pixels), facts(slim, pixels)
    # where the base raises, as torchvision's models do, or breaks a promise, the slim one may do better
    wrong = {
        fact: (value, got[fact])
        for fact, value in expected.items()
        if got[fact] != value and not raised(fact, value) and not (value is False and got[fact] is True)
    }
    assert not wrong, wrong
    true = [fact for fact, value in got.items() if value is True]
    headless = "reset_classifier" not in dir(base())  # timm's encoders
    assert len(true) >= (8 if name.startswith("torchvision/") else 5 if headless else 15), got
    params = sum(p.numel() for p in slim().parameters())
    assert params < 0.7 * sum(p.numel() for p in base().parameters())
    if ALL:
        assert scripted(slim, pixels) == scripted(base, pixels)


@pytest.mark.slow
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
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", checkpoint_path=str(tmp_path / "tuned.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
