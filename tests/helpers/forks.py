"""Run a function in forked processes that talk to each other by torch.distributed.

Autograd must not have threads in the process that forks. On CPUs it has none, until somebody uses torch's DTensor or
fully_shard: tests of these run in a forked process too.
"""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(count, work, folder):
    """Return what `work(rank)` returns in each of `count` forked processes, by way of files in `folder`."""
    mp.start_processes(_run, (count, work, str(folder)), nprocs=count, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _run(rank, count, work, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    assert dist.get_world_size() == count
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
