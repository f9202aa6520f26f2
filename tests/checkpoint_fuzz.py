"""Mutated checkpoints, and what every one of them must come to: `python tests/checkpoint_fuzz.py 1000000`.

Seeds are the hostile files and sound ones in every quantized format. A third of the mutations change bytes; the
others change the header as JSON, with its length made right again, so that they get past the first checks.
"""

import argparse
import collections
import copy
import json
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from checkpoint_attacks import ATTACKS, packed, quantized_good
from torch import nn

from fastdiff.models.checkpoint import HASHES, load_checkpoint, save_checkpoint
from fastdiff.models.header import DTYPES, CheckpointError
from fastdiff.quant import LowRank, QuantConfig, Rotate, Scheme, TensorSpec, quantize
from fastdiff.quant.layer import qlayers
from fastdiff.quant.state import KEY, from_tensors, to_tensors

TOKEN = TensorSpec("int8", "token", dynamic=True)
SCHEMES = (
    Scheme(TensorSpec("int8"), TOKEN, (Rotate(16),)),
    Scheme(TensorSpec("int8"), TensorSpec("int8", "tensor")),
    Scheme(TensorSpec("int4", "group", 16, range="nested"), TOKEN, (LowRank(2),)),
    Scheme(TensorSpec("uint4", symmetric=False), TensorSpec("uint8", "tensor", symmetric=False)),
    Scheme(TensorSpec("nvfp4")),
    Scheme(TensorSpec("fp8_e4m3")),
)
LONGEST = 1.0  # seconds for one file
LARGEST = 64 << 20  # bytes that the process may grow by: no file of a seed's size needs more
VALUES = (0, 1, -1, 2, 3, 4, 7, 16, 127, 1 << 20, 1 << 31, 1 << 62, 1 << 64, 1.5, True, None, "", "F32", [], {}, [0, 8], "../x")  # fmt: skip
_LONG_STRING = "x" * 5000


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 16), nn.Conv2d(16, 8, 3, padding=1))


@cache
def seeds() -> tuple[bytes, ...]:
    """The hostile files except the largest two, and one sound file per format."""
    hostile = [blob for blob in ATTACKS.values() if len(blob) < 20000]
    sound = [quantized_good()]
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for scheme in SCHEMES:
            net = network()
            made = quantize(net, QuantConfig(Scheme(scheme.weight, None, scheme.transforms)))
            for record in made.layers if scheme.input is not None else ():
                record.scheme = Scheme(record.scheme.weight, scheme.input, record.scheme.transforms)
            for layer in qlayers(net).values() if scheme.static_input else ():
                zero = None if scheme.input.symmetric else torch.tensor([100], dtype=torch.uint8)
                layer.set_input_range(torch.tensor([0.02]), zero, None)
            path = Path(folder) / "seed"
            save_checkpoint(path, *to_tensors(made)[:2])
            sound.append(path.read_bytes())
    return (*hostile, *sound * 4)  # sound ones reach deeper


def mutations(first: int, count: int) -> Iterator[bytes]:
    """Mutated files number first .. first + count - 1: the same ones whenever they are asked for."""
    for number in range(first, first + count):
        draw = random.Random(number)
        blob = draw.choice(seeds())
        change = draw.choice((change_bytes, change_header, change_header))
        for _ in range(draw.randint(1, 3)):
            blob = change(blob, draw)
        yield blob


def change_bytes(blob: bytes, draw: random.Random) -> bytes:
    """One byte set, a piece cut, doubled, or taken from another seed; mostly in the header."""
    made, kind = bytearray(blob), draw.randrange(6)
    if not made:
        return blob
    end = min(len(made), 8 + int.from_bytes(made[:8], "little"))
    at = draw.randrange(end if draw.random() < 0.8 else len(made))
    size = draw.randint(1, 40)
    if kind < 3:
        made[at] = draw.randrange(draw.choice((128, 256)))
    elif kind == 3:
        del made[at : at + size]
    elif kind == 4:
        made[at:at] = made[at : at + size]
    else:
        other = draw.choice(seeds())
        made[at : at + size] = other[at : at + draw.randint(0, 40)]
    return bytes(made)


def change_header(blob: bytes, draw: random.Random) -> bytes:
    """One entry of the header, or of the JSON inside its metadata, changed, removed or doubled."""
    try:
        (length,) = struct.unpack_from("<Q", blob)
        header = json.loads(blob[8 : 8 + length])
        data = blob[8 + length :]
        metadata = header.get("__metadata__", {})
        key = draw.choice([None, None, *metadata])
        if key is None:
            _change_entry(header, draw)
        else:
            inner = json.loads(metadata[key])
            _change_entry(inner, draw)
            metadata[key] = json.dumps(inner)
        if draw.random() < 0.5:
            metadata.pop(HASHES, None)  # so that changed data are looked at
        return packed(header, data)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, struct.error, RecursionError):
        return change_bytes(blob, draw)


def _change_entry(tree: dict | list, draw: random.Random) -> None:
    """Changes one entry somewhere in a tree of JSON values."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = draw.choice(keys)
        if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.15:
            break
        node = node[key]
    kind = draw.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(draw.choice(("0.weight", "l.weight", "a", f"{key}x", _LONG_STRING)))] = copy.deepcopy(node[key])
    elif kind == 2 and isinstance(node[key], int):
        node[key] += draw.choice((-16, -1, 1, 16))
    elif kind == 3 and isinstance(node[key], str):
        node[key] = draw.choice((*DTYPES, "int4", "uint4", "nvfp4", "token", "group", "mse"))
    else:
        node[key] = copy.deepcopy(draw.choice(VALUES))


def outcome(path: Path, blob: bytes) -> str:
    """Reads a file, and runs the layers of one that is accepted; returns what it came to.

    Fails for anything but a CheckpointError of the reader, a ValueError of the settings, or a sound result.
    """
    path.write_bytes(blob)
    try:
        tensors, metadata = load_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        return re.sub(r"\d+", "N", error.reason)[:60]
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(blob)
    if KEY not in metadata:
        return "read"
    with torch.device("meta"):
        net = network()
    try:
        with warnings.catch_warnings(action="ignore"):  # of unknown entries
            from_tensors(net, json.loads(metadata[KEY]), tensors)
    except ValueError as error:
        return f"settings: {type(error).__name__}"
    for layer in qlayers(net).values():
        x = torch.ones(2, 32) if layer.weight.dim() == 2 and layer.in_features == 32 else torch.ones(1, 16, 4, 4)
        assert torch.isfinite(layer(x)).all()
    return "read and run"


def run(count: int, first: int = 0) -> collections.Counter:
    """Outcomes of `count` mutated files. Fails where one takes too long or too much memory."""
    found: collections.Counter = collections.Counter()
    seeds()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        for number, blob in enumerate(mutations(first, count), first):
            start = time.process_time()
            try:
                found[outcome(path, blob)] += 1
            except BaseException:
                print(f"checkpoint_fuzz: file {number}", file=sys.stderr)
                raise
            taken = time.process_time() - start
            assert taken < LONGEST, f"file {number} took {taken:.1f} s"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < LARGEST, f"memory grew by {grown} bytes"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run(100)  # what is loaded once is in memory
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30),) * 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the process
    begin, total = time.process_time(), collections.Counter()
    for first in range(args.first, args.first + args.count, 10000):
        signal.alarm(600)
        total += run(min(10000, args.first + args.count - first), first)
        print(f"{total.total()} files, {time.process_time() - begin:.0f} s of CPU", flush=True)
    for reason, number in total.most_common():
        print(f"{number:9d}  {reason}")


if __name__ == "__main__":
    main()
