"""Names in the code of functions, and which functions they reach."""

from timm_autoslim.utils.codes import list_names, reach_names


def test_names_are_those_of_inner_functions_too():
    def outer():
        return [len(str(member)) for member in sorted(())]

    assert {"len", "str", "sorted"} <= set(list_names(outer.__code__))


def test_functions_are_reached_by_the_names_that_others_mention():
    functions = {"forward": ["a", "unknown"], "a": ["b", "forward"], "b": [], "other": ["a"]}
    assert reach_names(["forward"], functions, functions.__getitem__) == ["forward", "a", "b"]
