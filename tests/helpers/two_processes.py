"""Run train.py several times and note what this process does; test_two_processes.py starts it in two processes.

accelerate launch --multi_gpu --num_processes 2 two_processes.py NOTES RUN ARGUMENTS -- RUN ARGUMENTS -- ...
"""

import itertools
import sys

import torch
from accelerate import Accelerator, PartialState
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from tqdm import tqdm

from timm_autoslim.recipes import train
from timm_autoslim.recipes.lib import trainer, validation
from timm_autoslim.recipes.lib.sandwich import Sandwich


def watch_train(argv):
    """Run train.py; return the gradients that the optimizer got, exchanges by batch, and the random widths."""
    gradients, exchanges, widths, hidden = [], [], [], []
    original, reduced = Sandwich.__call__, []

    def exchange(state, bucket):  # what the wrapper does with its gradients, counted
        reduced.append(bucket.index())
        return allreduce_hook(state, bucket)

    def count(self, network, inputs, targets, update, backward):
        if isinstance(network, DistributedDataParallel) and not widths:
            network.register_comm_hook(None, exchange)
        losses = original(self, network, inputs, targets, update, backward)
        exchanges.append(len(reduced))
        reduced.clear()
        widths.append([subnet.to_dict() for subnet in self.sample_widths(update)])
        return losses

    def note(optimizer, *_):
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        gradients.append(torch.cat(grads).clone())

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            hidden.append(bool(kwargs["disable"]))
            super().__init__(*args, **kwargs)

    hook = register_optimizer_step_pre_hook(note)
    Sandwich.__call__, trainer.tqdm, validation.tqdm = count, Bar, Bar
    try:
        train.main(argv)
    finally:
        Sandwich.__call__, trainer.tqdm, validation.tqdm = original, tqdm, tqdm
        hook.remove()
    return {"gradients": gradients, "exchanges": exchanges, "widths": widths, "hidden": hidden}


def main(notes, *argv):
    runs = {}
    Accelerator.end_training = Accelerator.wait_for_everyone  # which would part the processes after the first run
    for split, part in itertools.groupby(argv, lambda text: text == "--"):
        if not split:
            name, *arguments = part
            runs[name] = watch_train(arguments)
    state = PartialState()
    torch.save({"processes": state.num_processes, "runs": runs}, f"{notes}/{state.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
