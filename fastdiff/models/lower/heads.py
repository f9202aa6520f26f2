"""The parts that transformers share: norms of tokens and of heads, rotations, feed-forward layers, modulations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models.lower.layers import PackedLinear, Packer
from fastdiff.models.lower.lowered import require
from fastdiff.models.lower.unet_blocks import as_float

Tensor = torch.Tensor
_NORMS = {"LayerNorm": "layer", "FP32LayerNorm": "layer", "RMSNorm": "rms"}
# halves of a pair: the value, then its gate
_FEEDS = {"GELU": "gelu", "GEGLU": "geglu", "SwiGLU": "swiglu", "LinearActivation": "silu"}


@dataclass(frozen=True)
class TokenNorm:
    """Norm of every token, modulated."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(
        self, x: Tensor, into: PackedLinear, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """In the stream, or as codes and their scales where the product that follows wants codes."""
        if into.scale is not None:
            return ops.norm_modulate_int8(x, self.kind, self.weight, self.bias, self.eps, shift, scale)
        return self.modulate(x, shift, scale, into.stream), None

    def modulate(self, x: Tensor, shift: Tensor | None, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """`[B, N, C]` tokens in `out_dtype`."""
        return ops.norm_modulate(x, self.kind, self.weight, self.bias, self.eps, shift, scale, out_dtype)

    def plain(self, x: Tensor) -> Tensor:
        """In the dtype of `[B, N, C]` tokens."""
        return self.modulate(x, None, None, x.dtype)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines `[N, D]` or `[B, N, D]` by which neighbouring pairs of every head are turned."""

    cos: Tensor
    sin: Tensor

    def __getitem__(self, tokens: slice) -> "Rotation":
        return Rotation(self.cos[..., tokens, :], self.sin[..., tokens, :])


@dataclass(frozen=True)
class HeadNorm:
    """Norm of every head of queries or keys by itself."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, N, H, D]`, tokens evenly spaced, to the same shape and dtype."""
        affine = (self.kind, self.weight, self.bias, self.eps)
        return ops.norm_modulate(x.flatten(0, 1), *affine, None, None, x.dtype).view(x.shape)


def turn(x: Tensor, norm: HeadNorm | None, rotation: Rotation | None) -> Tensor:
    """Norms and rotates heads `[B, N, H, D]`; gives x itself where there is neither."""
    if norm is not None and norm.kind == "layer":
        x, norm = norm(x), None
    if norm is None and rotation is None:
        return x
    cos, sin = (None, None) if rotation is None else (rotation.cos, rotation.sin)
    weight, eps = (None, None) if norm is None else (norm.weight, norm.eps)
    return ops.qk_norm_rope(x, weight, eps, cos, sin, True, x.dtype)


def join(
    streams: tuple[Tensor, Tensor],
    norms: tuple[HeadNorm | None, HeadNorm | None] = (None, None),
    rotation: Rotation | None = None,
) -> Tensor:
    """Norms and rotates the heads of two streams `[B, N, H, D]` and puts one's tokens before the other's."""
    if any(norm is not None and norm.kind == "layer" for norm in norms) or norms[0] is None or norms[1] is None:
        streams = tuple(turn(x, norm, None) for x, norm in zip(streams, norms, strict=True))
        norms = (None, None)
    weights = [norm and norm.weight for norm in norms]
    cos, sin = (None, None) if rotation is None else (rotation.cos, rotation.sin)
    eps = norms[0] and norms[0].eps
    return ops.join_heads(*streams, *weights, eps, cos, sin, streams[0].dtype)


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers around an activation, gated and added to the tokens in float32."""

    first: PackedLinear
    second: PackedLinear
    activation: str

    def __call__(
        self, h: Tensor, h_scale: Tensor | None, gate: Tensor | None, x: Tensor, around: object = None
    ) -> Tensor:
        """Normed tokens or their codes `[B, N, C]`, and the tokens x, to x + gate * feed(h).

        around  what a feed needs that looks at neighbours; this one does not
        """
        h = self.first(h, activation=self.activation, x_scale=h_scale)
        return self.second(h, gate=gate, residual=x, out_dtype=torch.float32)


class Modulations:
    """Shifts, scales and gates of all blocks (adaLN: Peebles and Xie 2023), side by side in rows of the temporal table.

    embed  from the timesteps `[R]` and the conditioning of R rows to the vectors that blocks project
    """

    def __init__(self, embed: Callable[..., Tensor]) -> None:
        self._embed = embed
        self._projects: list[Callable[[Tensor], Tensor]] = []
        self._columns = 0

    def add(self, project: Callable[[Tensor], Tensor], width: int, parts: int) -> "Columns":
        """Adds what `project` makes of the embedding: `[R, parts * width]`."""
        self._projects.append(project)
        columns = Columns(self._columns, width, parts)
        self._columns += parts * width
        return columns

    def add_linear(self, norm: nn.Module, width: int) -> "Columns":
        """Adds the projection of an adaptive norm, which stands behind SiLU."""
        return self.add(lambda emb: norm.linear(F.silu(emb)), width, norm.linear.out_features // width)

    def __call__(self, t: Tensor, *inputs: Tensor) -> Tensor:
        """`[R]` timesteps and the conditioning of R rows to `[R, columns]`."""
        emb = self._embed(t, *inputs)
        return torch.cat([project(emb) for project in self._projects], dim=1)


@dataclass(frozen=True)
class Columns:
    """Where the temporal table holds the modulations of one norm."""

    start: int
    width: int
    parts: int

    def of(self, rows: Tensor) -> list[Tensor]:
        """The parts `[B, width]` of the rows `[B, columns]`."""
        at = lambda i: self.start + i * self.width
        return [rows[:, at(i) : at(i + 1)] for i in range(self.parts)]


def pack_norm(name: str, norm: nn.Module | None) -> TokenNorm | None:
    """Reads a norm of tokens; None for one that does nothing."""
    return None if norm is None or type(norm) is nn.Identity else TokenNorm(*_read_norm(name, norm))


def pack_head_norm(name: str, norm: nn.Module | None, dim: int) -> HeadNorm | None:
    """Reads the norm of heads with `dim` elements; None where there is none."""
    if norm is None:
        return None
    kind, weight, bias, eps = _read_norm(name, norm)
    require(weight is None or weight.shape == (dim,), f"{name} norms several heads at once")
    require(kind == "layer" or bias is None, f"{name} has a bias")
    return HeadNorm(kind, weight, bias, eps)


def _read_norm(name: str, norm: nn.Module) -> tuple[str, Tensor | None, Tensor | None, float]:
    kind = type(norm).__name__
    require(kind in _NORMS, f"{name} is a {kind}")
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return _NORMS[kind], as_float(norm.weight), as_float(getattr(norm, "bias", None)), eps


def pack_feed_forward(packer: Packer, name: str, feed: nn.Module) -> FeedForward:
    """Packs a `FeedForward` of two layers."""
    kind = type(feed.net[0]).__name__
    require(kind in _FEEDS, f"{name} is a {kind}")
    activation = _FEEDS[kind]
    if kind == "GELU" and feed.net[0].approximate == "tanh":
        activation = "gelu_tanh"
    if kind == "LinearActivation":
        require(type(feed.net[0].activation) is nn.SiLU, f"{name} has another activation than SiLU")
    first = packer.linear(f"{name}.net.0.proj", feed.net[0].proj, pairs=kind in ("GEGLU", "SwiGLU"))
    return FeedForward(first, packer.linear(f"{name}.net.2", feed.net[2]), activation)
