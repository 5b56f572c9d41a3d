"""The models that benchmarks run on."""

import pytest
import timm
import torch

from timm_autoslim.recipes.benchmarks.lib.models import export_half


@pytest.mark.slow
def test_an_exported_half_is_kept(tmp_path):
    base = export_half("test_vit", tmp_path / "half")
    first = (tmp_path / "half" / "model.safetensors").read_bytes()
    again = export_half("test_vit", tmp_path / "half")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "half" / "model.safetensors").read_bytes() == first
    half = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True)
    assert half.pos_embed.shape[-1] == base.pos_embed.shape[-1] // 2
