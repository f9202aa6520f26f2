"""What requests must share to run in the same calls of the network."""

from dataclasses import dataclass

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from fastdiff.arguments import Arguments


@dataclass(frozen=True)
class Kind:
    """Requests of equal kinds run together.

    shapes        of the tensors of the state, without the batch
    structure     of the state's pytree
    dtype         of the state
    endpoint      whether there is a known endpoint
    conditioning  per name and leaf: shape without the batch and dtype of a tensor, kind and value of anything else
    """

    shapes: tuple[tuple[int, ...], ...]
    structure: TreeSpec
    dtype: torch.dtype
    endpoint: bool
    conditioning: tuple

    @classmethod
    def of(cls, arguments: Arguments) -> "Kind":
        """The kind of a request."""
        start, options, given = arguments.start, arguments.options, arguments.conditioning
        values = sorted((given.tensors | given.others).items())
        shapes = tuple(shape[1:] for shape in start.shapes)
        named = tuple((name, *_described(value)) for name, value in values)
        return cls(shapes, start.structure, options.dtype, options.aux is not None, named)


def _described(value: object) -> tuple[TreeSpec, list]:
    leaves, structure = tree_flatten(value)
    return structure, [
        (leaf.shape[1:], leaf.dtype) if torch.is_tensor(leaf) else (type(leaf), leaf) for leaf in leaves
    ]
