"""Sources of images: one that cannot be read, hashes, images without labels."""

import warnings

import pytest
from helpers.folders import make_args, make_images
from PIL import Image
from timm.data import create_dataset

from timm_autoslim.errors import DataError
from timm_autoslim.recipes.lib.image_sources import UNLABELLED, Digits, Joined, Subset, hash_images
from timm_autoslim.recipes.lib.images import Images, open_images, open_unlabelled


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
    for subset in (Subset(source, 2, range(24)), Subset(source, 2, [0])):
        with pytest.raises(DataError, match=message), warnings.catch_warnings(action="ignore"):
            subset[0]
    assert Subset(source, 2)[12][1] == 1
    with pytest.raises(DataError, match=r"The first: image 0 cannot be read \(boom\)"):
        Subset(Broken(), 2, range(20))[0]


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


def test_an_image_of_a_test_that_cannot_be_read_is_an_error(tmp_path):
    """The next one would be counted twice."""
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    source = create_dataset("", str(tmp_path))
    with pytest.raises(DataError, match=r"0\.png cannot be read .*\. Needed for a test: images that can be read"):
        Subset(source, 2)[0]
    with pytest.warns(UserWarning, match="the next image stands in for it"):
        assert Subset(source, 2, [0, 1])[0][1] == 0
