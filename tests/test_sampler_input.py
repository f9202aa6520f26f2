"""What the sampler is given: empty batches, and bad input with errors that name it before any work."""

import numpy as np
import pytest
import torch

from fastdiff import Hook, Sampler

SHAPE = (2, 3, 5)


def elementwise_net(x, t, **cond):
    return torch.tanh(x)


def test_an_empty_batch_is_returned_empty():
    assert Sampler(elementwise_net).sample((0, *SHAPE)).shape == (0, *SHAPE)
    guided = {"cond": {"c": torch.zeros(0)}, "negative": {"c": torch.zeros(0)}, "guidance": []}
    assert Sampler(elementwise_net).sample((0, *SHAPE), **guided).shape == (0, *SHAPE)
    tree = Sampler(elementwise_net).sample(x={"a": torch.zeros(0, 3), "b": torch.zeros(0, 2, 2)})
    assert {name: tuple(leaf.shape) for name, leaf in tree.items()} == {"a": (0, 3), "b": (0, 2, 2)}


NAN = {"shift": torch.tensor([0.0, float("nan")])}
BAD = {
    "unknown solver": ({"solver": "dpmpp-9x"}, "dpmpp-2m"),
    "steps": ({"steps": 0}, "steps: must be an integer >= 1"),
    "fractional steps": ({"steps": 2.5}, "steps: must be an integer >= 1"),
    "rows disagree": ({"steps": [3, 4, 5]}, r"steps: one value per sample expected \(2\), got 3"),
    "seeds disagree": ({"seed": [1]}, "seed: one per sample"),
    "rising times": ({"spacing": (0.1, 0.5, 0.9)}, "monotonic"),
    "unknown spacing": ({"spacing": "karas"}, "karras"),
    "NaN conditioning": ({"cond": NAN}, r"cond\['shift'\] holds NaN"),
    "conditioning rows": ({"cond": {"shift": torch.zeros(3)}}, "first dimension 2"),
    "no negative": ({"guidance": 2.0, "cond": {"shift": torch.zeros(2)}}, "negative="),
    "guidance": ({"guidance": float("nan")}, "scale must be finite"),
    "unknown setting": ({"guidence": 2.0}, "unknown setting 'guidence'"),
    "clamp": ({"clamp": (1.0, -1.0)}, "clamp"),
    "clamp kind": ({"clamp": 1.0}, r"clamp: must be \(low, high\)"),
    "shape": ({"shape": (2, -1)}, "shape must be"),
    "shape kind": ({"shape": 5}, "shape must be"),
    "too many steps": ({"steps": 10**9}, "at most 100000 steps"),
    "infinite times": ({"spacing": (float("inf"), 0.5)}, "finite"),
    "spacing option": ({"spacing": {"name": "karras", "rh": 7}}, "no option 'rh'; known are rho"),
    "conditioning kind": ({"cond": torch.zeros(2)}, "cond must map keyword arguments"),
    "negative kind": ({"guidance": 2.0, "negative": [1]}, "negative must map keyword arguments"),
    "conditioning in numpy": ({"cond": {"shift": np.zeros(2)}}, "use torch.from_numpy"),
    "branches disagree in shape": (
        {"guidance": 2.0, "cond": {"shift": torch.zeros(2, 4)}, "negative": {"shift": torch.zeros(2, 5)}},
        r"one shape and dtype.*\[2, 4\].*\[2, 5\]",
    ),
    "branches disagree in dtype": (
        {"guidance": 2.0, "cond": {"shift": torch.zeros(2)}, "negative": {"shift": torch.zeros(2).long()}},
        "one shape and dtype",
    ),
    "branches disagree in values": (
        {"guidance": 2.0, "cond": {"shift": 1.0}, "negative": {"shift": 2.0}},
        "equal other values",
    ),
    "both": ({"x": torch.zeros(2, 3)}, "either shape or x"),
    "state type": ({"shape": None, "x": torch.zeros(2, 3, dtype=torch.int64)}, "floating point"),
    "dtype": ({"dtype": torch.float16}, "float32 or float64"),
    "hooks": ({"hooks": [print]}, "Hook objects"),
    "hook without a list": ({"hooks": Hook()}, "a list of fastdiff.Hook objects"),
    "cancel": ({"cancel": 3}, "threading.Event"),
    "device name": ({"device": "cudaa"}, "must be cpu or cuda"),
    "endpoint kind": ({"aux": 3}, "aux must be finite tensors"),
    "endpoint value": ({"aux": torch.full((2, *SHAPE), float("nan"))}, "aux must be finite tensors"),
    "no solver": ({"solver": None}, "a key of SOLVERS"),
    "compat": ({"compat": "sd"}, "known are diffusers, k-diffusion"),
    "guidance kind": ({"guidance": "high"}, "a number or a CFG"),
    "seed kind": ({"seed": "x"}, "an integer or one integer per sample"),
    "seed fraction": ({"seed": [1, 2.5]}, "an integer or one integer per sample"),
    "state value": ({"shape": None, "x": torch.full((2, 3), float("nan"))}, "x holds NaN"),
    "device kind": ({"device": "meta"}, "must be cpu or cuda"),
    "NaN levels": ({"spacing": (0.9, float("nan"), 0.1)}, "NaN found"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_work(case):
    called = []

    def net(x, t, shift=None):
        called.append(1)
        return x

    arguments, message = BAD[case]
    arguments = {"shape": (2, *SHAPE), **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        Sampler(net).sample(arguments.pop("shape"), **arguments)
    assert not called


def test_a_network_with_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match="outputs like its input"):
        Sampler(lambda x, t: x[:, :1]).sample((2, *SHAPE), solver="ddim", steps=2)
    with pytest.raises(TypeError, match="callable"):
        Sampler("net")
    for prediction in ("epsilon", (1.0, 0.0), 3, (1.0, 0.0, "r")):
        with pytest.raises(ValueError, match="unknown prediction"):
            Sampler(elementwise_net, prediction=prediction)
    for micro_batch in (0, "all"):
        with pytest.raises(ValueError, match="micro_batch must be an integer >= 1"):
            Sampler(elementwise_net, micro_batch=micro_batch)
    with pytest.raises(TypeError, match="process must be"):
        Sampler(elementwise_net, process="vp")
    with pytest.raises(TypeError, match="model_dtype: must be a float"):
        Sampler(elementwise_net, model_dtype=torch.int8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(RuntimeError, match="torch sees no CUDA GPU; use device='cpu'"):
        Sampler(elementwise_net).sample((2, *SHAPE), device="cuda")
