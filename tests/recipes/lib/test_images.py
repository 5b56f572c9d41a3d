"""Where the images come from, and what is refused."""

import argparse
import tarfile
import warnings

import pytest
from PIL import Image
from timm.data import create_dataset

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.images import (
    UNLABELLED,
    Digits,
    Images,
    Joined,
    Subset,
    hash_images,
    open_images,
    open_unlabelled,
)


def make_images(folder, classes, count=4):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(folder / name / f"{index}.png")


def make_args(**changes):
    args = {"dataset": None, "data_dir": None, "in_chans": 3, "num_classes": None, "workers": 0, "seed": 0,
            "train_split": None, "val_split": None}  # fmt: skip
    return argparse.Namespace(**args | changes)


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


# -- images that cannot be read ---------------------------------------------------------------------------------------


def test_another_image_of_the_subset_stands_in_for_one_that_cannot_be_read(tmp_path, caplog):
    for name in ("train", "val"):
        make_images(tmp_path / name, ["cat", "dog"])
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"no image")
    source = open_images(make_args(data_dir=str(tmp_path))).train
    subset = Subset(source, 2, [0, 1, 5])
    with pytest.warns(UserWarning, match=r"cat.1\.png cannot be read \(cannot identify .*\); the next image stands"):
        image, target = subset[1]
    assert "Skipped sample" not in caplog.text
    assert (image.getpixel((0, 0)), target) == ((20, 0, 0), 1)  # 5, and not 2 of another subset
    assert subset[0][1] == 0


def test_many_images_in_a_row_that_cannot_be_read_are_told(tmp_path):
    for name in ("train", "val"):
        make_images(tmp_path / name, ["cat", "dog"], count=12)
    for path in (tmp_path / "train" / "cat").iterdir():
        path.write_bytes(b"no image")
    source = open_images(make_args(data_dir=str(tmp_path))).train
    message = r"10 images in a row cannot be read. The first: .*cat.0\.png cannot be read.* Mend the data"
    for subset in (Subset(source, 2), Subset(source, 2, [0])):
        with pytest.raises(DataError, match=message), warnings.catch_warnings(action="ignore"):
            subset[0]
    assert Subset(source, 2)[12][1] == 1
    with pytest.raises(DataError, match=r"The first: image 0 cannot be read \(boom\)"):
        Subset(Broken(), 2)[0]


class Broken:
    def __len__(self):
        return 20

    def __getitem__(self, index):
        raise SyntaxError("boom")  # as PIL does on some damaged files


def test_the_hash_of_images_knows_names_classes_sizes_and_numbers(tmp_path):
    def write(*files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, side in files:
            path = folder / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side)).save(path)
        source = create_dataset("", root=str(folder / "train"))
        return hash_images(Subset(source, 2), Subset(source, 2))

    same = [("a/1.png", 8), ("b/1.png", 8)]
    assert write(*same) == write(*same)  # wherever they lie
    others = [[("a/1.png", 8), ("b/2.png", 8)], [("a/1.png", 8), ("c/1.png", 8)], [("a/1.png", 99), ("b/1.png", 8)],
              [*same, ("b/2.png", 8)]]  # fmt: skip
    assert len({write(*same), *(write(*files) for files in others)}) == 5
    digits = Images(Digits(True, "L"), Digits(False, "L"), 10)
    assert hash_images(digits.train, digits.test) == hash_images(digits.train, digits.test)


# -- images without labels ---------------------------------------------------------------------------------------------


def test_images_without_labels_lie_at_any_depth_and_come_behind_the_others(tmp_path):
    make_images(tmp_path / "train", ["cat", "dog"])
    make_images(tmp_path / "val", ["cat", "dog"])
    make_images(tmp_path / "more", ["deep"])
    source = open_images(make_args(data_dir=str(tmp_path))).train
    others = open_unlabelled(make_args(unlabelled=str(tmp_path / "more")))
    joined = Joined(source, others)
    assert len(joined) == len(source) + len(others)
    subset = Subset(joined, 2)
    assert [subset[index][1] for index in range(len(subset))][len(source) :] == [UNLABELLED] * len(others)
    assert joined.filename(len(source)) == others.filenames()[0]
    assert open_unlabelled(make_args(unlabelled=None)) is None


@pytest.mark.parametrize(("name", "text"), [("nowhere", "got no such folder"), ("empty", "got no images")])
def test_a_folder_without_images_is_refused(name, text, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=text):
        open_unlabelled(make_args(unlabelled=str(tmp_path / name)))
