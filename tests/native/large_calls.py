"""Calls of the memory-bound ops that are large enough for several threads, with sizes that divide nothing."""

import torch


def large_calls(name: str) -> list[tuple]:
    """Argument tuples for an op; none for an op that is not memory-bound."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    vectors = lambda n, *shape: [normal(*shape) for _ in range(n)]
    modulated = ("layer", normal(777), None, 1e-6, normal(3, 777), normal(3, 777))
    image = (None, normal(320), 1e-5, "silu", None, None)
    calls = {
        "copy": [
            (normal(2, 40, 67, 65).permute(0, 2, 3, 1), torch.bfloat16),
            (normal(2, 67, 65, 40).bfloat16().permute(0, 3, 1, 2), torch.bfloat16),
            (normal(5, 70_001), torch.float16),
        ],
        "norm_modulate": [(normal(3, 101, 777), *modulated, torch.bfloat16)],
        "norm_modulate_int8": [(normal(3, 101, 777).bfloat16(), *modulated)],
        "gated_norm_modulate": [(*vectors(2, 3, 101, 777), normal(3, 777), *modulated, torch.float32)],
        "group_norm": [
            (normal(3, 33, 31, 300), normal(3, 33, 31, 20), 32, *image, None, torch.float32),
            (
                normal(1, 65, 64, 64),
                None,
                32,
                *vectors(2, 64),
                1e-5,
                "silu",
                None,
                None,
                torch.tensor([0.02]),
                torch.int8,
            ),
        ],
        "group_norm_nchw": [
            (normal(3, 96, 33, 31), 32, *vectors(2, 96), 1e-5, "silu", None, None, None, torch.bfloat16)
        ],
        "depthwise_conv2d": [(normal(2, 19, 67, 150), normal(9, 150), normal(150), "swiglu", torch.float32)],
        "linear_attention": [(*normal(2, 301, 3, 5, 40).unbind(2), 1e-15)],
        "quantize_rows": [(normal(301, 777),)],
        "activate": [(normal(301, 777), kind) for kind in ("gelu", "gelu_tanh", "silu")],
        "geglu": [(normal(301, 778), kind) for kind in ("geglu", "geglu_tanh", "swiglu")],
        "scale_channels": [(normal(301, 777), normal(777), torch.float32)],
        "resample": [(normal(2, 32, 33, 67), kind) for kind in ("nearest2x", "average2x")],
        "qk_norm_rope": [
            (normal(2, 301, 6, 72), normal(72), 1e-6, *vectors(2, 301, 72), pairs, torch.float32)
            for pairs in (True, False)
        ],
    }
    return calls.get(name, [])
