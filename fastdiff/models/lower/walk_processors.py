"""Attention processors of a module that is walked: norm and rotary embedding of heads in one kernel, attention in another."""

from collections import Counter

import torch
from torch import nn

from fastdiff import ops
from fastdiff.models.lower.walk_choice import servable

Tensor = torch.Tensor


class FusedProcessor:
    """Stands in for a processor of diffusers, in one attention module.

    Whatever it does not serve (a gradient, a compiler, a backend that was chosen, parallelism) is done by the processor in
    whose place it is, and so is what others ask it or tell it.

    stock  that processor
    """

    def __init__(self, stock: object, precision: str) -> None:
        vars(self).update(stock=stock, precision=precision, calls=Counter())

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or "stock" not in vars(self):
            raise AttributeError(name)
        return getattr(self.stock, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.stock, name, value)

    def _reason(self, attn: nn.Module, *tensors: Tensor | None) -> str:
        """Why the stock processor serves a call, or nothing."""
        if (
            getattr(self, "_parallel_config", None) is not None
            or getattr(self, "_attention_backend", None) is not None
        ):
            return "a backend or parallelism was chosen"
        if getattr(attn, "fused_projections", False):
            return "fused projections"
        if not servable(*(t for t in tensors if t is not None)):
            return "a gradient, a compiler or a dtype"
        return ""

    def _serves(self, attn: nn.Module, *tensors: Tensor | None) -> bool:
        reason = self._reason(attn, *tensors)
        self.calls[reason] += 1
        return not reason

    def outcome(self) -> tuple[str, str]:
        """What it ran as, and the reasons for which the stock processor ran."""
        runs = f"attention {self.precision}, norm and rotation fused"
        left = ", ".join(f"{count} of {self.calls.total()} calls: {why}" for why, count in self.calls.items() if why)
        if not self.calls:
            return runs, "not called yet"
        return (runs if self.calls[""] else "torch"), left

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
        """[B, N, H * D] of heads [B, N, H, D]; fewer heads of keys are shared."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return ops.attention(q, k, v, mask, None, scale, self.precision).flatten(2)


class Flux(FusedProcessor):
    """FluxAttnProcessor: one or two streams of tokens, those of the context first."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        x, context = hidden_states, encoder_hidden_states
        if not self._serves(attn, x, context):
            return self.stock(attn, x, context, attention_mask, image_rotary_emb)
        tokens = 0 if attn.added_kv_proj_dim is None else context.shape[1]
        rope = (None, None) if image_rotary_emb is None else image_rotary_emb
        heads = lambda projection, y: projection(y).unflatten(-1, (-1, attn.head_dim))
        own, of_context = _parts(rope, tokens)
        q, k = (_turn(heads(p, x), n, own) for p, n in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)))
        v = heads(attn.to_v, x)
        if tokens:
            first = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k)
            added = [_turn(heads(p, context), n, of_context) for p, n in first] + [heads(attn.add_v_proj, context)]
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(added, (q, k, v), strict=True))
        out = self._attend(q, k, v, _broadcast(attention_mask))
        if context is None:
            return out
        context, x = out[:, : context.shape[1]], out[:, context.shape[1] :]
        return attn.to_out[1](attn.to_out[0](x.contiguous())), attn.to_add_out(context.contiguous())


