"""Networks for tests of the engine: one whose bits cannot depend on the batch, and one whose calls wait."""

import threading

import torch

from fastdiff import Sampler, VPLinear

SHAPE = (2, 3, 5)  # of a sample; odd on purpose
SECONDS = 20  # no result takes longer, unless something hangs


def elementwise_net(x, t, shift=None, gain=0.1):
    """A denoiser of elementwise operations: its bits cannot depend on the batch."""
    if isinstance(x, dict):
        return {name: elementwise_net(leaf, t, shift, gain) for name, leaf in x.items()}
    column = lambda v: v.view(-1, *[1] * (x.dim() - 1))
    out = torch.tanh(x * 0.3) * (1.0 + column(t) / 2000.0)
    return out if shift is None else out + gain * column(shift).to(x.dtype)


def sampler_of(net=elementwise_net, **options):
    return Sampler(net, prediction="v", process=VPLinear(), **options)


class Gate:
    """A network whose calls wait for permission, from the call on that `close` names; remembers the rows of its calls."""

    def __init__(self, close=0, net=elementwise_net):
        self.net, self.close, self.rows = net, close, []
        self.reached, self.permitted = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, x, t, **cond):
        self.rows.append(len(t))
        if len(self.rows) > self.close:
            self.reached.release()
            assert self.permitted.acquire(timeout=SECONDS)
        return self.net(x, t, **cond)

    def wait(self):
        """Until the next call waits, its step not yet taken."""
        assert self.reached.acquire(timeout=SECONDS)

    def open(self):
        self.close = 10**9
        self.permitted.release(1000)

    def let(self, calls):
        """Lets this many calls pass, and waits until the one after them waits."""
        for _ in range(calls):
            self.permitted.release()
            self.wait()


def same(got, expected):
    leaves = lambda state: list(state.values()) if isinstance(state, dict) else [state]
    return all(torch.equal(a, b) for a, b in zip(leaves(got), leaves(expected), strict=True))
