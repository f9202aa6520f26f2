"""Attention on codes: in a network, and references of its parts (probabilities relative to the row's maximum, smoothed keys,
spared tokens).
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastdiff import ops
from fastdiff.quant.activations import dynamic_codes

Tensor = torch.Tensor


def smooth_keys(k: Tensor) -> Tensor:
    """Keys without their mean over tokens, which softmax does not see; what is left has fewer outliers.

    k  [..., M, D]
    """
    return k - k.mean(-2, keepdim=True)


def probabilities_u8(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax as unsigned codes: p = codes / sums, no calibration needed.

    logits   [..., M] float
    returns  codes 0..255 uint8 of exp(logit - maximum), 255 at the maximum, and [..., 1] float32: 255 times the sum of
             the unrounded exponentials

    Dividing by the sum of the codes would make every row sum to one, but rounds the many small probabilities away from
    the sum as well: 10 dB worse for 4096 logits of deviation 2.
    """
    weights = torch.exp(logits.float() - logits.float().amax(-1, keepdim=True))
    return (weights * 255.0).round().to(torch.uint8), 255.0 * weights.sum(-1, keepdim=True)


def attention_int8(q: Tensor, k: Tensor, v: Tensor, scale: float, spared: int = 0) -> Tensor:
    """Attention with int8 queries and keys (per token), uint8 probabilities and int8 values (per channel).

    q [..., N, D], k and v [..., M, D];  spared  first tokens whose key and value stay in floating point, as a text
    encoder's first token, an outlier in every channel (MixDQ)

    Products of codes are exact integers (int64 in this reference), everything else float32.
    """
    q_codes, q_scale = dynamic_codes(q)
    # spared keys keep their place among the logits, so the mean of the others may not be taken from them alone
    rest = smooth_keys(k) if spared == 0 else k[..., spared:, :]
    k_codes, k_scale = dynamic_codes(rest)
    exact = q_codes.double() @ k_codes.double().transpose(-1, -2)
    logits = (exact.float() * q_scale[..., None] * k_scale[..., None, :]) * scale
    if spared:
        first = (q.float() @ k[..., :spared, :].float().transpose(-1, -2)) * scale
        logits = torch.cat((first, logits), -1)
    codes, sums = probabilities_u8(logits)
    v_codes, v_scale = dynamic_codes(v[..., spared:, :].transpose(-1, -2))
    mixed = codes[..., spared:].double() @ v_codes.double().transpose(-1, -2)
    out = mixed.float() * v_scale[..., None, :]
    if spared:
        out = out + codes[..., :spared].float() @ v[..., :spared, :].float()
    return out / sums


class IntegerAttention(TorchFunctionMode):
    """Computes scaled_dot_product_attention of [B, H, N, D] by ops.attention in int8, as long as it is entered.

    What needs a gradient, dropout, or is called with other shapes stays torch's.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        served = func is F.scaled_dot_product_attention and _attend_int8(*args, **kwargs)
        return served if isinstance(served, Tensor) else func(*args, **kwargs)


class AttentionHandle:
    """Keeps a network's attention on integers while it runs, until `remove`.

    `attention_precision` of the network tells `fastdiff.accelerate`, whose kernels call ops.attention themselves.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net, self._entered = net, []
        net.attention_precision = "int8"
        self._hooks = (
            net.register_forward_pre_hook(self._enter),
            net.register_forward_hook(self._leave, always_call=True),
        )

    def remove(self) -> None:
        """Gives the network its own attention back."""
        for hook in self._hooks:
            hook.remove()
        del self._net.attention_precision

    def _enter(self, *_: object) -> None:
        self._entered.append(IntegerAttention().__enter__())

    def _leave(self, *_: object) -> None:
        self._entered.pop().__exit__(None, None, None)


def _attend_int8(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The result of the op, or None where it does not apply."""
    if (
        dropout_p
        or query.dim() != 4
        or key.shape != value.shape
        or (query.shape[1] != key.shape[1] and not enable_gqa)
    ):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return None
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    return ops.attention(q, k, v, attn_mask, None, scale, "int8").transpose(1, 2)
