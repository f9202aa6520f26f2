"""Attention inside diffusers: our processors in models that are walked, our backend in its dispatcher."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.ops import native

if native.cpu() is None or importlib.util.find_spec("diffusers") is None:
    pytest.skip("needs the compiled kernels and diffusers", allow_module_level=True)

import diffusers
from diffusers.models.attention_dispatch import dispatch_attention_fn
from walked_networks import WALKED, outputs

from fastdiff.pipeline import register_attention_backend


def _error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(
        ((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)
    )


def _processors(net) -> list:
    return [vars(m).get("processor") for m in net.modules()]


# the others import transformers, which takes seconds
QUICK = ["Joint", *(pytest.param(name, marks=pytest.mark.slow) for name in WALKED if name != "Joint")]


@pytest.mark.parametrize("name", QUICK)
def test_processors_of_walked_models_are_fused_and_taken_back(name):
    net, call = WALKED[name]()
    expected, stock = outputs(net, call), _processors(net)
    fastdiff.accelerate(net)
    assert _error(outputs(net, call), expected) < 1e-5
    fused = [layer for layer in fastdiff.report(net).layers if layer.name.endswith(".processor")]
    assert len(fused) >= 2 and all("fused" in layer.runs and not layer.reason for layer in fused)
    fastdiff.undo(net)
    assert _processors(net) == stock and all(map(torch.equal, outputs(net, call), expected))


WIDE = ("timestep", "img_ids", "txt_ids")  # pipelines keep these in float32


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKED)
def test_half_precision_is_no_further_from_the_truth_than_the_stock_processor(name):
    net, call = WALKED[name]()
    truth = outputs(net, call)
    is_state = lambda key, v: isinstance(v, torch.Tensor) and v.is_floating_point() and key not in WIDE
    call = {key: v.bfloat16() if is_state(key, v) else v for key, v in call.items()}
    stock = outputs(net.bfloat16(), call)
    fused = outputs(fastdiff.accelerate(net, "bf16"), call)
    assert _error(fused, truth) <= 2 * _error(stock, truth) + 1e-6


@pytest.mark.slow
def test_a_processor_leaves_to_the_stock_one_what_it_does_not_serve():
    net, call = WALKED["Lumina2"]()
    stock = next(p for p in _processors(net) if p is not None)
    expected = outputs(net, call)
    fastdiff.accelerate(net)
    fused = next(p for p in _processors(net) if p is not None)
    fused.mark = 3
    assert stock.mark == fused.mark == 3 and fused is not stock, "who talks to it talks to the stock one"
    hidden = call["hidden_states"].clone().requires_grad_()
    net(**call | {"hidden_states": hidden}).sample.sum().backward()
    assert hidden.grad.abs().sum() > 0
    told = [layer for layer in fastdiff.report(net).layers if layer.name.endswith(".processor")]
    assert any("a gradient" in layer.reason for layer in told)
    mine = type(stock)()
    net.layers[0].attn.processor = mine
    assert _error(outputs(net, call), expected) < 1e-5
    fastdiff.undo(net)
    assert net.layers[0].attn.processor is mine, "one that was put in since stays"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CogVideoX", "FluxControlNet"])
def test_processors_are_got_set_and_refused_as_diffusers_tests_want(name):
    """What its AttentionTesterMixin checks: get, set one, set all, a wrong number, and fused projections and back."""
    net, call = WALKED[name]()
    expected, stock = outputs(net, call), net.attn_processors
    fastdiff.accelerate(net)
    fused = net.attn_processors
    assert all(one.stock is stock[key] for key, one in fused.items())
    with pytest.raises(ValueError, match="number of processors"):
        net.set_attn_processor(dict(list(fused.items())[:1]))
    if hasattr(net, "fuse_qkv_projections"):
        net.fuse_qkv_projections()
        assert _error(outputs(net, call), expected) < 1e-5
        net.unfuse_qkv_projections()
    assert net.attn_processors == fused and _error(outputs(net, call), expected) < 1e-5
    others = {key: type(one)() for key, one in stock.items()}
    net.set_attn_processor(dict(others))
    assert net.attn_processors == others and _error(outputs(net, call), expected) < 1e-5
    fastdiff.undo(net)
    assert net.attn_processors == others and all(map(torch.equal, outputs(net, call), expected))


@pytest.mark.slow
def test_ip_adapter_processors_are_left_intact():
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from tiny_pipelines import TINY, denoiser, one_call

    pipe = TINY["SD1.5"].build()
    net, call = denoiser(pipe), one_call(pipe, TINY["SD1.5"], rows=2)
    torch.manual_seed(1)
    for block in net.modules():
        if getattr(block, "is_cross_attention", False):
            block.set_processor(IPAdapterAttnProcessor2_0(block.inner_dim, block.cross_attention_dim, num_tokens=(4,)))
    text, width = call["encoder_hidden_states"], net.config.cross_attention_dim
    call["encoder_hidden_states"] = text, [torch.randn(2, 1, 4, width)]
    net.encoder_hid_proj = None
    expected, stock = outputs(net, call), _processors(net)
    fastdiff.accelerate(net)
    assert _processors(net) == stock and _error(outputs(net, call), expected) < 1e-5
    assert not fastdiff.report(net).lowered
    ours = [layer.runs for layer in fastdiff.report(net).layers if "dot_product" in layer.name]
    assert ours and set(ours) == {"attention f32"}, "what they call is served all the same"


def _qkv(heads_of_keys: int = 2, dtype=torch.float32, keys: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 2, 8), (2, keys, heads_of_keys, 8), (2, keys, heads_of_keys, 8)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _truth(q, k, v, mask=None, causal=False, scale=None) -> torch.Tensor:
    """In float64, as one line of algebra."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2)


