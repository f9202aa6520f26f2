"""fastdiff among diffusers' quantization methods: `from_pretrained(..., quantization_config=FastdiffConfig("w8a8"))`.

Importing this registers the method, for models that are quantized as they are loaded, and for those that were saved
quantized, by `save_pretrained` or by `fastdiff.save`.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from fastdiff.models.checkpoint import load_checkpoint
from fastdiff.pipeline.fused_adapters import keep_codes
from fastdiff.quant.config import METHOD
from fastdiff.quant.layer import qlayers
from fastdiff.quant.quantize import quantize
from fastdiff.quant.recipes import RECIPES, recipe_of
from fastdiff.quant.state import KEY, RECORDS, from_tensors, layer_records, to_tensors


class _Method(str, Enum):
    FASTDIFF = METHOD


class FastdiffConfig(QuantizationConfigMixin):
    """How diffusers shall quantize a model with fastdiff.

    recipe  name of a recipe that needs no calibration data, see `fastdiff.quantize`
    spare   patterns (searched in layer names) of layers that stay in floating point

    Saved models carry further entries, the settings of every layer, and are loaded with these. Raises ValueError for an
    unknown recipe, and for one that calibrates: use `fastdiff.quantize` and `fastdiff.save` for those.
    """

    def __init__(self, recipe: str = "w8a8", spare: Sequence[str] = (), **settings: Any) -> None:
        self.quant_method = _Method(settings.pop("quant_method", METHOD))
        self.recipe, self.spare = recipe, tuple(spare)
        self.settings = settings | {"quant_method": METHOD} if settings else None
        if self.settings is None and recipe_of(recipe).calibration is not None:
            free = ", ".join(name for name in RECIPES if recipe_of(name).calibration is None)
            raise ValueError(f"FastdiffConfig: the recipe {recipe!r} needs calibration data; without it work {free}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as config.json holds them."""
        if self.settings is not None:
            return dict(self.settings)
        return {"quant_method": METHOD, "recipe": self.recipe, "spare": list(self.spare)}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: diffusers asks for both."""
        return self.to_dict()


class FastdiffQuantizer(DiffusersQuantizer):
    """What diffusers' loader calls. Scales are never cast, whatever `torch_dtype` says about the rest of the model."""

    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: FastdiffConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[str] = []
        self._stored: set[str] = set()
        if self.pre_quantized and quantization_config.settings is None:
            raise ValueError("FastdiffConfig: the saved model has no settings of its layers; save it again")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Notes the files; keys stay as they are."""
        self._files = list(checkpoint_files or ())
        return loaded_keys

    def check_if_quantized_param(self, model, param_value, param_name: str, state_dict, **kwargs: Any) -> bool:
        """Whether a tensor of the file belongs to a quantized layer."""
        return param_name in self._stored

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: quantized layers came with their tensors."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            tensors: dict[str, torch.Tensor] = {}
            for file in self._files:
                tensors |= load_checkpoint(file)[0]
            from_tensors(model, self.quantization_config.settings, tensors)
            self._stored = {f"{name}.{part}" for name, layer in qlayers(model).items() for part in layer.state_dict()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        if not self.pre_quantized:
            chosen = recipe_of(config.recipe).config
            made = quantize(model, replace(chosen, spared=(*chosen.spared, *config.spare)))
            self.quantization_config = FastdiffConfig(config.recipe, config.spare, **to_tensors(made)[2])
            model.register_to_config(quantization_config=self.quantization_config)
        self._records = layer_records(model)
        keep_codes(model)
        return model

    def get_state_dict_and_metadata(self, state_dict: dict, safe_serialization: bool = False) -> tuple[dict, dict]:
        """The tensors as they are, and the records that a strict reader checks them against."""
        settings = json.dumps(self.quantization_config.to_dict(), sort_keys=True)
        return state_dict, {RECORDS: json.dumps(self._records), KEY: settings}


AUTO_QUANTIZER_MAPPING[METHOD] = FastdiffQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FastdiffConfig
