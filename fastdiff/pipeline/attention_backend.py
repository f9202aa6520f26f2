"""fastdiff as a backend of diffusers' attention dispatcher, with the log-sum-exp that its context parallelism merges."""

import functools

import torch
from torch import nn

from fastdiff import ops

Tensor = torch.Tensor
NAME = "fastdiff"
_CHOSEN = "_attention_backend"  # attribute of processors


@functools.cache
def register() -> object:
    """Adds "fastdiff" to the backends of diffusers, and returns the member of its enumeration. Nothing uses it by itself.

    `model.set_attention_backend("fastdiff")` and `with diffusers.attention_backend("fastdiff")` take it from then on.
    """
    from diffusers.models import attention_dispatch as dispatch

    names = dispatch.AttentionBackendName
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    setattr(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[NAME] = member
    checks = [dispatch._check_device, dispatch._check_shape]
    dispatch._AttentionBackendRegistry.register(member, checks, supports_context_parallel=True)(fused_attention)
    return member


def choose(module: nn.Module) -> list[object]:
    """Makes it the backend of a module's attention processors that go through the dispatcher and have no other; returns these."""
    stock = [vars(layer).get("processor") for layer in module.modules()]
    free = [p for p in stock if hasattr(p, _CHOSEN) and getattr(p, _CHOSEN) is None]
    for processor in free:
        setattr(processor, _CHOSEN, register())
    return free


def unchoose(processors: list[object]) -> None:
    """Takes back what `choose` did, except where another backend was chosen since."""
    for processor in processors:
        if vars(processor).get(_CHOSEN) is register():
            delattr(processor, _CHOSEN)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as diffusers' dispatcher calls it, in float32 for float32 inputs and in "bf16" for others.

    query, key, value  [B, N, H, D], with `enable_gqa` fewer heads of key and value
    attn_mask          bool or float: [B, M], [N, M], [B, N, M] or broadcastable to [B, H, N, M]
    lse                [B, N, H] float32, with `return_lse`

    Gradients are torch's. Raises ValueError for dropout, and for a number of heads that needs `enable_gqa`.
    """
    if dropout_p:
        raise ValueError(f"fastdiff attention: dropout of 0 expected, got {dropout_p}; take the backend 'native'")
    if not enable_gqa and query.shape[2] != key.shape[2]:
        raise ValueError(f"fastdiff attention: {query.shape[2]} heads and {key.shape[2]} of keys need enable_gqa=True")
    mask = _four_dimensions(attn_mask, query, key)
    given = query, key, value, mask, dropout_p, is_causal, scale, enable_gqa, return_lse
    if _parallel_config is not None:
        from diffusers.models.attention_dispatch import _templated_context_parallel_attention as parallel

        return parallel(*given, forward_op=_forward, backward_op=_backward, _parallel_config=_parallel_config)
    if return_lse or not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))):
        return _forward(None, *given, _save_ctx=False)
    heads_first = (t.transpose(1, 2) for t in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.transpose(1, 2)


def _forward(
    ctx,
    query,
    key,
    value,
    mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    return_lse=False,
    _save_ctx=True,
    _parallel_config=None,
):
    """The forward that diffusers' parallel attention calls for each part of the keys."""
    if is_causal:
        mask = torch.ones(1, 1, query.shape[1], key.shape[1], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    precision = "f32" if query.dtype == torch.float32 else "bf16"
    # results of collectives have no memory before they are waited for
    waited = (t.wait() if hasattr(t, "wait") else t for t in (query, key, value))
    rows = [t if t.stride(-1) == 1 else t.contiguous() for t in waited]
    if not (_save_ctx or return_lse):
        return ops.attention(*rows, mask, None, scale, precision)
    out, lse = ops.attention_lse(*rows, mask, None, scale, precision)
    lse = lse.transpose(1, 2)
    if _save_ctx:
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mask, ctx.scale = mask, scale
    return (out, lse) if return_lse else out


def _backward(ctx, grad_out, *args, query=None, key=None, value=None, out=None, lse=None, **kwargs):
    """Gradients for one part of the keys; out and lse are those over all keys where they are given (Dao et al. 2022)."""
    given = (query, key, value, out, lse)
    q, k, v, o, total = (s if g is None else g for s, g in zip(ctx.saved_tensors, given, strict=True))
    dtype = q.dtype
    q, k, v, o, grad = (t.float() for t in (q, k, v, o, grad_out))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * ctx.scale
    if ctx.mask is not None:
        scores = scores.masked_fill(~ctx.mask, -torch.inf) if ctx.mask.dtype == torch.bool else scores + ctx.mask
    weights = (scores - total.float().transpose(1, 2)[..., None]).exp()
    grad_v = torch.einsum("bhnm,bnhd->bmhd", weights, grad)
    inner = torch.einsum("bnhd,bmhd->bhnm", grad, v) - (grad * o).sum(-1).transpose(1, 2)[..., None]
    grad_scores = weights * inner * ctx.scale
    grad_q = torch.einsum("bhnm,bmhd->bnhd", grad_scores, k)
    grad_k = torch.einsum("bhnm,bnhd->bmhd", grad_scores, q)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _four_dimensions(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask of keys, of queries and keys, or of both for each sample, broadcastable to [B, H, N, M]."""
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dim() == 3:
        return mask[:, None]
    of_keys = mask.shape == (len(query), key.shape[1])
    return mask[:, None, None] if of_keys else mask[None, None]
