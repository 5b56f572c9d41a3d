"""Run a function in two processes that talk to each other by torch.distributed."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_two_processes(work, folder):
    """Return what `work(rank)` returns in each of two forked processes, by way of files in `folder`."""
    mp.start_processes(_run, (work, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _run(rank, work, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
