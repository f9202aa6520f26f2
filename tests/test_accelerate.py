"""`accelerate` on whole modules: equal numbers within each mode's bound, reversible, and honest about what it did."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from unet_networks import call, conditional_unet, inputs_of

import fastdiff
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.ops import backend, native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")

# largest error relative to the output's largest magnitude
BOUNDS = {"exact": 2e-5, "bf16": 3e-2, "w8a8": 6e-2}
CONFIG = dict(num_attention_heads=3, attention_head_dim=24, in_channels=3, num_layers=2, sample_size=8, patch_size=2)


def _dit(seed=0, **changes) -> DiT:
    torch.manual_seed(seed)
    net = DiT(DiTConfig(**{**CONFIG, **changes, "num_embeds_ada_norm": 10})).eval()
    for p in net.parameters():  # modulations of a fresh network are near zero
        nn.init.normal_(p, std=0.5 * max(p.shape[-1], 4) ** -0.5 if p.dim() > 1 else 0.1)
    return net


def _diffusers_dit() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(**CONFIG, num_embeds_ada_norm=10).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5 * max(p.shape[-1], 4) ** -0.5 if p.dim() > 1 else 0.1)
    return net


class _Plain(nn.Module):
    """A module that no family knows."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.conv = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=8)
        self.norm_tokens = nn.LayerNorm(64)
        self.qkv = nn.Linear(64, 192, bias=False)
        self.out = nn.Linear(64, 5)

    def forward(self, x, t):
        x = self.grouped(self.conv(F.silu(self.norm(self.conv_in(x)))))
        tokens = self.norm_tokens(x.flatten(2).transpose(1, 2)) + t[:, None, None]
        q, k, v = self.qkv(tokens).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _call(net, seed=0, batch=2):
    torch.manual_seed(seed)
    x, t = torch.randn(batch, 3, 8, 8), torch.rand(batch) * 900
    labels = torch.randint(0, 11, (batch,))
    with torch.no_grad():
        if isinstance(net, _Plain):
            return net(x, t / 900)
        out = net(x, t, labels) if isinstance(net, DiT) else net(x, timestep=t, class_labels=labels)
        return out if isinstance(out, torch.Tensor) else out.sample


def _error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


MAKERS = {"bundled DiT": _dit, "DiTTransformer2DModel": _diffusers_dit, "unknown": _Plain}


@pytest.mark.parametrize("mode", BOUNDS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_modes_stay_within_their_bounds(make, mode):
    net = make().eval()
    expected = {(seed, batch): _call(net, seed, batch) for seed, batch in ((0, 2), (1, 2), (2, 1), (3, 5))}
    assert fastdiff.accelerate(net, mode) is net
    for (seed, batch), truth in expected.items():
        got = _call(net, seed, batch)
        assert got.shape == truth.shape and got.dtype == truth.dtype
        assert _error(got, truth) < BOUNDS[mode]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_undo_restores_everything(make):
    net = make().eval()
    before, state = _call(net), copy.deepcopy(net.state_dict())
    keys = set(net.__dict__)
    fastdiff.undo(fastdiff.accelerate(net, "w8a8"))
    assert set(net.__dict__) == keys and torch.equal(_call(net), before)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match="not accelerated"):
        fastdiff.report(net)


@pytest.mark.parametrize("mode", BOUNDS)
def test_recorded_programs_equal_eager_calls(mode):
    net = fastdiff.accelerate(_dit(), mode)
    recorded = _call(net)
    with backend("cpu"):
        assert torch.equal(_call(net), recorded)


def test_rows_do_not_depend_on_the_batch():
    for mode in BOUNDS:
        net = fastdiff.accelerate(_dit(), mode, exact_time=False)
        torch.manual_seed(0)
        x, t, labels = torch.randn(5, 3, 8, 8), torch.rand(5) * 900, torch.arange(5)
        with torch.no_grad():
            whole = net(x, t, labels)
            for rows in (slice(0, 1), slice(2, 5)):
                assert torch.equal(net(x[rows], t[rows], labels[rows]), whole[rows]), mode


