"""Tiles that were measured: those that come with the package, and those that `python -m fastdiff tune` found on a machine.

A file is {"version": 1, "machine": "sm_90-132", "tiles": {key: [fields of a tile]}}. It only chooses between the tiles that a
kernel's tables offer for a call, so that whatever a file says is valid; without one the tables choose. Nothing is measured here.
"""

import contextlib
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastdiff.kernels.attention_launch import family

VERSION = 1  # raised when kernels change so much that older measurements mean nothing
SHIPPED = Path(__file__).with_name("measured")


class Machine(NamedTuple):
    """arch: whose tables serve a GPU; processors: its multiprocessors; name: of files, architecture and processors."""

    arch: int
    processors: int
    name: str


@functools.cache
def machine_of(index: int) -> Machine:
    """The GPU with this index."""
    properties = torch.cuda.get_device_properties(index)
    capability, processors = (properties.major, properties.minor), properties.multi_processor_count
    return Machine(family(capability), processors, f"sm_{capability[0]}{capability[1]}-{processors}")


def choose(machine: str, key: str, tiles: Sequence[tuple]) -> tuple | None:
    """The tile of `tiles` that was measured to be the fastest for this key, if one was."""
    wanted = entries(machine).get(key)
    return next((tile for tile in tiles if list(tile) == wanted), None)


def own_file(machine: str) -> Path:
    """Where a user's measurements are: in FASTDIFF_TUNED, or else `fastdiff` in the user's cache."""
    folder = os.environ.get("FASTDIFF_TUNED")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder or Path(cache, "fastdiff")) / f"{machine}.json"


@functools.cache
def entries(machine: str) -> dict[str, list]:
    """Keys and tiles of a machine; a user's measurements before those of the package. Read once a process."""
    return {**read(SHIPPED / f"{machine}.json", machine), **read(own_file(machine), machine)}


def read(path: Path, machine: str) -> dict[str, list]:
    """What a file says, and nothing, with a warning, of one that is broken or of another version or machine."""
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or not isinstance(data.get("tiles"), dict):
            raise ValueError("it is no table of tiles")
        if (data.get("version"), data.get("machine")) != (VERSION, machine):
            raise ValueError(
                f"it is of version {data.get('version')} for {data.get('machine')}, not {VERSION} for {machine}"
            )
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"fastdiff: {path} is ignored: {error}; `python -m fastdiff tune` writes it anew", stacklevel=2)
        return {}
    return data["tiles"]


def save(path: Path, machine: str, tiles: dict[str, list]) -> None:
    """Adds tiles to a file, whole or not at all, and forgets what was read before."""
    data = {"version": VERSION, "machine": machine, "tiles": {**read(path, machine), **tiles}}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(data, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    entries.cache_clear()
