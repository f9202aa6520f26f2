"""Attention of a module that is walked."""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastdiff import ops
from fastdiff.models.lower.lowered import require
from fastdiff.models.lower.record import UnsupportedError
from fastdiff.models.lower.walk_choice import Always, Timed, servable, slower_reason


class FusedAttention(TorchFunctionMode):
    """Serves F.scaled_dot_product_attention inside the module, whoever calls it."""

    def __init__(self, precision: str, choose: Callable[[], Always | Timed]) -> None:
        super().__init__()
        self._precision, self._choose = precision, choose
        self._choices: dict[tuple, Always | Timed] = {}
        self._left: dict[tuple, str] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        own = lambda: func(*args, **kwargs)
        query, key = (args + tuple(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
        shapes = tuple(query.shape), tuple(key.shape)
        try:
            ours = self._ours(*args, **kwargs)
        except UnsupportedError as error:
            self._left[shapes] = str(error)
            return own()
        choice = self._choices.setdefault(shapes, self._choose())
        return ours() if choice.is_ours(shapes, ours, own) else own()

    def _ours(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        require(dropout_p == 0.0, "dropout")
        require(query.dim() == 4 and value.shape == key.shape, "not of shape [B, H, N, D]")
        require(enable_gqa or query.shape[-3] == key.shape[-3], "numbers of heads that broadcast")
        require(servable(query, key, value) and query.stride(-1) == 1, "a gradient, a dtype or a stride")
        require(attn_mask is None or not attn_mask.requires_grad, "a gradient of the mask")
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        heads_last = lambda t: t.transpose(1, 2)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = heads_last(query), heads_last(key), heads_last(value)
        return lambda: heads_last(ops.attention(q, k, v, attn_mask, None, scale, self._precision))

    def outcomes(self) -> Iterator[tuple[str, str, str]]:
        name = lambda shapes: f"scaled_dot_product_attention {list(shapes[0])} x {list(shapes[1])}"
        for shapes, choice in self._choices.items():
            slower = slower_reason(choice)
            yield name(shapes), "torch" if slower else f"attention {self._precision}", slower
        for shapes, reason in self._left.items():
            yield name(shapes), "torch", reason
