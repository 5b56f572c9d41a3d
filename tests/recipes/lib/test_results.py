"""What fine-tuned networks are worth lies in their exported folders."""

import torch
from helpers.models import TwoGroups

from timm_autoslim import Accuracy, baseline, convert
from timm_autoslim.recipes.lib.results import write_result


def test_each_network_has_a_file_that_the_library_reads(tmp_path):
    supernet = convert(TwoGroups(), torch.zeros(1, 3, 8, 8))
    network = baseline(supernet, ["macs<=50%"], lambda subnet: 0.0, "uniform").networks[0]
    for name, top1 in (("first", 50.0), ("second", 60.0)):
        (tmp_path / "exported" / name).mkdir(parents=True)
        write_result(tmp_path / "exported" / name, network, {"top1": top1, "loss": 1.0})
    widths, spent = network.widths.to_dict(), network.cost
    assert Accuracy.load_run(tmp_path) == {
        name: Accuracy("uniform", "macs<=50%", spent.macs, spent.params, top1, widths)
        for name, top1 in (("first", 50.0), ("second", 60.0))
    }
