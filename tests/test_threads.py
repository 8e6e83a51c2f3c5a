"""Two threads that score at once: what belongs to the process is left as it was, also where one of them raises."""

import os
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

import sapwood
from sapwood import ntk
from sapwood.isolation import isolated

CPU = torch.device("cpu")
BATCH = [(torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4)]


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))


def breaks(net, masks, data, generator):
    torch.rand(3)
    raise ValueError("somebody's method broke")


def state():
    numpy = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        (numpy[1].tolist(), numpy[2]),
        torch.backends.mha.get_fastpath_enabled(),
    )


def together(*actions):
    """Does them in threads that begin at once; returns what they raised."""
    barrier, raised = threading.Barrier(len(actions)), []

    def act(action):
        barrier.wait()
        try:
            action()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=act, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    return raised


def search(method, model):
    return sapwood.prune(model, method=method, sparsity=0.9, batches=BATCH, input_shape=(3, 4, 4))


PAIRS = {
    "two searches": ("iter-snip", "iter-snip"),
    "gradients and none": ("synflow", "iter-snip"),
    "fresh weights": ("ntk-sap", "ntk-sap"),
    "one breaks": (breaks, "iter-snip"),
    "both break": (breaks, breaks),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_two_searches_at_once(pair):
    models = [net(), net()]
    alone = [None if method is breaks else search(method, m).masks for method, m in zip(pair, models, strict=True)]
    torch.backends.mha.set_fastpath_enabled(True)
    for _ in range(4):
        before, found = state(), {}

        def go(i, found=found):
            found[i] = search(pair[i], models[i]).masks

        raised = together(lambda: go(0), lambda: go(1))
        assert state() == before
        assert len(raised) == pair.count(breaks)
        assert all(found[i] == alone[i] for i in found)


def test_a_search_beside_a_kernel():
    model, before = net(), state()
    x = BATCH[0][0][:8]
    assert not together(lambda: search("iter-snip", model), lambda: ntk.kernel(model, x, dropout="off"))
    assert state() == before


def test_a_thread_may_enter_again():
    before = state()
    with isolated(0, CPU), isolated(1, CPU):
        search("snip", net())
    assert state() == before


def test_an_error_inside_lets_the_next_thread_in():
    with pytest.raises(KeyboardInterrupt), isolated(0, CPU):
        raise KeyboardInterrupt
    assert not together(lambda: search("snip", net()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_that_was_forked_while_a_thread_was_inside_is_not_locked_out():
    inside, done = threading.Event(), threading.Event()

    def stay():
        with isolated(0, CPU):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait(60)
    if (child := os.fork()) == 0:
        try:
            with isolated(0, CPU):
                os._exit(7)
        finally:
            os._exit(1)
    code = os.waitpid(child, 0)[1]
    done.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(code) == 7
