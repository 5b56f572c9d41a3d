"""Tables of named parts: exact names, in the order in which they were added."""

import pytest

from timm_autoslim.errors import BudgetError, ConfigError
from timm_autoslim.utils.tables import Table


@pytest.fixture
def table():
    table = Table("metric", BudgetError)
    table.add("macs", "multiply_adds")(len)
    table.add("params")(sum)
    return table


def test_a_table_is_a_mapping_in_the_order_of_adding(table):
    assert list(table) == ["macs", "multiply_adds", "params"]
    assert len(table) == 3
    assert "macs" in table
    assert "MACS" not in table
    assert dict(table) == {"macs": len, "multiply_adds": len, "params": sum}


def test_the_decorator_returns_what_it_decorates(table):
    @table.add("peak_bytes")
    def measure(model):
        return model

    assert measure(3) == 3
    assert table["peak_bytes"] is table.pick("peak_bytes") is measure


def test_a_name_that_is_taken_is_refused_and_the_first_stays(table):
    with pytest.raises(ValueError, match=r"^metric: got 'macs' twice; needed: names that differ$"):
        table.add("macs")(max)
    assert table["macs"] is len


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("param", r"metric: got 'param'; needed: one of \['macs', 'multiply_adds', 'params'\]; did you mean 'params'."),
        ("watts", r"metric: got 'watts'; needed: one of \['macs', 'multiply_adds', 'params'\]"),
        (None, r"metric: got None; needed: one of \['macs', 'multiply_adds', 'params'\]"),
        (["macs"], r"metric: got \['macs'\]; needed: one of .*"),
    ],
)
def test_an_unknown_name_is_refused_with_those_there_are(table, name, message):
    with pytest.raises(BudgetError, match=f"^{message}$"):
        table.pick(name)


def test_the_error_is_a_config_error_unless_told_otherwise():
    with pytest.raises(ConfigError, match=r"^runtime: got 'eager'; needed: one of \[\]$"):
        Table("runtime").pick("eager")


def test_a_key_that_is_missing_is_a_key_error_as_in_every_mapping(table):
    with pytest.raises(KeyError):
        table["watts"]
    assert table.get("watts") is None
