"""The table of rules: which operators it has, what its rules read, and what happens to all others."""

import re
from inspect import getsource
from operator import attrgetter

import pytest
import torch
import torchvision  # noqa: F401 (it brings its operators)
from helpers.operators import aten, names_of, reasons, run_rule, tensor

from timm_autoslim.tracing import ops

READS = re.compile(r"""op(?:\[|\.get\()"(\w+)"(?:\]|[,)])""")


def find(name):
    """Return an operator by its name in the table; those of torchvision have its name before theirs."""
    return attrgetter(name if "." in name else f"aten.{name}")(torch.ops)


def arguments_of(name):
    """Return the names of the arguments of all overloads of an operator."""
    packet = find(name)
    return {argument for overload in packet.overloads() for argument in names_of(getattr(packet, overload))}


def test_every_name_is_an_operator():
    assert all(find(name).overloads() for name in ops.RULES)


@pytest.mark.parametrize(
    "rule", sorted(set(ops.RULES.values()), key=lambda rule: rule.__name__), ids=lambda r: r.__name__
)
def test_a_rule_reads_arguments_that_its_operators_have(rule):
    operators = [name for name, other in ops.RULES.items() if other is rule]
    source = getsource(rule)
    every = set.union(*map(arguments_of, operators))
    assert set(READS.findall(source)) <= every
    for argument in re.findall(r'op\["(\w+)"\]', source):
        if f'op.get("{argument}"' not in source and f'"{argument}" not in op.arguments' not in source:
            assert all(argument in arguments_of(name) for name in operators)


def test_an_operator_has_one_rule():
    before = dict(ops.RULES)
    with pytest.raises(ValueError, match=r"operator: got 'add' twice; needed: names that differ"):
        ops.RULES.add("add")(lambda flow, op: None)
    assert before == ops.RULES


def test_whether_an_operator_has_a_rule():
    assert ops.has_rule("aten.add.Tensor")
    assert ops.has_rule("aten.add")
    assert not ops.has_rule("aten.rot90.default")
    assert not ops.has_rule("torchvision.add.default")


@pytest.mark.parametrize(
    ("operator", "values", "name"),
    [
        (aten.rot90.default, (tensor(2, 8, 4, 4), 1, [2, 3]), "aten.rot90"),
        (torch.ops.torchvision.roi_align.default, (tensor(1, 8, 4, 4), tensor(3, 5), 1.0, 2, 2, 2, False),
         "torchvision.roi_align"),
    ],
)  # fmt: skip
def test_what_enters_an_unknown_operator_is_frozen_and_nothing_leaves_it(operator, values, name):
    outcome = run_rule(operator, *values)
    assert reasons(outcome) == {f"the operator {name} has no rule"}
    frozen = {atom for vector, _ in outcome["frozen_vectors"] if vector for atom in vector}
    assert {atom for labels in outcome["inputs"] for v in labels if v for atom in v} == frozen
    assert all(label is None for labels in outcome["outputs"] for label in labels)
