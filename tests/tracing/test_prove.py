"""The proof: subnets run beside the record, and what disagrees is fixed with a reason, or refused."""

import torch
from helpers.bodies import conv, convert_around
from torch import nn

from timm_autoslim.tracing import ops


def forgetful(flow, op):
    flow.set_labels(op.out, [None] * op.out.dim())


def test_a_wrong_rule_is_found_where_an_operator_fails(monkeypatch):
    monkeypatch.setattr(ops, "RULES", {**ops.RULES, "cat": forgetful})
    supernet = convert_around(lambda s, x: s.b(s.a(torch.cat([x, x], 1)).relu()), 8, a=conv(16, 8), b=conv(8, 8))
    assert supernet.repairs[0].startswith("a: in a subnet, aten.convolution.default fails")
    assert "stem" not in supernet.space.names
    assert "b" in supernet.space.names


def test_a_wrong_rule_is_found_where_a_module_gives_another_shape(monkeypatch):
    monkeypatch.setattr(ops, "RULES", {**ops.RULES, "relu": forgetful})
    supernet = convert_around(lambda s, x: s.act(s.a(x)), 8, a=conv(8, 8), act=nn.ReLU())
    assert supernet.repairs == ("act: in a subnet, an output has the shape (2, 4, 8, 8) instead of (2, 8, 8, 8)",)
    assert supernet.graph.fixed["a.weight", 0] == supernet.repairs[0]
    assert supernet.space["stem"].size == 8