class Joint(FusedProcessor):
    """JointAttnProcessor2_0: one or two streams of tokens, those of the context last."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        x, context = hidden_states, encoder_hidden_states
        if not self._serves(attn, x, context):
            return self.stock(attn, x, context, attention_mask, *args, **kwargs)
        heads = lambda projection, y: projection(y).unflatten(-1, (attn.heads, -1))
        q, k = (_turn(heads(p, x), n) for p, n in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)))
        v = heads(attn.to_v, x)
        if context is not None:
            last = (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k)
            added = [_turn(heads(p, context), n) for p, n in last] + [heads(attn.add_v_proj, context)]
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), added, strict=True))
        # like diffusers, which takes no mask here
        out = self._attend(q, k, v, None)
        tokens = x.shape[1]
        x = attn.to_out[1](attn.to_out[0](out[:, :tokens].contiguous()))
        if context is None:
            return x
        context = out[:, tokens:].contiguous()
        return x, context if attn.context_pre_only else attn.to_add_out(context)


class CogVideoX(FusedProcessor):
    """CogVideoXAttnProcessor2_0: text and video in one sequence, of which the video is rotated."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        x, text = hidden_states, encoder_hidden_states
        if attention_mask is not None or not self._serves(attn, x, text):
            return self.stock(attn, x, text, attention_mask, image_rotary_emb)
        tokens = text.shape[1]
        x = torch.cat([text, x], dim=1)
        q, k, v = (p(x).unflatten(-1, (attn.heads, -1)) for p in (attn.to_q, attn.to_k, attn.to_v))
        rope = (None, None) if image_rotary_emb is None else _after(tokens, image_rotary_emb)
        q = _turn(q, attn.norm_q, rope)
        k = _turn(k, attn.norm_k, (None, None) if attn.is_cross_attention else rope)
        out = attn.to_out[1](attn.to_out[0](self._attend(q, k, v, None)))
        return out[:, tokens:], out[:, :tokens]


class Lumina2(FusedProcessor):
    """Lumina2AttnProcessor2_0: heads of keys that several queries share, and a mask of keys."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states,
        attention_mask=None,
        image_rotary_emb=None,
        base_sequence_length=None,
    ):
        x, context = hidden_states, encoder_hidden_states
        if base_sequence_length is not None or not self._serves(attn, x, context):
            return self.stock(attn, x, context, attention_mask, image_rotary_emb, base_sequence_length)
        q = attn.to_q(x).unflatten(-1, (attn.heads, -1))
        k, v = (p(context).unflatten(-1, (-1, q.shape[-1])) for p in (attn.to_k, attn.to_v))
        rope = (None, None)
        if image_rotary_emb is not None:
            parts = image_rotary_emb.real, image_rotary_emb.imag
            rope = tuple(part.float().repeat_interleave(2, -1) for part in parts)
        q, k = _turn(q, attn.norm_q, rope), _turn(k, attn.norm_k, rope)
        mask = None if attention_mask is None else attention_mask.bool().view(len(x), 1, 1, -1)
        return attn.to_out[1](attn.to_out[0](self._attend(q, k, v, mask, attn.scale)))


PROCESSORS = {
    "FluxAttnProcessor": Flux,
    "JointAttnProcessor2_0": Joint,
    "CogVideoXAttnProcessor2_0": CogVideoX,
    "Lumina2AttnProcessor2_0": Lumina2,
}


def _turn(x: Tensor, norm: nn.Module | None, rope: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
    """Heads [B, N, H, D] normalized and rotated, pairs being neighbours; norms that are no RMS norms run by themselves."""
    weight, eps = None, None
    if type(norm).__name__ == "RMSNorm" and getattr(norm, "bias", None) is None:
        weight, eps = norm.weight, norm.eps
        eps = torch.finfo(x.dtype).eps if eps is None else eps  # as torch.nn.RMSNorm has it
    elif norm is not None:
        x = norm(x)
    if eps is None and rope[0] is None:
        return x
    return ops.qk_norm_rope(x, weight, eps, *rope, True, x.dtype)


def _parts(rope: tuple, tokens: int) -> tuple[tuple, tuple]:
    """Cosines and sines of the tokens after the first `tokens`, and of those."""
    if rope[0] is None:
        return rope, rope
    return tuple(part[tokens:] for part in rope), tuple(part[:tokens] for part in rope)


def _after(tokens: int, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines that leave the first `tokens` as they are."""
    cos, sin = rope
    still = cos.new_ones(tokens, cos.shape[-1]), sin.new_zeros(tokens, sin.shape[-1])
    return torch.cat([still[0], cos]), torch.cat([still[1], sin])


def _broadcast(mask: Tensor | None) -> Tensor | None:
    """A mask of up to four dimensions, as one of four; of two, as diffusers' dispatcher reads it: [B, M]."""
    if mask is None or mask.dim() == 4:
        return mask
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]
