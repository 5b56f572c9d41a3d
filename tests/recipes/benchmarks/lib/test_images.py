"""Images of benchmarks as tensors."""

import torch
from PIL import Image
from torch import nn

from timm_autoslim.recipes.benchmarks.lib.images import load_digits, measure_top1, read_images


def test_digits_are_in_the_models_range():
    images, targets = load_digits()
    assert images.shape == (1797, 3, 32, 32)
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert targets.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_images_come_in_a_random_order_with_their_classes(tmp_path):
    for name, color in (("a", 10), ("b", 20), ("c", 30)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (6, 6), (color,) * 3).save(tmp_path / name / "0.png")
    pixels, targets = read_images(tmp_path)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 3, 6, 6)
    assert pixels[:, 0, 0, 0].tolist() == [(10, 20, 30)[target] for target in targets]
    orders = {tuple(read_images(tmp_path, seed=seed)[1].tolist()) for seed in range(9)}
    assert len(orders) > 1
    assert [part.shape for part in read_images(tmp_path, 2, size=4)] == [(2, 3, 4, 4), (2,)]


def test_top1_is_the_share_of_right_answers_over_all_batches():
    images = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 2, 0, 1])
    model = nn.Identity().train()
    assert measure_top1(model, images, batch=2) == 60.0
    assert not model.training