def test_changed_weights_are_packed_again():
    net, other = fastdiff.accelerate(_dit(), "exact"), _dit(seed=7)
    before = _call(net)
    net.load_state_dict(other.state_dict())
    assert _error(_call(net), _call(other)) < BOUNDS["exact"] < _error(before, _call(other))
    net.proj_out_2.weight.data = net.proj_out_2.weight.data * 2
    net.proj_out_2.bias = nn.Parameter(torch.ones_like(net.proj_out_2.bias))
    own = _call(fastdiff.undo(copy.deepcopy(net)))
    assert _error(_call(net), own) < BOUNDS["exact"] < _error(_call(other), own)


def test_layers_of_unknown_modules_follow_their_weights():
    net = fastdiff.accelerate(_Plain().eval(), "exact")
    _call(net)
    with torch.no_grad():
        net.qkv.weight.mul_(3)
    own = _call(fastdiff.undo(copy.deepcopy(net)))
    assert _error(_call(net), own) < BOUNDS["exact"]
    assert any(layer.name == "qkv" and "changed" in layer.reason for layer in fastdiff.report(net).layers)


def test_conversion_of_the_module_is_followed():
    net = fastdiff.accelerate(_dit(), "exact")
    truth = _call(net)
    net.to(torch.float64).to(torch.bfloat16)
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2) * 900
    with torch.no_grad():
        got = net(x.bfloat16(), t, torch.randint(0, 11, (2,)))
    assert got.dtype == torch.bfloat16 and 1e-4 < _error(got.float(), truth) < BOUNDS["bf16"]


def test_later_hooks_are_respected():
    net = fastdiff.accelerate(_dit(), "exact")
    seen = []
    net.transformer_blocks[1].ff.register_forward_hook(lambda *a: seen.append(1))
    _call(net)
    assert seen and "hooks" in next(iter(fastdiff.report(net).calls))


def test_two_modules_do_not_touch_each_other():
    one, two = _dit(), _dit()
    fastdiff.accelerate(one, "w8a8")
    assert torch.equal(_call(two), _call(_dit()))


def test_copies_and_pickles_keep_working():
    net = fastdiff.accelerate(_dit(), "bf16")
    expected = _call(net)
    copied, loaded = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    with torch.no_grad():
        net.proj_out_2.bias.add_(1)
    assert torch.equal(_call(copied), expected) and torch.equal(_call(loaded), expected)
    assert fastdiff.report(copied).mode == fastdiff.report(loaded).mode == "bf16"


def test_gradients_take_the_modules_own_way():
    net, plain = fastdiff.accelerate(_dit(), "exact"), _dit()
    grads = []
    for f in (net, plain):
        x = torch.ones(1, 3, 8, 8, requires_grad=True)
        f(x, torch.tensor([3.0]), torch.tensor([1])).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert fastdiff.report(net).calls == {"a gradient is wanted": 1}
    strict = fastdiff.accelerate(_dit(), "exact", strict=True)
    with pytest.raises(RuntimeError, match="strict.*gradient"):
        strict(torch.ones(1, 3, 8, 8, requires_grad=True), torch.tensor([3.0]), torch.tensor([1]))


def test_tensors_of_other_classes_take_the_modules_own_way():
    net = fastdiff.accelerate(_dit(), "exact")
    x = torch.ones(1, 3, 8, 8).as_subclass(type("Late", (torch.Tensor,), {}))
    with torch.no_grad():
        expected = _dit()(x, torch.tensor([3.0]), torch.tensor([1]))
        assert torch.equal(net(x, torch.tensor([3.0]), torch.tensor([1])), expected)
    assert fastdiff.report(net).calls == {"inputs of class Late": 1}


