"""Lowered families with weights packed for GPUs: through the references, in Triton's interpreter, and on a GPU as graphs."""

import contextlib
import copy

import pytest
import torch
from context_networks import NETWORKS
from joint_networks import JOINT
from unet_networks import SDXL, bundled_unet, conditional_unet, decibels, inputs_of, relative_error

import fastdiff
from fastdiff.models.load import load_model
from fastdiff.ops import backend, native, packing

TRANSFORMERS = NETWORKS | JOINT
FAMILIES = (
    "unet",
    "unet-conditional",
    "unet-sdxl",
    "dit",
    "pixart-sigma",
    "wan",
    "ltx",
    "sana",
    "sd3.5",
    "flux-guided",
)
# one block of a kind shows what several do
SHORT = {"sd3.5": dict(num_layers=2), "flux-guided": dict(num_layers=1, num_single_layers=1)}
UNETS = {
    "unet": bundled_unet,
    "unet-conditional": conditional_unet,
    "unet-sdxl": lambda: conditional_unet(**SDXL),
}
# half a minute each; a GPU runs all
IN_THE_INTERPRETER = (("unet", "w8a8"), ("sana", "w8a8"), ("flux-guided", "bf16"), ("wan", "exact"))
SIGNAL = {"exact": 90.0, "bf16": 35.0, "w8a8": 22.0}  # to noise, dB
every_family = pytest.mark.parametrize("name", FAMILIES)
every_mode = pytest.mark.parametrize("mode", SIGNAL)


def _build(name: str) -> torch.nn.Module:
    if name in UNETS:
        return UNETS[name]()
    return (
        load_model("bundled:dit").net.eval()
        if name == "dit"
        else TRANSFORMERS[name].build(**SHORT.get(name, dict(num_layers=1)))
    )


def _inputs(name: str, net: torch.nn.Module, seed: int = 0) -> tuple[tuple, dict]:
    if name in UNETS:
        return inputs_of(net, seed, rows=1, size=(4, 4))
    if name == "dit":
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(1, 1, 32, 32, generator=generator), torch.tensor([300.0]), torch.tensor([4])), {}
    return (), TRANSFORMERS[name].call(2, seed=seed)


def _call(net: torch.nn.Module, inputs: tuple[tuple, dict]) -> torch.Tensor:
    with torch.no_grad():
        out = net(*inputs[0], **inputs[1])
    return out if isinstance(out, torch.Tensor) else out[0]


def _to(value, device):
    if isinstance(value, dict):
        return {key: _to(v, device) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to(v, device) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _packed_for_gpus(monkeypatch, name: str):
    """CPU tensors with the layouts of a GPU, on one backend."""
    monkeypatch.setattr(packing, "layout_of", lambda device, layout=None: layout or "rows")
    with backend(name):
        yield


def _check(monkeypatch, name: str, mode: str, variant: str) -> None:
    net = _build(name)
    inputs = _inputs(name, net)
    expected = _call(net, inputs)
    with _packed_for_gpus(monkeypatch, variant):
        fastdiff.accelerate(net, mode, strict=True)
        got = _call(net, inputs)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert decibels(got, expected) > SIGNAL[mode]


@every_mode
@every_family
def test_forwards_with_weights_in_rows(monkeypatch, name, mode):
    _check(monkeypatch, name, mode, "reference")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same runs on the GPU")
@pytest.mark.parametrize("name, mode", IN_THE_INTERPRETER)
def test_forwards_in_the_interpreter(monkeypatch, name, mode):
    _check(monkeypatch, name, mode, "triton")


@pytest.mark.gpu
@every_mode
@every_family
def test_forwards_on_a_gpu(name, mode):
    net = _build(name)
    calls = [_inputs(name, net, seed) for seed in (0, 1)]
    expected = [_call(net, inputs) for inputs in calls]
    own = net.to("cuda")
    calls = [_to(inputs, "cuda") for inputs in calls]
    fastdiff.accelerate(own, mode, strict=True)
    for _ in range(2):  # captured, then replayed
        for inputs, want in zip(calls, expected, strict=True):
            assert decibels(_call(own, inputs).cpu(), want) > SIGNAL[mode]
    assert fastdiff.report(own).calls == {"fused": 4}
    with torch.no_grad():
        next(own.parameters()).mul_(1.5)
    changed = copy.deepcopy(fastdiff.undo(own)).cpu()
    fastdiff.accelerate(own, mode, strict=True)
    assert decibels(_call(own, calls[0]).cpu(), _call(changed, _to(calls[0], "cpu"))) > SIGNAL[mode]


@pytest.mark.gpu
def test_weights_that_move_take_their_programs_along():
    net = _build("unet-conditional")
    inputs = _inputs("unet-conditional", net)
    expected = _call(net, inputs)
    fastdiff.accelerate(net, strict=True)
    for device in ("cpu", "cuda", "cpu"):
        got = _call(net.to(device), _to(inputs, device))
        assert got.device.type == device and relative_error(got.cpu(), expected) < 1e-5


@pytest.mark.gpu
def test_a_network_on_a_gpu_is_not_captured_twice():
    net = fastdiff.accelerate(_build("dit").to("cuda"), "bf16")
    sampler = fastdiff.Sampler(net, prediction="eps")
    with pytest.raises(RuntimeError, match="graph=False"):
        sampler.sample((1, 1, 32, 32), cond={"class_labels": torch.tensor([3])}, steps=3, graph=True, device="cuda")


@pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")
def test_graphs_serve_what_programs_serve(monkeypatch):
    """The same numbers, contexts and changes of weights where graphs take the place of programs."""
    from fastdiff import program
    from fastdiff.ops.memory import Arena

    class Replay:
        def __init__(self, body, device, pool):
            self.replay = body
            body()

    name = "unet-conditional"
    plain, graphed = (fastdiff.accelerate(_build(name), "bf16", strict=True) for _ in range(2))
    calls = [_inputs(name, plain, seed) for seed in (0, 1, 0)]
    expected = [_call(plain, inputs) for inputs in calls]
    monkeypatch.setattr(program, "StepGraph", Replay)
    monkeypatch.setattr(Arena, "pool", None)
    for module in ("running", "encoded"):
        monkeypatch.setattr(f"fastdiff.models.lower.{module}.record", program.GraphProgram)
    assert all(torch.equal(_call(graphed, inputs), want) for inputs, want in zip(calls, expected, strict=True))
