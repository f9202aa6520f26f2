"""Sends itself Ctrl-C in the middle of long calls. Prints the median and the longest delay in seconds."""

import os
import signal
import sys
import threading
import time

import torch

from fastdiff.ops import OPS


def main(count: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    index, delays = torch.arange(4), []
    out = OPS["philox_normal"](index, index.int(), index.int(), 50_000_000)  # pages in what the calls below reuse
    for k in range(count):
        sent = []

        def kick(wait=0.03 + 0.002 * k, sent=sent):
            time.sleep(wait)
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        sender = threading.Thread(target=kick)
        try:
            sender.start()
            while True:
                OPS["philox_normal"](index, index.int(), index.int(), 50_000_000)
        except KeyboardInterrupt:
            delays.append(time.monotonic() - sent[0])
        sender.join()
    assert torch.equal(OPS["philox_normal"](index, index.int(), index.int(), 8), out[:, :8]), "unusable afterwards"
    delays.sort()
    print(delays[count // 2], delays[-1])


if __name__ == "__main__":
    main(int(sys.argv[1]))
