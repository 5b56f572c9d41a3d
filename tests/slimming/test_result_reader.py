"""A broken or foreign file is refused by what is wrong in it."""

import copy
import json

import pytest
from helpers.searches import held_out, make_supernet
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_autoslim import SearchResult, search
from timm_autoslim.errors import ArtifactError

BUDGETS = ["macs<=60%", "params<=50% and macs<=40%"]


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    supernet = make_supernet()
    path = tmp_path_factory.mktemp("result") / "searched.json"
    search(supernet, BUDGETS, held_out(supernet)).save(path)
    return json.loads(path.read_text())


def change(content, path, value):
    """Return a copy with another value at a path; `...` takes the part out."""
    content = copy.deepcopy(content)
    *above, last = path
    parent = content
    for key in above:
        parent = parent[key]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 2, r"\.format: got 2; needed: format 1, of a file that SearchResult\.save wrote"),
        (["format"], ..., r"\.format: got None; needed: format 1"),
        (["networks"], [], r"\.networks: got \[\]; needed: at least one network"),
        (["networks"], {}, r"\.networks: got \{\}; needed: a list"),
        (["networks", 0, "loss"], "low", r"\.networks\[0\]\.loss: got 'low'; needed: a finite number"),
        (["networks", 0, "loss"], ..., r"\.networks\[0\]: got no 'loss'; needed: the keys"),
        (["networks", 1, "cost", "macs"], 1.5, r"\.networks\[1\]\.cost\.macs: got 1\.5; needed: an integer"),
        (["networks", 0, "cost", "joules"], 5, r"\.cost: got an unknown 'joules'"),
        (["networks", 0, "widths", "a"], 17, r"\.widths: a: got the width 17; needed: an integer from 1 to 16"),
        (["networks", 0, "widths", "a"], ..., r"\.widths: got no 'a'"),
        (["networks", 0, "widths", "z"], 1, r"\.widths: got an unknown 'z'"),
        (["networks", 0, "limits"], {}, r"\.limits: got \{\}; needed: limits in metrics of the cost"),
        (["networks", 0, "limits"], {"macs": 0}, r"\.limits\.macs: got 0; needed: a finite number above 0"),
        (["networks", 0, "limits"], {"latency_ms": 5}, r"\.limits: got .*; needed: limits in metrics of the cost"),
        (["networks", 0, "metric"], "params", r"\.metric: got 'params'; needed: one of \['macs'\]"),
        (["networks", 0, "macs_by_module", "a"], None, r"\.macs_by_module\.a: got None; needed: an integer"),
        (["groups"], [], r"\.groups: got \[\]; needed: at least one group"),
        (["groups", 0, "size"], 0, r"\.groups\[0\]\.size: got 0; needed: an integer from 1 on"),
        (["groups", 1, "name"], "a", r"\.groups: got .*; needed: at least one group, each with another name"),
        (["groups", 0, "choices"], [2, "4"], r"\.choices\[1\]: got '4'; needed: an integer"),
        (["steps", 0, "group"], "z", r"\.steps\[0\]\.group: got 'z'; needed: the name of a group"),
        (["steps", 0, "spent"], {"flops": 5}, r"\.spent: got an unknown 'flops'"),
        (["steps", 0, "metric"], "flops", r"\.metric: got 'flops'; needed: one of"),
        (["settings", "seed"], [1], r"\.settings\.seed: got \[1\]; needed: a text, a number"),
        (["settings"], [], r"\.settings: got \[\]; needed: an object"),
        (["base"], 5, r"\.base: got 5; needed: a text"),
        (["seconds"], "long", r"\.seconds: got 'long'; needed: a finite number"),
        (["widest"], {"macs": 5}, r"\.widest: got no 'params'"),
        (["evaluations"], -1, r"\.evaluations: got -1; needed: an integer from 0 on"),
        (["method"], None, r"\.method: got None; needed: a text"),
        (["note"], "mine", r"got an unknown 'note'"),
    ],
)
def test_a_broken_file_is_refused_by_what_is_wrong(content, tmp_path, path, value, message):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(change(content, path, value)))
    with pytest.raises(ArtifactError, match=r"x\.json.*" + message):
        SearchResult.load(file)


def parts(value, path=()):
    """Return the paths of all parts of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, part in items for p in ((*path, key), *parts(part, (*path, key)))]


junk = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_stands_in_a_file_it_is_loaded_whole_or_refused(content, tmp_path_factory, data):
    place = data.draw(st.sampled_from(parts(content)))
    file = tmp_path_factory.getbasetemp() / "junk.json"
    file.write_text(json.dumps(change(content, place, data.draw(st.one_of(st.just(...), junk)))))
    try:
        loaded = SearchResult.load(file)
    except ArtifactError:
        return
    loaded.save(file)
    assert SearchResult.load(file) == loaded


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "null", '{"networks": [1]}', "\x00"])
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=r"x\.json.*needed: (an object|.*SearchResult\.save wrote)"):
        SearchResult.load(file)
