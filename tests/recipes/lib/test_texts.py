"""Words for numbers."""

from timm_autoslim.recipes.lib.texts import write_count


def test_one_is_singular_and_all_others_are_plural():
    assert [write_count(n, "call") for n in (0, 1, 12)] == ["0 calls", "1 call", "12 calls"]
    assert write_count(3, "process", "processes") == "3 processes"