MASKS = {
    "none": (None, None),
    "keys": (torch.arange(7).repeat(2, 1) < torch.tensor([[4], [7]]), (slice(None), None, None)),
    "queries and keys": (torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.7, ...),
    "each sample": (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2)), (slice(None), None)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_backend_is_attention(mask, groups):
    backend = register_attention_backend()
    given, index = MASKS[mask]
    q, k, v = _qkv(heads_of_keys=2 // groups)
    out = dispatch_attention_fn(q, k, v, attn_mask=given, enable_gqa=groups > 1, backend=backend)
    expected = _truth(q, k, v, None if given is None else given[index])
    assert (out - expected).abs().max() < 1e-6 * 10
    if groups > 1:
        with pytest.raises(ValueError, match="need enable_gqa=True"):
            dispatch_attention_fn(q, k, v, backend=backend)


def test_the_backend_takes_a_scale_causality_and_half_precision_but_no_dropout():
    backend = register_attention_backend()
    q, k, v = _qkv()
    out = dispatch_attention_fn(q, k, v, is_causal=True, scale=0.2, backend=backend)
    assert (out - _truth(q, k, v, causal=True, scale=0.2)).abs().max() < 1e-5
    q, k, v = _qkv(dtype=torch.bfloat16)
    out, truth = dispatch_attention_fn(q, k, v, backend=backend), _truth(q, k, v)
    native_error = (dispatch_attention_fn(q, k, v, backend="native") - truth).abs().max()
    assert out.dtype == torch.bfloat16 and (out - truth).abs().max() <= 2 * native_error + 1e-6
    with pytest.raises(ValueError, match="dropout of 0 expected, got 0.5"):
        dispatch_attention_fn(q, k, v, dropout_p=0.5, backend=backend)


def test_parts_of_the_keys_are_merged_by_their_log_sum_exp():
    register_attention_backend()
    q, k, v = _qkv(keys=7)
    ask = {"attention_kwargs": {"return_lse": True}, "backend": "fastdiff"}
    (a, lse_a), (b, lse_b) = (
        dispatch_attention_fn(q, k[:, part], v[:, part], **ask) for part in (slice(3), slice(3, 7))
    )
    assert lse_a.shape == q.shape[:3] and lse_a.dtype == torch.float32
    scores = torch.einsum("bnhd,bmhd->bnhm", q, k[:, :3]).double() * 8**-0.5
    assert (lse_a - scores.logsumexp(-1)).abs().max() < 1e-5
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    assert (share * a + (1 - share) * b - _truth(q, k, v)).abs().max() < 1e-5


def test_gradients_are_torchs_and_those_of_parts_add_up():
    from fastdiff.pipeline import attention_backend

    q, k, v = (t.requires_grad_() for t in _qkv())
    up = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    (_truth(q, k, v) * up).sum().backward()
    expected = [t.grad.clone() for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    (dispatch_attention_fn(q, k, v, backend=register_attention_backend()) * up).sum().backward()
    assert all((t.grad - e).abs().max() < 1e-5 for t, e in zip((q, k, v), expected, strict=True))

    class Context:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    ctx = Context()
    with torch.no_grad():
        out, lse = attention_backend._forward(ctx, q, k, v, return_lse=True)
        halves = [
            attention_backend._backward(ctx, up, key=k[:, part], value=v[:, part], out=out, lse=lse)
            for part in (slice(3), slice(3, 7))
        ]
    (qa, ka, va), (qb, kb, vb) = halves
    merged = qa + qb, torch.cat([ka, kb], 1), torch.cat([va, vb], 1)
    assert all((t - e).abs().max() < 1e-5 for t, e in zip(merged, expected, strict=True))


@pytest.mark.slow
def test_the_backend_is_compiled_whole():
    register_attention_backend()
    net, call = WALKED["FluxControlNet"]()
    expected = outputs(net, call)
    with diffusers.attention_backend("fastdiff"):
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        assert _error(outputs(compiled, call), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("degrees", ["ring", "ulysses"])
def test_context_parallelism_over_two_processes(degrees):
    """A ring needs the log-sum-exp, which torch's own attention on a CPU does not give diffusers."""
    script = Path(__file__).parent / "context_parallel_run.py"
    done = subprocess.run([sys.executable, str(script), degrees], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 2 and max(errors) < 1e-5
