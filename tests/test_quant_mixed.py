"""Mixed precision by sensitivity, and the bounds of integer arithmetic and memory (T numbers: quantization specification)."""

import itertools
import subprocess
import sys

import pytest
import torch
from quant_networks import SPARED, inputs, output, tiny_dit
from torch import nn

from fastdiff.quant import QuantConfig, Rounding, Scheme, TensorSpec, quantize
from fastdiff.quant.build import build_layer
from fastdiff.quant.kernels import MOST_PRODUCTS, linear_kernel
from fastdiff.quant.measures import sqnr_db
from fastdiff.quant.mixed import Cost, mix, sensitivity, spend, three_times

CANDIDATES = {"w8": Scheme(TensorSpec("int8")), "w4": Scheme(TensorSpec("int4", "group", 32))}


def test_sensitivity_measures_one_layer_at_a_time():
    net, data = tiny_dit(), inputs("dit")
    config = QuantConfig(CANDIDATES["w8"], spared=SPARED)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    few = three_times(data, rows=2)
    assert sorted(few.t.unique().tolist()) == [100.0, 500.0, 900.0] and len(few) == 6
    costs = sensitivity(net, config, CANDIDATES, few)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert len(costs) == 12 and all(
        c["w4"].noise > c["w8"].noise and c["w4"].nbytes < c["w8"].nbytes for c in costs.values()
    )
    assert all(cost.ms > 0 for layer in costs.values() for cost in layer.values())
    name = "transformer_blocks.1.ff.net.2"
    own = sensitivity(net, QuantConfig(None, ((f"^{name}$", CANDIDATES["w8"]),)), {"own": None}, few)
    assert own == {
        name: {"own": Cost(0.0, sum(p.nbytes for p in net.get_submodule(name).parameters()), own[name]["own"].ms)}
    }
    alone = tiny_dit()
    quantize(alone, mix(QuantConfig(None, spared=SPARED), CANDIDATES, {name: "w4"}))
    want, got = output(tiny_dit(), few), output(alone, few)
    assert costs[name]["w4"].noise == pytest.approx(10 ** (-sqnr_db(want, got) / 10), rel=1e-3)
    with pytest.raises(ValueError, match="without calibration"):
        sensitivity(net, config, {"gptq": Scheme(TensorSpec("int4"), None, (), Rounding("gptq"))}, few)


def test_budget_is_kept_and_well_spent():
    costs = {
        "a": {"w8": Cost(0.0, 100), "w4": Cost(1.0, 50)},
        "b": {"w8": Cost(0.0, 100), "w4": Cost(0.1, 50)},
        "c": {"w8": Cost(0.0, 40), "w4": Cost(0.05, 20)},
    }
    assert spend(costs, 240) == {"a": "w8", "b": "w8", "c": "w8"}
    assert spend(costs, 190) == {"a": "w8", "b": "w4", "c": "w8"}
    assert spend(costs, 175) == {"a": "w8", "b": "w4", "c": "w4"}
    with pytest.raises(ValueError, match="smallest candidates take 120"):
        spend(costs, 119)
    slow = {
        "a": {"w8": Cost(0.0, 9, 4.0), "own": Cost(0.3, 9, 1.0)},
        "b": {"w8": Cost(0.0, 9, 2.0), "w4": Cost(0.4, 5, 1.5)},
    }
    assert spend(slow, 6, of="ms") == {"a": "w8", "b": "w8"} and spend(slow, 3, of="ms") == {"a": "own", "b": "w8"}
    assert spend(slow, 2.5, of="ms") == {"a": "own", "b": "w4"}
    with pytest.raises(ValueError, match="of must be one of nbytes, ms"):
        spend(slow, 3, of="bits")


