"""Quantizes the bundled DiT to int8, saves it, loads it, and compares pictures: `python examples/quantize_save_load.py FOLDER`."""

import sys
import tempfile

import torch

import fastdiff
from fastdiff.quantized import conditions, sampler_of

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()


def pictures(model) -> torch.Tensor:
    return sampler_of(model).sample((4, 1, 32, 32), **conditions(model, range(4)), solver="dpmpp-2m", steps=10, seed=5)


model = fastdiff.load("bundled:dit")
plain = pictures(model)
made = fastdiff.quantize(model, "w8a8")
quantized = pictures(model)
print(f"weights: {made.nbytes / 1e6:.1f} MB; saved as {fastdiff.save(model, made, folder)}")

loaded = fastdiff.load(folder)
print("loaded pictures have the same bits:", torch.equal(pictures(loaded), quantized))
noise = (quantized - plain).square().mean()
print(f"against float32: {10 * torch.log10(plain.square().mean() / noise):.1f} dB")
