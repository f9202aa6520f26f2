"""Tiny networks, schemes and inputs that the tests of quantization share."""

import dataclasses

import torch
from torch import nn

from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.models.load import LoadedModel
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.quant import CalibrationSet, LowRank, Rotate, Rounding, Scheme, Smooth, TensorSpec
from fastdiff.quant.recipes import Recipe, recipe_of

INT8, TOKEN = TensorSpec("int8"), TensorSpec("int8", "token", dynamic=True)
TENSOR = TensorSpec("int8", "tensor")
W4 = TensorSpec("int4", "group", 32)
SPARED = ("^conv_in$", "^conv_out$", "pos_embed", "proj_out_2")
SCHEMES = {
    "w8a8": Scheme(INT8, TOKEN, (Rotate(64),)),
    "w8a8-static": Scheme(INT8, dataclasses.replace(TENSOR, per_step=True)),
    "w8a16": Scheme(INT8),
    "w4a16": Scheme(dataclasses.replace(W4, range="signed")),
    "w4a8": Scheme(W4, TOKEN, (Rotate(64),)),
    "w4a8-svd": Scheme(W4, TOKEN, (Smooth(None), LowRank(4))),
    "w4a4": Scheme(W4, TensorSpec("int4", "group", 32, dynamic=True)),
    "fp8": Scheme(TensorSpec("fp8_e4m3"), TensorSpec("fp8_e4m3", "token", dynamic=True)),
    "u4": Scheme(TensorSpec("uint4", symmetric=False, range="mse"), TensorSpec("uint8", "tensor", symmetric=False, per_step=True)),
    "gptq": Scheme(W4, None, (), Rounding("gptq")),
}  # fmt: skip
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon"}


def tiny_unet() -> UNet:
    torch.manual_seed(1)
    sizes = dict(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1)
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return UNet(UNetConfig(**sizes, **blocks, attention_head_dim=8, norm_num_groups=4)).eval()


def tiny_dit() -> DiT:
    torch.manual_seed(2)
    config = DiTConfig(4, 16, 1, None, 2, True, 8, 2, 10)
    return DiT(config).eval()


NETS = {"unet": tiny_unet, "dit": tiny_dit}


def inputs(name: str, n: int = 12) -> CalibrationSet:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    t = torch.tensor([900.0, 500.0, 100.0]).repeat(n // 3)
    cond = {"class_labels": torch.arange(n) % 10} if name == "dit" else {}
    return CalibrationSet(x, t, cond)


def output(net: nn.Module, data: CalibrationSet) -> torch.Tensor:
    with torch.no_grad():
        return net(data.x, data.t, **data.cond)


def model(name: str) -> LoadedModel:
    net = NETS[name]()
    net.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})
    return LoadedModel(net, net.config, "noise", SCHEDULER, f"tiny {name}")


def quick(recipe: str) -> Recipe:
    made = recipe_of(recipe).with_iterations(3)
    return dataclasses.replace(made, calibration=made.calibration and dataclasses.replace(made.calibration, samples=2, steps=3))  # fmt: skip


def run(made: LoadedModel) -> torch.Tensor:
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([999.0, 500.0, 3.0])
    more = {} if made.num_classes is None else {"class_labels": torch.tensor([1, 2, 10])}
    with torch.no_grad():
        return made.net(x, t, **more)
