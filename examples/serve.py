"""Clients that come at any time and want different things, served in one batch by `fastdiff.Engine`."""

import asyncio
import random
import time

import torch

import fastdiff

SOLVERS = ["dpmpp-2m", "unipc-2", "euler-a", "ddim"]
NO_CLASS = 10

model = fastdiff.load("bundled:dit")  # 32 x 32 pictures of ten kinds of clothing
fastdiff.accelerate(model.net, deterministic="batch")  # a picture's bits do not depend on what runs beside it
sampler = fastdiff.Sampler(model.net, prediction=model.prediction)


def wish(choose: random.Random) -> dict:
    """What a client asks for."""
    label = torch.tensor([choose.randrange(NO_CLASS)])
    classes = {"cond": {"class_labels": label}, "negative": {"class_labels": torch.full_like(label, NO_CLASS)}}
    settings = {
        "solver": choose.choice(SOLVERS),
        "steps": choose.randint(6, 12),
        "guidance": choose.choice([1.0, 2.0]),
    }
    return {"shape": (1, 1, 32, 32), "seed": [choose.randrange(2**62)], **classes, **settings}


async def client(engine: fastdiff.Engine, number: int) -> tuple[dict, torch.Tensor | None, float]:
    choose = random.Random(number)
    await asyncio.sleep(choose.uniform(0.0, 0.5))
    asked, start = wish(choose), time.perf_counter()
    request = engine.submit(**asked)
    if number == 3:  # this one does not wait for its picture
        await asyncio.sleep(0.02)
        request.cancel()
    try:
        return asked, await asyncio.wrap_future(request), time.perf_counter() - start
    except asyncio.CancelledError:
        print(f"client {number} left after {request.progress.done} of {request.progress.total} steps")
        return asked, None, time.perf_counter() - start


async def main() -> None:
    with fastdiff.Engine(sampler, max_rows=8) as engine:
        served = await asyncio.gather(*(client(engine, number) for number in range(12)))
        print(engine.report())
    done = [(asked, picture) for asked, picture, _ in served if picture is not None]
    alone = [sampler.sample(**asked) for asked, _ in done]
    equal = sum(torch.equal(picture, its) for (_, picture), its in zip(done, alone, strict=True))
    print(f"{equal} of {len(done)} pictures have the bits of the same request alone")
    print(f"longest wait for a picture: {max(seconds for *_, seconds in served):.2f} s")


asyncio.run(main())
