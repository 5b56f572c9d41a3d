"""--teacher: another model, which normalises images as it was trained."""

import pytest
import torch
from helpers.recipes import parse_train, run_train
from helpers.teachers import save_teacher
from safetensors.torch import load_file

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.teacher import create_teacher


def test_an_outside_teacher_sees_images_normalised_as_its_own(tmp_path):
    images = torch.rand(3, 1, 16, 16)
    args = parse_train(tmp_path, "--teacher", str(tmp_path / "teacher"))
    for mean, std in (((0.5,), (0.5,)), ((0.2,), (0.8,))):
        model = save_teacher(tmp_path / "teacher", mean=mean, std=std)
        teacher = create_teacher(args)
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        with torch.no_grad():
            expected = model((images - mean[0]) / std[0])
            torch.testing.assert_close(teacher((images - 0.5) / 0.5), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_an_outside_teacher_teaches(tmp_path):
    save_teacher(tmp_path / "teacher")
    options = ["--distill-loss", "alpha", "--channels-last"]
    teacher = ["--teacher", f"local-dir:{tmp_path / 'teacher'}"]
    folders = [
        run_train(tmp_path, name, *options, *more)
        for name, more in {"alone": [], "taught": teacher, "both": [*teacher, "--teach-widest", "0.5"]}.items()
    ]
    alone, taught, both = (load_file(folder / "supernet.safetensors") for folder in folders)
    assert taught.keys() == alone.keys()  # the teacher is no part of the supernet
    for first, second in ((alone, taught), (taught, both)):
        assert any(not torch.equal(first[name], second[name]) for name in first)


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    save_teacher(tmp_path / "seven", num_classes=7)
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "seven"), r"has outputs \(7,\), but the data have 10 classes: fine-tune it"),
        (str(tmp_path / "empty"), r"gives no logits of images \(1, 16, 16\): "),
        ("resnet_of_nobody", r"gives no logits of images \(1, 16, 16\): .*resnet_of_nobody"),
        ("test_resnet_nowhere.in1k", r"gives no logits"),
    ):
        args = parse_train(tmp_path, "--teacher", name)
        with pytest.raises(ConfigError, match=message):
            create_teacher(args)
