"""FLUX on two processes that share its tokens, against FLUX alone. Prints each process's relative error."""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))
from tiny_pipelines import TINY, one_call

import fastdiff


def work(rank: int, degrees: str, meeting: str) -> None:
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    pipe = TINY["FLUX"].build()
    call = one_call(pipe, TINY["FLUX"], rows=1)
    with torch.no_grad():
        expected = pipe.transformer(**call)[0]
    fastdiff.accelerate(pipe)
    # diffusers takes the number of accelerators as its divisor of ranks
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**{f"{degrees}_degree": 2}))
    with torch.no_grad():
        got = pipe.transformer(**call)[0]
    (part,) = fastdiff.report(pipe).parts["transformer"].calls
    assert part != "fused", "the tokens of other processes must be seen"
    error = (got - expected).abs().max() / expected.abs().max()
    os.write(1, f"{error.item()}\n".encode())  # at once: the other process writes there, too
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (sys.argv[1], f"{folder}/meeting"), nprocs=2)
