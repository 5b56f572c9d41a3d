"""The model card: the user's figures, what model and base cost, and the lines that load it."""

import pytest
import torch
from helpers.exported import slim
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_autoslim.artifact.bases import create_base
from timm_autoslim.artifact.card import check_figures, count_costs, list_channels
from timm_autoslim.artifact.export import export
from timm_autoslim.errors import ArtifactError


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    model = slim("resnet10t")
    return model, export(model, tmp_path_factory.mktemp("resnet") / "out")


def test_the_card_has_figures_and_the_two_lines(tmp_path):
    card = {"MACs": 300_000_000, "top-1 (%)": 71.25, "budget": "300M | strict"}
    text = (export(slim("resnet10t"), tmp_path / "out", card=card) / "README.md").read_text(encoding="utf-8")
    for line in (
        "| MACs | 300,000,000 |",
        "| top-1 (%) | 71.25 |",
        "| budget | 300M \\| strict |",
        "library_name: timm",
        "import timm, timm_autoslim",
        'model = timm.create_model("local-dir:out", pretrained=True)',
    ):
        assert line in text.splitlines()
    assert "`resnet10t`, slimmed" in text
    assert str(tmp_path) not in text


def test_the_card_s_line_is_code_for_any_name(tmp_path, monkeypatch):
    folder = export(slim("test_vit"), tmp_path / 'a "b"')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec((folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], names)
    assert type(names["model"]).__name__ == "VisionTransformer"


def test_the_card_says_what_the_model_and_its_base_cost(resnet):
    model, folder = resnet
    text = (folder / "README.md").read_text(encoding="utf-8")
    params = sum(parameter.numel() for parameter in model.parameters())
    base = create_base("resnet10t")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *model.pretrained_cfg["input_size"][1:]))
    macs = counter.get_total_flops() // 2
    assert "| | MACs | parameters |" in text.splitlines()
    assert f"| this model | {macs:,} | {params:,} |" in text.splitlines()
    assert f"| {sum(parameter.numel() for parameter in base.parameters()):,} |" in text.replace("`resnet10t`", "")
    assert "![Output channels of every layer, and of the base's](widths.png)" in text
    assert (folder / "widths.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_autoslim.artifact.card.importlib.util.find_spec", lambda name: None)
    folder = export(slim("torchvision/squeezenet1_1"), tmp_path / "out")
    assert not (folder / "widths.png").exists()
    assert "widths.png" not in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("card", [{"MACs": [1]}, {1: 2}])
def test_figures_are_flat(card, tmp_path):
    with pytest.raises(ArtifactError, match="needed: a number or text under a text label"):
        export(slim("torchvision/squeezenet1_1"), tmp_path / "out", card=card)


def test_a_forward_that_fails_on_meta_leaves_the_macs_out():
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum())

    assert count_costs(Reads(4, 4), (3, 2, 4)) == {"parameters": 20}


def test_figures_are_text_in_one_line():
    assert check_figures(None) == {}
    assert check_figures({"a": 1234, "b": True, "c": None, "d": "x\n|y"}) == {
        "a": "1,234", "b": "True", "c": "None", "d": "x \\|y"
    }  # fmt: skip
    with pytest.raises(ArtifactError, match="card: got 'x'; needed: a mapping"):
        check_figures("x")


def test_the_figure_shows_the_layers_that_model_and_base_share():
    assert list_channels(nn.Linear(2, 2), nn.Linear(2, 5)) == ((5, 2),)
    assert list_channels(nn.Linear(2, 2), nn.Identity()) == ()


def test_a_model_that_asks_for_autocast_of_its_images_device_has_macs():
    class Cast(nn.Linear):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x)

    assert count_costs(Cast(4, 4), (3, 2, 4)) == {"MACs": 96, "parameters": 20}
