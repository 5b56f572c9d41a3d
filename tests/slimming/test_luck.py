"""How many held-out images a search needs."""

import pytest

from timm_autoslim import describe_luck
from timm_autoslim.errors import ConfigError


def test_few_images_are_told_with_what_luck_does_and_how_many_it_takes():
    text = describe_luck(269, 26)
    assert text.startswith("269 held-out images are few. A search takes the best of about 260 subnets")
    assert text.endswith("moves the best by 6.4 points; with 1200 images it is 3.")


def test_enough_images_are_nothing_to_speak_of():
    assert describe_luck(1300, 26) == ""


@pytest.mark.parametrize("numbers", [(0, 3), (10, 0), (1.5, 3)])
def test_numbers_are_checked(numbers):
    with pytest.raises(ConfigError, match="a positive integer"):
        describe_luck(*numbers)
