"""Fashion-MNIST as tensors, read from the idx files that the Debian package dataset-fashion-mnist installs."""

import gzip
import struct
from pathlib import Path

import torch

Tensor = torch.Tensor
DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {"train": "train", "test": "t10k"}


def load_split(split: str, folder: Path = DEFAULT_FOLDER) -> tuple[Tensor, Tensor]:
    """Return images and labels of the split `train` or `test`.

    images  `[B, 1, 32, 32]` uint8, padded with zeros from 28 x 28
    labels  `[B]` int64
    """
    images = _read_idx(folder / f"{SPLITS[split]}-images-idx3-ubyte.gz", rank=3)
    labels = _read_idx(folder / f"{SPLITS[split]}-labels-idx1-ubyte.gz", rank=1)
    return torch.nn.functional.pad(images[:, None], (2, 2, 2, 2)), labels.long()


def to_unit_range(images: Tensor) -> Tensor:
    """Map 0..255 to [-1, 1], float32."""
    return images.float() / 127.5 - 1


def _read_idx(path: Path, rank: int) -> Tensor:
    if not path.is_file():
        raise ValueError(f"fashion_mnist: no file {path}; install dataset-fashion-mnist or pass --data")
    raw = gzip.decompress(path.read_bytes())
    magic, *shape = struct.unpack(f">{rank + 1}I", raw[: 4 * (rank + 1)])
    if magic != 0x0800 + rank:
        raise ValueError(f"fashion_mnist: {path} is not an idx file of rank {rank}")
    return torch.frombuffer(bytearray(raw[4 * (rank + 1) :]), dtype=torch.uint8).reshape(shape)