def test_mixed_beats_the_average_choice_of_equal_size():
    net, data = tiny_dit(), inputs("dit")
    config = QuantConfig(CANDIDATES["w8"], spared=SPARED)
    costs = sensitivity(net, config, CANDIDATES, three_times(data))
    budget = sum((c["w8"].nbytes + c["w4"].nbytes) // 2 for c in costs.values())
    want, results = output(net, data), []
    names = list(costs)
    choices = [spend(costs, budget), {n: "w4" if i % 2 else "w8" for i, n in enumerate(names)}, {n: "w8" if i % 2 else "w4" for i, n in enumerate(names)}]  # fmt: skip
    for chosen in choices:
        made = tiny_dit()
        quantize(made, mix(config, CANDIDATES, chosen))
        results.append(sqnr_db(want, output(made, data)))
    assert sum(costs[n][k].nbytes for n, k in choices[0].items()) <= budget
    assert results[0] >= (results[1] + results[2]) / 2


def test_T3_zero_points_on_both_sides():
    layer = nn.Linear(33, 7, bias=False)
    made = build_layer(
        layer, Scheme(TensorSpec("uint4", symmetric=False), TensorSpec("uint8", "tensor", symmetric=False))
    )
    scale, zero = torch.tensor([0.02]), torch.tensor([117], dtype=torch.uint8)
    made.set_input_range(scale, zero, None)
    x = torch.randn(5, 33)
    a, b = ((x / scale).round() + 117).clamp(0, 255).long(), made.codes().codes.long().T
    za, zb = 117, made.weight_zero.long()
    assert len(zb.unique()) > 1
    exact = (a - za) @ (b - zb)
    assert torch.equal(exact, a @ b - za * b.sum(0) - zb * a.sum(1, keepdim=True) + 33 * za * zb)
    want = exact.double() * (made.weight_scale * scale).double()
    assert float((made(x) - want).abs().max()) <= 2e-6 * float(want.abs().max())


@pytest.mark.parametrize("k", [MOST_PRODUCTS, MOST_PRODUCTS + 1])
def test_T4_sums_of_codes_never_wrap(k):
    assert 127 * 127 * MOST_PRODUCTS <= 2**31 - 1 < 127 * 127 * (MOST_PRODUCTS + 1)
    layer = nn.Linear(k, 2, bias=False)
    layer.weight.data.copy_(torch.tensor([1.0, -1.0])[:, None].expand(2, k))
    made = build_layer(layer, Scheme(TensorSpec("int8"), TensorSpec("int8", "token", dynamic=True)))
    y = made(torch.ones(1, k))
    assert y[0].tolist() == pytest.approx([k, -k], rel=1e-6)
    assert (linear_kernel(made) is None) == (k > MOST_PRODUCTS)


def test_T57_upsampling_decomposes_into_four_phases():
    x, w = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    functional = torch.nn.functional
    want = functional.conv2d(functional.interpolate(x, scale_factor=2, mode="nearest"), w, padding=1)
    got = torch.empty_like(want)
    # a row of the output sees rows (y - 1, y, y) or (y, y, y + 1) of the input, by its parity
    merge = lambda v, even, dim: torch.stack(
        (v.select(dim, 0), v.select(dim, 1) + v.select(dim, 2)) if even else (v.select(dim, 0) + v.select(dim, 1), v.select(dim, 2)), dim
    )  # fmt: skip
    for py, px in itertools.product((0, 1), repeat=2):
        phase = merge(merge(w, py == 0, 2), px == 0, 3)
        padded = functional.pad(x, (1 - px, px, 1 - py, py))
        got[:, :, py::2, px::2] = functional.conv2d(padded, phase)
    assert float((got - want).abs().max()) <= 1e-12 * float(want.abs().max())


@pytest.mark.slow
def test_T53_memory_stays_near_the_quantized_model():
    code = """
import resource, torch
from torch import nn
from fastdiff.quant import quantize
from fastdiff.quant.recipes import RECIPES
torch.set_num_threads(1)
net = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(16)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
made = quantize(net, RECIPES["w8a8"].config)
print(peak() - before, made.nbytes)
"""
    grown, size = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert size < 0.26 * 16 * 4096 * 4096 * 4 + 1e6
    assert grown <= 2 * 4 * 4096 * 4096 + 200e6, grown  # two layers above the model in floating point
