"""What code can reach by the names in it: places, containers, and which of them it fills as it runs."""

import dis

from torch import nn, tensor

from timm_autoslim.tracing.reachable import MISSING, Binding, Container, Walk

FILLED = {(2, 3): 5}
READ = {(2, 3): 5}
TABLE = tensor(1.0)


def keep(key):
    FILLED[key] = helper(READ[key])


def helper(value):
    global TABLE
    TABLE = value
    return value


class Uses(nn.Module):
    counts: list = []  # noqa: RUF012

    def forward(self, x):
        keep(x)
        return NEW  # noqa: F821


def walk():
    found = Walk()
    found.add_module(Uses())
    found.run()
    return found


def test_code_is_followed_by_names_to_what_it_can_write():
    names = {place.name for place in walk().places.values()}
    assert {"forward", "counts", "keep", "helper", "FILLED", "READ", "TABLE", "NEW"} <= names
    assert any(place.name == "NEW" and place.value is MISSING for place in walk().places.values())


def test_caches_are_what_code_fills_as_it_runs():
    found = walk()
    caches = list(found.list_caches(found.find_written_names()))
    assert [cache.value for cache in caches if isinstance(cache, Container)] == [FILLED, READ]  # of one function
    assert [cache.name for cache in caches if isinstance(cache, Binding)] == ["TABLE"]


def test_a_container_is_emptied_of_what_follows_from_sizes_and_restored():
    values = {"relu": len, 3: "a", "table": (tensor(1.0),)}
    container = Container(values)
    assert container.is_filled()
    assert container.has_size_keys()
    assert not Container({"num_classes": 10}).has_size_keys()
    container.empty()
    assert values == {"relu": len}
    values["other"] = 1
    container.restore()
    assert list(values) == ["relu", 3, "table"]


def test_only_code_that_names_a_tensor_is_read_instruction_by_instruction(monkeypatch):
    found, read, get = walk(), [], dis.get_instructions
    monkeypatch.setattr(dis, "get_instructions", lambda code: read.append(code.co_name) or get(code))
    list(found.list_caches(found.find_written_names()))
    assert "helper" in read
    assert "keep" not in read
