"""Quantized models on disk: a diffusers folder with `quantization_config`, a report, a picture; and unfinished runs."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.images import grid, save_png
from fastdiff.models.atomic import write_atomic
from fastdiff.models.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from fastdiff.models.header import CheckpointError
from fastdiff.models.load import (
    MODELS,
    WEIGHTS,
    LoadedModel,
    ModelFolder,
    load_model,
    model_folders,
    prediction_of,
    scheduler_settings,
)
from fastdiff.quant import Quantized
from fastdiff.quant.layer import QLayer
from fastdiff.quant.report import to_markdown
from fastdiff.quant.state import KEY, from_tensors, to_tensors

Tensor = torch.Tensor

_PARTS = {"UNet2DModel": "unet"}


def save(model: LoadedModel, made: Quantized, folder: str | os.PathLike) -> Path:
    """Writes the quantized network of `model` as a folder in diffusers' layout; returns the path of its weights.

    Every file is written whole or not at all. The settings are in config.json and in the header of the weights.
    """
    class_name = next(name for name, (config, _) in MODELS.items() if isinstance(model.config, config))
    inner = Path(folder) / _PARTS.get(class_name, "transformer")
    inner.mkdir(parents=True, exist_ok=True)
    tensors, metadata, settings = to_tensors(made)
    save_checkpoint(inner / WEIGHTS, tensors, metadata)
    config = {"_class_name": class_name, **dataclasses.asdict(model.config), KEY: settings}
    write_json(inner / "config.json", config)
    if model.scheduler_config:
        (Path(folder) / "scheduler").mkdir(exist_ok=True)
        write_json(Path(folder) / "scheduler" / "scheduler_config.json", model.scheduler_config)
    return inner / WEIGHTS


def load(path_or_name: str | os.PathLike, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Reads a model that `save` wrote; any other folder or name goes to `load_model`.

    Raises CheckpointError for weights and ValueError for settings that are wrong. `dtype` is that of what is not
    quantized.
    """
    inner, scheduler = model_folders(path_or_name)
    with ModelFolder(inner) as files:
        values = files.read_json("config.json")
        settings = values.pop(KEY, None)
        if settings is None:
            return load_model(path_or_name, dtype)
        with files.open(WEIGHTS) as file:
            tensors, metadata = read_checkpoint(file, inner / WEIGHTS)
    if not isinstance(settings, dict) or values.get("_class_name") not in MODELS:
        raise ValueError(f"load: {inner}: class must be one of {sorted(MODELS)} with an object {KEY}")
    if metadata.get(KEY) != json.dumps(settings, sort_keys=True):
        raise CheckpointError(f"{KEY} differs from that of config.json", file=inner / WEIGHTS)
    config_class, build = MODELS[values["_class_name"]]
    config = config_class.from_dict(values)
    with torch.device("meta"):
        net = build(config)
    from_tensors(net, settings, tensors)
    _fill(net, tensors, inner / WEIGHTS, dtype)
    plain = scheduler_settings(scheduler)
    return LoadedModel(net.eval(), config, prediction_of(plain), plain, str(path_or_name))


def write_report(report: Mapping[str, Any], images: tuple[Tensor, Tensor], folder: str | os.PathLike) -> None:
    """report.json, report.md and grid.png: pictures of the original above those of the quantized network."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.md", [to_markdown(report).encode()])
    rows = [grid(part[:12], columns=min(12, len(part))) for part in images]
    save_png(folder / "grid.png", np.concatenate(rows), {"fastdiff": json.dumps(report)})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON with sorted names, whole or not at all."""
    write_atomic(path, [(json.dumps(values, indent=2, sort_keys=True) + "\n").encode()])


class FolderStore:
    """Keeps the finished blocks of a `quantize` run as checkpoints in a folder."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a block, None when it was not finished."""
        path = self._folder / f"{key}.safetensors"
        return load_checkpoint(path)[0] if path.exists() else None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Writes the tensors of a block, whole or not at all."""
        save_checkpoint(self._folder / f"{key}.safetensors", tensors, {})


def _fill(net: torch.nn.Module, tensors: dict[str, Tensor], file: Path, dtype: torch.dtype) -> None:
    """Fills what is not quantized; names and shapes must be those of the network."""
    expected = net.state_dict()
    wrong = sorted(set(expected) ^ set(tensors))
    if wrong:
        raise CheckpointError("missing, or not in the model", wrong[0], file)
    codes = {f"{name}.{part}" for name, m in net.named_modules() if isinstance(m, QLayer) for part in m.state_dict()}
    for name, target in expected.items():
        if name not in codes and tensors[name].shape != target.shape:
            raise CheckpointError(f"shape must be {tuple(target.shape)}, got {tuple(tensors[name].shape)}", name, file)
        if name not in codes and not tensors[name].is_floating_point():
            raise CheckpointError(f"dtype must be floating-point, got {tensors[name].dtype}", name, file)
    cast = {name: tensor if name in codes else tensor.to(dtype) for name, tensor in tensors.items()}
    net.load_state_dict(cast, assign=True)
