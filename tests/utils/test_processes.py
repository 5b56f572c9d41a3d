"""Sums over processes."""

import pytest
import torch
from helpers.forks import run_in_processes

from timm_autoslim.errors import DataError
from timm_autoslim.utils.processes import (
    check_every_process,
    choose_pool,
    copy_from_first,
    pool_alone,
    pool_over_processes,
)

CPU = torch.device("cpu")


def test_a_process_alone_adds_nothing():
    pool = choose_pool(True)
    assert pool is choose_pool(False) is pool_alone
    (same,) = pool([torch.ones(2)])
    assert same.dtype == torch.float64
    check_every_process(pool, 0, CPU)
    tensor = torch.ones(2)
    copy_from_first(pool, [tensor])
    assert same.tolist() == tensor.tolist() == [1, 1]


@pytest.mark.forks
def test_processes_add_up_and_agree(tmp_path):
    def work(rank):
        pool = choose_pool(True)
        assert pool is pool_over_processes
        assert choose_pool(False) is pool_alone
        sums = pool([torch.tensor(rank + 1.0), torch.full((2, 3), 10.0 * rank), torch.zeros(0, 2)])
        assert [tuple(value.shape) for value in sums] == [(), (2, 3), (0, 2)]
        own = [torch.full((2, 2), rank + 5).t(), torch.tensor(rank)]
        copy_from_first(pool, own)
        check_every_process(pool, 1, CPU)
        try:
            check_every_process(pool, rank, CPU)
        except DataError as error:
            text = str(error)
        return [sums[0], sums[1], *own, text]

    for count, sums, *own, text in run_in_processes(2, work, tmp_path):
        assert (float(count), sums.unique().tolist()) == (3, [10])
        assert [tensor.unique().tolist() for tensor in own] == [[5], [0]]
        assert text.startswith("batches: got none in 1 of 2 processes; needed:")
