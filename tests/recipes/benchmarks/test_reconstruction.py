"""The benchmark of reconstruction: models that are trained a little, and its table."""

import argparse

import pytest
import torch

from timm_autoslim.recipes.benchmarks.reconstruction import find_part, make_table, measure, read_scaled


def test_the_table_has_the_means_over_the_seeds():
    row = {"case": "vit", "share": 0.5, "order": "l1", "original": 90.0, "raw": 20.0, "reconstructed": 80.0}
    row["seconds"] = 2.0
    others = [row | {"raw": 40.0, "seconds": 4.0}, row | {"share": 0.25}, row | {"order": "reconstruction"}]
    text = make_table([row, *others])
    assert "| vit | 2 | 90.0 | 50% | l1 | 30.0 | 80.0 | 3 |" in text
    assert "| vit | 1 | 90.0 | 25% | l1 | 20.0 | 80.0 | 2 |" in text
    assert "| vit | 1 | 90.0 | 50% | reconstruction | 20.0 | 80.0 | 2 |" in text


def test_images_of_class_folders_are_read_in_the_models_range(tmp_path):
    from PIL import Image

    for name, color in (("a", 0), ("b", 255)):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (color,) * 3).save(tmp_path / "train" / name / "0.png")
    images, targets = read_scaled(find_part(tmp_path, "train"), 16, 2, seed=0)
    assert images.shape == (2, 3, 16, 16)
    assert [float(image.mean()) for image in images[targets.argsort()]] == [-1.0, 1.0]


@pytest.mark.slow
def test_reconstruction_brings_back_most_of_what_cutting_lost():
    threads = torch.get_num_threads()
    rows = measure("convnext", 0, ["l1", "reconstruction"], argparse.Namespace())
    assert torch.get_num_threads() == threads
    for row in rows:
        assert row["original"] > 85
        assert row["original"] - row["reconstructed"] < 0.5 * (row["original"] - row["raw"])