def test_report_says_what_runs_and_why_not():
    net = fastdiff.accelerate(_dit(), "w8a8", spare=["transformer_blocks.1.ff.net.2"])
    _call(net)
    found = fastdiff.report(net)
    runs = {layer.name: (layer.runs, layer.reason) for layer in found.layers}
    assert found.lowered and found.calls == {"fused": 1}
    assert runs["transformer_blocks.0.ff.net.2"] == ("w8a8", "")
    assert runs["transformer_blocks.1.ff.net.2"] == ("bfloat16", "asked for")
    assert runs["proj_out_2"][0] == "float32" and "last layer" in runs["proj_out_2"][1]
    assert "proj_out_2: float32 (last layer" in str(found) and found.to_dict()["mode"] == "w8a8"


def test_layers_with_hooks_or_other_classes_are_left_alone():
    net = _dit()
    seen = []
    net.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *a: seen.append(1))
    plain = _call(net)
    fastdiff.accelerate(net, "exact")
    assert _error(_call(net), plain) < BOUNDS["exact"] and len(seen) == 2
    assert not fastdiff.report(net).lowered and "hooks" in fastdiff.report(net).layers[0].reason
    with pytest.raises(RuntimeError, match="strict.*hooks"):
        fastdiff.accelerate(_hooked(), "exact", strict=True)


def _hooked():
    net = _dit()
    net.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *a: None)
    return net


def test_original_weights_can_be_given_up():
    net, truth = _dit(), _call(_dit())
    fastdiff.accelerate(net, "w8a8", keep_original=False)
    assert _error(_call(net), truth) < BOUNDS["w8a8"]
    assert net.transformer_blocks[0].ff.net[2].weight.device.type == "meta"
    for give_back in (fastdiff.undo, copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="original weights"):
            give_back(net)
    broken = _hooked()
    with pytest.raises(ValueError, match="keep_original"):
        fastdiff.accelerate(broken, "w8a8", keep_original=False)
    assert all(p.device.type == "cpu" for p in broken.parameters()), "nothing may be lost when it fails"


@pytest.mark.parametrize(
    "settings, error",
    [
        (dict(mode="int3"), "unknown mode 'int3'; known are exact, bf16, w8a8"),
        (dict(attention="fp64"), "unknown attention 'fp64'"),
    ],
)
def test_bad_settings_are_errors_before_any_work(settings, error):
    net = _dit()
    with pytest.raises(ValueError, match=error):
        fastdiff.accelerate(net, **settings)
    assert "forward" not in net.__dict__


def test_a_sampler_fills_the_temporal_table_once():
    net = fastdiff.accelerate(_dit(), "bf16")
    table = net.__dict__["_fastdiff"].lowered.temporal
    sampler = fastdiff.Sampler(net, prediction="noise")
    labels = torch.tensor([1, 2])
    sampler.sample(
        (2, 3, 8, 8), cond={"class_labels": labels}, negative={"class_labels": labels * 0 + 10}, guidance=2.0, steps=5
    )
    assert table.computed == 5 * 3  # steps x (two classes and the null class)
    plain = fastdiff.Sampler(_dit(), prediction="noise")
    call = dict(cond={"class_labels": labels}, steps=5, seed=3)
    assert _error(sampler.sample((2, 3, 8, 8), **call), plain.sample((2, 3, 8, 8), **call)) < 0.1


def test_shapes_take_turns_without_disturbing_each_other():
    net = conditional_unet()
    calls = [inputs_of(net, seed=seed, rows=1 + seed % 2) for seed in range(4)]
    calls[2:] = [((*new[:2], *old[2:]), named) for (new, named), (old, _) in zip(calls[2:], calls[:2], strict=True)]
    expected = [call(net, *args, **named) for args, named in calls]
    fastdiff.accelerate(net)
    for index in (0, 1, 2, 3, 1, 1, 0, 2):
        args, named = calls[index]
        assert _error(call(net, *args, **named), expected[index]) < BOUNDS["exact"], index
