"""`img_size=` on a model that is loaded from an exported folder: its weights are resized as timm resizes the base's."""

import pytest
import timm
import torch
from helpers.comparisons import same, state
from helpers.exported import load
from helpers.marks import slow_but
from helpers.members import build
from packaging.version import Version
from safetensors.torch import save_file

import timm_autoslim
from timm_autoslim.artifact.export import export
from timm_autoslim.errors import ArtifactError


def at_sizes(name, folder, widths):
    """A model exported at its usual size, and how its base and its folder load at a size of choice."""
    model, args, side = build(name)
    supernet = timm_autoslim.convert(model, torch.zeros(1, 3, side, side), base=name, base_args=args)
    exported = supernet.extract(supernet.space.uniform(widths)).eval()
    for module in exported.modules():
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked.fill_(7)  # as `build` does
    export(exported, folder / "out")
    weights = folder / "base.safetensors"
    save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, weights)
    file = {"file": str(weights), "num_classes": 10, "input_size": (3, side, side), "custom_load": False}

    def base(**changes):
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, **{**args, **changes}).eval()

    return exported, base, lambda **changes: load(folder / "out", **changes), side


@pytest.mark.parametrize("name", slow_but(["test_vit"], ["test_vit", "swin_tiny_patch4_window7_224"]))
def test_another_image_size_is_loaded_as_timm_loads_the_base(name, tmp_path):
    exported, base, reload, side = at_sizes(name, tmp_path, 1.0)
    for size in (2 * side, (side, 2 * side), [side // 2, 2 * side], side // 2):
        expected, got = state(base(img_size=size)), state(reload(img_size=size))
        assert same(expected, got)
        if size != [side // 2, 2 * side] or Version(timm.__version__) >= Version("1.0.31"):
            assert not same(expected, state(exported))  # before, timm left embeddings alone whose number fits
    assert same(state(exported), state(reload(img_size=side)))
    assert same(state(exported), state(reload(img_size=[side, side])))


@pytest.mark.parametrize("name", slow_but(["test_vit"], ["test_vit", "swin_tiny_patch4_window7_224"]))
def test_a_narrow_model_takes_another_image_size(name, tmp_path):
    exported, base, reload, side = at_sizes(name, tmp_path, 0.5)
    wide, exported_state = state(base(img_size=2 * side)), state(exported)
    model = reload(img_size=2 * side, num_classes=7, in_chans=1)
    assert model(torch.randn(2, 1, 2 * side, 2 * side)).shape == (2, 7)
    for key, value in state(reload(img_size=2 * side)).items():
        if value.shape == exported_state[key].shape:
            assert torch.equal(value, exported_state[key])
        else:  # resized, channel by channel: the first channels of what the base has
            expected = wide[key][tuple(map(slice, value.shape))]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    assert same(exported_state, state(reload(img_size=side)))


@pytest.mark.slow
def test_a_size_that_the_base_cannot_take_is_refused(tmp_path):
    _, _, reload, side = at_sizes("cait_xxs24_224", tmp_path, 0.5)
    with pytest.raises(ArtifactError, match=r"(?s)img_size.*size mismatch for pos_embed"):
        reload(img_size=2 * side, num_classes=7)


def test_weights_of_another_size_are_refused_whatever_is_asked(tmp_path):
    exported, _, reload, side = at_sizes("test_vit", tmp_path, 0.5)
    tensors = {key: value.clone() for key, value in exported.state_dict().items()}
    tensors["pos_embed"] = torch.cat([tensors["pos_embed"]] * 2, 1)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ArtifactError, match="'pos_embed': shape"):
        reload(img_size=2 * side)
