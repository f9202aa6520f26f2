"""Quantized layers and the walk over a network (T numbers: section 8 of the quantization specification)."""

import copy
import dataclasses

import pytest
import torch
from quant_networks import INT8, NETS, SCHEMES, SPARED, TENSOR, TOKEN, W4, inputs, output, tiny_dit, tiny_unet
from torch import nn
from torch.nn import functional as F

from fastdiff.quant import (
    LowRank,
    QConv2d,
    QLinear,
    QSplit,
    QuantConfig,
    Rotate,
    Rounding,
    Scheme,
    Smooth,
    TemporalPolicy,
    TensorSpec,
    quantize,
)  # fmt: skip
from fastdiff.quant.build import build_layer, restore_layer
from fastdiff.quant.kernels import conv_kernel, linear_kernel
from fastdiff.quant.layer import qlayers
from fastdiff.quant.measures import sqnr_db
from fastdiff.quant.observers import ChannelObserver, RangeObserver
from fastdiff.quant.plan import adapt
from fastdiff.quant.qtensor import quantize as quantize_weight
from fastdiff.quant.steps import StepContext

# measured: worst of the two networks, less 3 dB; what the signs of a layer or a scale would cost is far more
FLOORS = {
    "w8a8": 32,
    "w8a8-static": 30,
    "w8a16": 35,
    "w4a16": 13,
    "w4a8": 13,
    "w4a8-svd": 13,
    "w4a4": 6,
    "fp8": 20,
    "u4": 10,
    "gptq": 13,
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("recipe", SCHEMES)
def test_T55_every_scheme_keeps_the_output(name, recipe):
    net, data = NETS[name](), inputs(name)
    want = output(net, data)
    made = quantize(net, QuantConfig(SCHEMES[recipe], spared=SPARED), data)
    got = sqnr_db(want, output(net, data))
    assert got >= FLOORS[recipe], got
    quantized = [record for record in made.layers if record.scheme is not None]
    assert len(quantized) >= 10 and all(record.sqnr_db > 10 for record in quantized)
    assert made.nbytes < sum(p.nbytes for p in NETS[name]().parameters())


@pytest.mark.parametrize("name", NETS)
def test_T56_spared_layers_are_untouched_and_undo_restores_all(name):
    net, data = NETS[name](), inputs(name)
    before, want = copy.deepcopy(net.state_dict()), output(net, data)
    made = quantize(net, QuantConfig(SCHEMES["w8a8-static"], spared=SPARED), data, keep_originals=True)
    after = net.state_dict()
    kept = [record.name for record in made.layers if record.scheme is None]
    assert any("conv_in" in n or "pos_embed" in n for n in kept) and any("time" in n or "norm1" in n for n in kept)
    for record in made.layers:
        same = torch.equal(before[f"{record.name}.weight"], after[f"{record.name}.weight"].view_as(before[f"{record.name}.weight"])) if record.scheme is None else False  # fmt: skip
        assert same == (record.scheme is None), record.name
    made.undo()
    assert list(net.state_dict()) == list(before) and torch.equal(output(net, data), want)
    with pytest.raises(RuntimeError, match="keep_originals"):
        quantize(net, QuantConfig(SCHEMES["w8a16"], spared=SPARED)).undo()


@pytest.mark.parametrize("recipe", SCHEMES)
def test_stored_tensors_restore_the_layer(recipe):
    scheme, layer = SCHEMES[recipe], nn.Linear(64, 48)
    stats = ChannelObserver(moments=True)
    x = torch.randn(96, 64)
    stats.update(x)
    made = build_layer(layer, scheme, stats)
    steps = StepContext(torch.tensor([3.0, 2.0]))
    if scheme.static_input:
        observer = RangeObserver(2)
        observer.update(x, torch.arange(96) % 2)
        made.set_input_range(*observer.table(scheme.input), steps)
    again = restore_layer(nn.Linear(64, 48, device="meta"), scheme, made.state_dict())
    again.steps = made.steps
    steps.set(torch.full((96,), 2.0))
    assert torch.equal(again(x), made(x)) and again.state_dict().keys() == made.state_dict().keys()


def test_convolution_equals_its_dense_weight():
    conv = nn.Conv2d(6, 10, 3, stride=2, padding=1)
    layer = build_layer(conv, Scheme(INT8))
    assert layer.weight.shape == (10, 3, 3, 6) and layer.weight.dtype == torch.int8
    x = torch.randn(2, 6, 9, 9)
    want = F.conv2d(x, layer.dense(), conv.bias, 2, 1)
    assert torch.allclose(layer(x), want, atol=1e-5)
    assert sqnr_db(conv.weight, layer.dense()) > 38


@pytest.mark.parametrize("padding,size,kernel", [(1, 9, 3), (0, 8, 3), (2, 7, 5), (0, 6, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_T11_convolution_is_exact_in_integers(padding, size, kernel, stride):
    conv = nn.Conv2d(7, 5, kernel, stride, padding, bias=False)
    layer = build_layer(conv, Scheme(INT8, TENSOR))
    x = torch.randn(3, 7, size, size)
    layer.set_input_range(torch.tensor([0.03]), None, None)
    codes = (x.double() * (1 / torch.tensor(0.03)).double()).round().clamp(-127, 127)
    exact = F.conv2d(codes, layer.weight.double().permute(0, 3, 1, 2), None, stride, padding)
    want = exact * (layer.weight_scale * torch.tensor(0.03)).double()[:, None, None]
    assert float((layer(x) - want).abs().max()) <= 2e-6 * float(want.abs().max())


def test_T26_smoothed_layer_applies_the_original_weight():
    layer, x = nn.Linear(32, 16), torch.randn(200, 32) * torch.logspace(-1, 1, 32)
    stats = ChannelObserver(moments=False)
    stats.update(x)
    made = build_layer(layer, Scheme(INT8, None, (Smooth(0.5),)), stats)
    assert sqnr_db(layer.weight, made.dense()) > 35 and made.smooth.std() > 0.1
    assert torch.allclose(made(x), F.linear(x, made.dense(), layer.bias), atol=1e-4)


@pytest.mark.parametrize("transforms", [(), (Rotate(16),), (Smooth(0.5), LowRank(4))])
def test_T29_lora_is_extra_low_rank_columns(transforms):
    layer, x = nn.Linear(32, 24), torch.randn(50, 32)
    stats = ChannelObserver(moments=False)
    stats.update(x)
    made = build_layer(layer, Scheme(W4, None, transforms), stats)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    plain = made(x)
    down, up = torch.randn(3, 32), torch.randn(24, 3)
    made.add_lora("style", down, up, 0.7)
    want = x.double() @ (made.dense().double()).T + layer.bias.double()
    assert float((made(x) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert torch.allclose(made(x) - plain, x @ (0.7 * up @ down).T, atol=1e-4)
    made.remove_lora("style")
    assert torch.equal(made(x), plain)
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    with pytest.raises(ValueError, match="add_lora"):
        made.add_lora("wrong", torch.zeros(3, 31), up)


def test_T30_split_equals_the_sum_and_beats_one_range():
    conv = nn.Conv2d(16, 12, 3, padding=1)
    x = torch.randn(4, 16, 10, 10)
    x[:, 8:] /= 30
    conv.weight.data[:, 8:] *= 30
    want = conv(x)
    scheme = Scheme(INT8, TENSOR)
    joint, split = build_layer(conv, scheme), build_layer(conv, dataclasses.replace(scheme, split_input=8))
    assert isinstance(split, QSplit) and split.second.bias is None
    scale = lambda v: (v.abs().max() / 127).reshape(1)
    joint.set_input_range(scale(x), None, None)
    split.first.set_input_range(scale(x[:, :8]), None, None)
    split.second.set_input_range(scale(x[:, 8:]), None, None)
    assert sqnr_db(want, split(x)) >= sqnr_db(want, joint(x)) + 10
    parts = [part.values_of(x.narrow(1, 8 * i, 8)).double() for i, part in enumerate((split.first, split.second))]
    exact = sum(
        F.conv2d(p, part.dense().double(), None, 1, 1)
        for p, part in zip(parts, (split.first, split.second), strict=True)
    )
    exact = exact + conv.bias.double()[:, None, None]
    assert float((split(x) - exact).abs().max()) <= 4e-6 * float(exact.abs().max())
    split.second.set_input_range(split.first.input_scale, None, None)
    joint.set_input_range(split.first.input_scale, None, None)
    joint.weight_scale.copy_(split.first.weight_scale)
    split.second.weight_scale.copy_(split.first.weight_scale)
    joint.weight.copy_(torch.cat((split.first.weight, split.second.weight), 3))
    joint.forget_prepared(), split.first.forget_prepared(), split.second.forget_prepared()
    assert float((split(x) - joint(x)).abs().max()) <= 4e-6 * float(joint(x).abs().max())


def test_T38_a_range_per_step_beats_one_for_all():
    weight, rng = nn.Linear(64, 32, bias=False), torch.Generator().manual_seed(0)
    sigmas = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    x = torch.randn(5, 512, 64, generator=rng) * sigmas[:, None, None]
    spec = dataclasses.replace(TENSOR, per_step=True)
    layer = build_layer(weight, Scheme(TensorSpec("int8"), spec))
    steps = StepContext(sigmas.flip(0))
    observer = RangeObserver(5)
    steps.set(sigmas)
    observer.update(x, steps.rows)
    layer.set_input_range(*observer.table(spec), steps)
    per_step = [sqnr_db(x[i], layer.values_of(x[i : i + 1])[0]) for i in range(5) if steps.set(sigmas[i]) is None]
    layer.set_input_range(*observer.table(dataclasses.replace(spec, per_step=False)), None)
    fixed = [sqnr_db(x[i], layer.values_of(x[i : i + 1])[0]) for i in range(5)]
    assert min(per_step) >= 39 and fixed[0] <= 17 and fixed[-1] >= 39
    assert observer.drift() == pytest.approx(16, rel=0.15)


def test_one_extreme_does_not_decide_a_searched_range():
    """What a sample of the values and both bounds find is as good as the best range for all of the values."""
    x = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0))
    x[3, 12_345] = 12.0
    observer = RangeObserver(1)
    observer.update(x, torch.zeros(16, dtype=torch.int64))

    def loss(top: float) -> float:
        back = (x.double() * (127 / top)).round().clamp(-127, 127) * (top / 127)
        return float((x.double() - back).abs().pow(2.4).sum())

    found = 127 * float(observer.table(dataclasses.replace(TENSOR, range="mse"))[0])
    assert loss(found) <= 1.05 * min(loss(float(top)) for top in range(4, 13)) < 0.8 * loss(12.0)


def test_T39_rows_of_different_steps_share_a_batch():
    layer = build_layer(nn.Linear(32, 8), Scheme(INT8, dataclasses.replace(TENSOR, per_step=True)))
    steps = StepContext(torch.tensor([800.0, 400.0, 0.0]))
    layer.set_input_range(torch.tensor([0.08, 0.04, 0.01]), None, steps)
    x, t = torch.randn(4, 6, 32), torch.tensor([0.0, 800.0, 410.0, 10.0])
    steps.set(t)
    together = layer(x)
    for row in range(4):
        steps.set(t[row])
        assert steps.rows.tolist() == [[2, 0, 1, 2][row]]
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    steps.set(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="2 times, a layer inside got 4 rows"):
        layer(x)


def test_T12_asymmetric_convolution_pads_with_real_zeros():
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    layer = build_layer(conv, Scheme(INT8, TensorSpec("uint8", "tensor", symmetric=False)))
    x = torch.rand(1, 3, 6, 5) + 0.2
    scale, zero = torch.tensor([0.01]), torch.tensor([37], dtype=torch.uint8)
    layer.set_input_range(scale, zero, None)
    codes = ((x * (1 / scale)).round() + 37).clamp(0, 255).long() - 37
    exact = F.conv2d(codes.double(), layer.weight.double().permute(0, 3, 1, 2), None, 1, 1)
    want = exact * (layer.weight_scale * scale).double()[:, None, None]
    assert float((layer(x) - want).abs().max()) <= 2e-6 * float(want.abs().max())
    naive = F.conv2d((codes + 37).double(), layer.weight.double().permute(0, 3, 1, 2), None, 1, 1)
    naive = naive - 37 * layer.weight.double().sum((1, 2, 3))[:, None, None]
    assert int((naive != exact).any(1).sum()) == 6 * 5 - 4 * 3


class Keep(dict):
    """A store in memory that dies after a number of blocks."""

    def __init__(self, limit: int = 10**9):
        super().__init__()
        self.limit, self.puts = limit, 0

    def put(self, key, tensors):
        if self.puts >= self.limit:
            raise KeyboardInterrupt
        self.puts += 1
        self[key] = {name: value.clone() for name, value in tensors.items()}


@pytest.mark.parametrize("recipe", ["w4a8", "gptq"])
def test_a_killed_run_goes_on_from_its_last_block(recipe):
    data, config = inputs("unet"), QuantConfig(SCHEMES[recipe], spared=SPARED)
    whole = tiny_unet()
    quantize(whole, config, data)
    store = Keep(limit=4)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_unet(), config, data, store=store)
    assert len(store) == 4
    store.limit = 10**9
    resumed = tiny_unet()
    quantize(resumed, config, data, store=store)
    assert store.puts == len(store) > 6
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    other = tiny_unet()
    other.conv_in.weight.data[0] += 1
    other.mid_block.resnets[0].conv1.weight.data[0] += 1
    before = store.puts
    quantize(other, config, data, store=store)
    assert store.puts > before


slow = [pytest.param(name, marks=pytest.mark.slow) for name in ("w4a8-svd", "gptq")]


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static", *slow])
def test_T52_the_same_run_gives_the_same_bytes(recipe):
    states = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        net = tiny_dit()
        quantize(net, QuantConfig(SCHEMES[recipe], spared=SPARED), inputs("dit"))
        states.append(net.state_dict())
    torch.set_num_threads(threads)
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_learned_rounding_beats_the_nearest_on_the_network():
    errors = {}
    data = inputs("unet")
    want = output(tiny_unet(), data)
    weight = TensorSpec("uint4", symmetric=False, range="mse")
    for kind in ("rtn", "adaround"):
        net = tiny_unet()
        scheme = Scheme(weight, None, (), Rounding(kind, iters=40, lr=2e-2, batch=8))
        quantize(net, QuantConfig(None, (("mid_block", scheme),)), data)
        errors[kind] = sqnr_db(want, output(net, data))
    assert errors["adaround"] >= errors["rtn"] + 1


def test_changing_dtype_never_touches_the_codes():
    layer = build_layer(nn.Linear(64, 16), SCHEMES["w8a8"])
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.randn(5, 64)
    want = layer(x)
    layer.to(torch.bfloat16).half()
    assert all(torch.equal(before[k], v) and v.dtype == before[k].dtype for k, v in layer.state_dict().items())
    assert torch.equal(layer(x), want) and layer(x.bfloat16()).dtype == torch.bfloat16


def test_data_are_asked_for_and_odd_sizes_are_adapted():
    with pytest.raises(ValueError, match="needs calibration data"):
        quantize(tiny_unet(), QuantConfig(SCHEMES["w8a8-static"]))
    net = nn.Sequential(nn.Linear(30, 20), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(48, 8), nn.Linear(512, 64))
    made = quantize(
        net, QuantConfig(Scheme(TensorSpec("int4", "group", 64), TOKEN, (Rotate(),)), temporal=TemporalPolicy("off"))
    )
    notes = {record.name: record.note for record in made.layers}
    assert "scaled per channel" in notes["0"] and "not rotated" in notes["0"]
    assert "grouped" in notes["1"] and "groups of 16" in notes["2"] and notes["3"] == ""
    assert isinstance(net[3], QLinear) and net[3].rotation == 256 and isinstance(net[1], nn.Conv2d)
    assert not isinstance(net[1], QConv2d)
    plan = adapt("conv", nn.Conv2d(32, 8, 3), SCHEMES["w4a4"])
    assert plan.scheme.input == TOKEN and "int8 activations" in plan.note and plan.scheme.weight.bits == 4


def test_storage_is_counted_with_its_scales():
    net = nn.Sequential(nn.Linear(256, 64, bias=False))
    made = quantize(net, QuantConfig(SCHEMES["w4a16"]))
    assert made.layers[0].bits == 4 + 32 / 32 and made.nbytes == 256 * 64 // 2 + 64 * 8 * 4
    assert quantize_weight(torch.randn(64, 256), W4).bits == 5.0


def test_T36_the_quantized_time_embedding_still_tells_the_steps_apart():
    net, times = tiny_unet(), torch.arange(0, 1000, 50).float()
    embed = lambda: net.time_embedding(_sinusoid(times))
    want = embed().detach()
    quantize(net, QuantConfig(Scheme(INT8, TOKEN), spared=SPARED, temporal=TemporalPolicy("off")))
    got = embed().detach()
    closest = F.cosine_similarity(got[:, None], want[None], dim=2).argmax(1)
    assert closest.tolist() == list(range(20)) and not qlayers(tiny_unet())


def _sinusoid(times: torch.Tensor) -> torch.Tensor:
    from fastdiff.models.embeddings import timestep_sinusoid

    return timestep_sinusoid(times, 16, True, 0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("weight", ["int8", "int4", "uint4"])
def test_T54_kernels_and_dense_weights_agree(weight, dynamic):
    spec = TensorSpec(weight, symmetric=weight != "uint4")
    scheme = Scheme(spec, TOKEN if dynamic else TENSOR)
    linear, conv = nn.Linear(48, 20), nn.Conv2d(12, 10, 3, padding=1)
    for layer, x in ((linear, torch.randn(7, 48)), (conv, torch.randn(2, 12, 9, 9))):
        made = build_layer(layer, scheme)
        if not dynamic:
            made.set_input_range(torch.tensor([0.03]), None, None)
        assert (conv_kernel if layer is conv else linear_kernel)(made) is not None
        exact = layer.__class__.forward(_with_weight(layer, made.dense()), made.values_of(x).float())
        assert float((made(x) - exact).abs().max()) <= 4e-6 * float(exact.abs().max())


def _with_weight(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    same = copy.deepcopy(layer)
    same.weight.data.copy_(weight)
    return same
