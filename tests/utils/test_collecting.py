"""Garbage collection waits while many objects are made, and goes on afterwards."""

import gc
import threading

import pytest

from timm_autoslim.utils.collecting import pause_collection


def test_collection_goes_on_after_an_error():
    states = []

    @pause_collection()
    def fail():
        states.append(gc.isenabled())
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert states == [False]
    assert gc.isenabled()


def test_who_has_switched_it_off_keeps_it_off():
    gc.disable()
    try:
        with pause_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_blocks_of_two_threads_that_overlap_leave_it_on():
    inside, over = threading.Event(), threading.Event()

    def pause():
        with pause_collection():
            inside.set()
            over.wait(10)

    thread = threading.Thread(target=pause)
    with pause_collection():
        thread.start()
        inside.wait(10)
    assert not gc.isenabled()  # for the other thread
    over.set()
    thread.join()
    assert gc.isenabled()
