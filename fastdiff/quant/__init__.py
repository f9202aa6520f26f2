"""Post-training quantization: settings, calibration, the walk over a network, and its layers."""

from fastdiff.quant.calibration import CalibrationSet
from fastdiff.quant.config import QuantConfig, TemporalPolicy
from fastdiff.quant.conv import QConv2d, QSplit
from fastdiff.quant.linear import QLinear
from fastdiff.quant.qtensor import QTensor
from fastdiff.quant.quantize import Quantized, quantize
from fastdiff.quant.schemes import LowRank, Rotate, Rounding, Scheme, Smooth, TensorSpec

__all__ = [
    "CalibrationSet",
    "LowRank",
    "QConv2d",
    "QLinear",
    "QSplit",
    "QTensor",
    "QuantConfig",
    "Quantized",
    "Rotate",
    "Rounding",
    "Scheme",
    "Smooth",
    "TemporalPolicy",
    "TensorSpec",
    "quantize",
]
