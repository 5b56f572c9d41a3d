"""Where the images come from, and what is refused."""

import tarfile
import warnings

import pytest
from helpers.folders import make_args, make_images

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.images import open_images, open_unlabelled


def test_digits_are_split_once_and_for_all():
    images = open_images(make_args(in_chans=1))
    assert (len(images.train), len(images.test), images.num_classes) == (1437, 360, 10)
    assert not set(images.train.indices) & set(images.test.indices)
    assert images.train[0][0].mode == "L"
    counts = [sum(images.test[i][1] == digit for i in range(360)) for digit in range(10)]
    assert min(counts) >= 34
    assert max(counts) <= 37


def test_folder_and_tar_are_read(tmp_path):
    make_images(tmp_path / "train", ["cat", "dog", "emu"])
    make_images(tmp_path / "unpacked", ["dog", "emu"], count=2)
    with tarfile.open(tmp_path / "test.tar", "w") as tar:
        tar.add(tmp_path / "unpacked", arcname="")
    images = open_images(make_args(data_dir=str(tmp_path)))
    assert (len(images.train), len(images.test), images.num_classes) == (12, 4, 3)
    # numbered by the training classes, though the test images lack the first
    assert {images.test[i][1] for i in range(4)} == {1, 2}


def test_missing_or_empty_data_name_the_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_images(make_args(data_dir=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"holds nothing, but needs train/ or train.tar"):
        open_images(make_args(data_dir=str(tmp_path)))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"train holds no images that timm can read"):
        open_images(make_args(data_dir=str(tmp_path)))
    with tarfile.open(tmp_path / "val.tar", "w"):
        pass
    with pytest.raises(DataError, match="train holds no images that timm can read"):
        open_images(make_args(data_dir=str(tmp_path)))
    make_images(tmp_path / "train", ["cat", "dog"])
    with pytest.raises(DataError, match=r"val.tar holds no images that timm can read"):
        open_images(make_args(data_dir=str(tmp_path)))


def test_classes_that_contradict_are_refused(tmp_path):
    make_images(tmp_path / "train", ["cat", "dog"])
    make_images(tmp_path / "val", ["cat", "yak"])
    with pytest.raises(DataError, match=r"classes that .* does not have: yak"):
        open_images(make_args(data_dir=str(tmp_path)))
    with pytest.raises(DataError, match="--num-classes 1000 contradicts the data, which have 10 classes"):
        open_images(make_args(num_classes=1000))
    with pytest.raises(DataError, match="--dataset digits has its own images"):
        open_images(make_args(dataset="digits", data_dir=str(tmp_path)))
    with pytest.raises(DataError, match="--dataset torch/cifar10 cannot be read"):
        open_images(make_args(dataset="torch/cifar10", data_dir=str(tmp_path)))


def test_one_folder_is_divided_always_alike(tmp_path):
    make_images(tmp_path / "flowers", ["daisy", "rose"], count=10)
    both = [open_images(make_args(data_dir=str(tmp_path / "flowers"))) for _ in range(2)]
    names = [[[part.filename(i) for i in range(len(part))] for part in (images.train, images.test)] for images in both]
    assert names[0] == names[1]
    assert [len(part) for part in names[0]] == [16, 4]
    assert len({*names[0][0], *names[0][1]}) == 20
    image, target = both[0].test[0]
    assert names[0][1][0].startswith(["daisy", "rose"][target])
    assert image.size == (16, 16)
    (tmp_path / "data").mkdir()
    (tmp_path / "flowers").rename(tmp_path / "data" / "train")  # train alone
    assert len(open_images(make_args(data_dir=str(tmp_path / "data"))).test) == 4


def test_test_images_without_training_images_are_no_class_folders(tmp_path):
    make_images(tmp_path / "trian", ["cat", "dog"])
    make_images(tmp_path / "val", ["cat", "dog"])
    with pytest.raises(DataError, match=r"holds trian, val, but needs train/ or train\.tar"):
        open_images(make_args(data_dir=str(tmp_path)))
    assert len(open_images(make_args(data_dir=str(tmp_path), train_split="trian")).train) == 8
    with pytest.raises(DataError, match=r"--val-split tset: .* holds trian, val"):
        open_images(make_args(data_dir=str(tmp_path), train_split="trian", val_split="tset"))


@pytest.mark.parametrize(
    ("folders", "text"),
    [
        (["train", "val"], "val has no images of 2 of 3 classes (cat, fox): the accuracies are of the other 1."),
        (["data"], "The test's fifth has no images of 1 of 3 classes (dog): the accuracies are of the other 2."),
    ],
)
def test_classes_without_test_images_are_told(folders, text, tmp_path, monkeypatch):
    for name in folders:
        make_images(tmp_path / name, ["cat", "dog", "fox"] if name != "val" else ["dog"])
    (tmp_path / folders[-1] / "cat").mkdir(exist_ok=True)  # an empty folder is none
    path = tmp_path if len(folders) > 1 else tmp_path / "data"
    with pytest.warns(UserWarning, match="has no images of") as told:
        open_images(make_args(data_dir=str(path)))
    assert [str(warning.message).removeprefix(f"{tmp_path}/") for warning in told] == [text]
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_images(make_args(data_dir=str(path)))


# -- images without labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"), [("nowhere", "nowhere is no folder that is here"), ("empty", "empty holds no images")]
)
def test_a_folder_without_images_is_refused(name, text, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=text):
        open_unlabelled(make_args(unlabelled=str(tmp_path / name)))
