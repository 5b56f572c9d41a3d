"""timm's own text of pruned models: it is written where timm alone makes the same model of it."""

import pytest
import torch
from helpers.comparisons import same, state
from helpers.exported import image, slim
from helpers.marks import slow_but

from timm_autoslim.artifact.export import export


@pytest.mark.parametrize("base", slow_but(["resnet10t"], ["resnet10t", "mobilenetv2_035"]))
def test_timm_alone_loads_the_folder_by_the_lines_of_the_card(base, tmp_path, monkeypatch):
    model = slim(base)
    text = (export(model, tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    code = text.split("With timm alone, in this folder:")[1].split("```python\n")[1].split("```")[0]
    assert "autoslim" not in code
    monkeypatch.chdir(tmp_path / "out")
    scope = {}
    exec(code, scope)
    loaded = scope["model"].eval()
    assert type(loaded) is type(model)
    assert same(state(model), state(loaded))
    assert torch.equal(loaded(image(model)), model(image(model)))


def test_what_timms_text_cannot_say_is_not_written(tmp_path):
    model = slim("resnet10t")
    model.num_features = 64  # as after a change that the text knows nothing of
    assert not (export(model, tmp_path / "out") / "pruned.txt").exists()
    assert not (export(slim("resnet10t").half(), tmp_path / "half") / "pruned.txt").exists()
