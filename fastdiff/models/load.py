"""Read a model from a folder in diffusers' layout, or a bundled one by name."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from .checkpoint import read_checkpoint
from .classifier import Classifier, ClassifierConfig
from .dit import DiT, DiTConfig
from .header import CheckpointError
from .unet import UNet, UNetConfig

Tensor = torch.Tensor
Table = dict[str, tuple[type, Callable[[Any], nn.Module]]]

BUNDLED = Path(__file__).parent / "bundled"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_CONFIG = 1 << 20
# class name in config.json -> its configuration and its network
MODELS: Table = {
    "DiTTransformer2DModel": (DiTConfig, DiT),
    "UNet2DModel": (UNetConfig, UNet),
}
CLASSIFIERS = {"Classifier": (ClassifierConfig, Classifier)}
# prediction_type of a scheduler_config.json -> key of process.PREDICTIONS
PREDICTION_TYPES = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network in evaluation mode and what sampling needs to know about it.

    prediction        what the network returns: `noise`, `data`, `v` or `flow`
    scheduler_config  the scheduler_config.json, empty where the folder has none
    name              as given to `load_model`
    """

    net: nn.Module
    config: DiTConfig | UNetConfig
    prediction: str
    scheduler_config: dict[str, Any]
    name: str

    @property
    def channels(self) -> int:
        return self.config.in_channels

    @property
    def size(self) -> int | None:
        """Side of the images, None where the configuration leaves it open."""
        return self.config.sample_size

    @property
    def num_classes(self) -> int | None:
        """Number of classes; that number itself is the label for no class. None for an unconditional model."""
        return getattr(self.config, "num_embeds_ada_norm", None)


def load_model(path_or_name: str | os.PathLike, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Read a model and its scheduler settings; the weights are cast to `dtype`.

    path_or_name  `bundled:dit`, `bundled:unet`, a folder with `transformer` or `unet` in it, or that inner folder

    Nothing in the folder can run code or lead out of it: names are fixed, symlinks are refused. Raises CheckpointError
    for weights and ValueError for settings that are wrong or not supported.
    """
    inner, scheduler = model_folders(path_or_name)
    with ModelFolder(inner) as files:
        net, config = _load_network(files, MODELS, dtype)
    settings = scheduler_settings(scheduler)
    return LoadedModel(net, config, prediction_of(settings), settings, str(path_or_name))


def model_folders(path_or_name: str | os.PathLike) -> tuple[Path, Path]:
    """The folder of the network's files and that of the scheduler's settings, which may not exist."""
    folder = _find_folder(str(path_or_name))
    parts = [part for part in ("transformer", "unet") if (folder / part).is_dir()]
    if len(parts) > 1:
        raise ValueError(f"load_model: {folder} has both transformer and unet; give one of them")
    return (folder / parts[0], folder / "scheduler") if parts else (folder, folder.parent / "scheduler")


def scheduler_settings(folder: Path) -> dict[str, Any]:
    """The scheduler_config.json of the folder, empty where there is no folder."""
    if not folder.is_dir():
        return {}
    with ModelFolder(folder) as files:
        return files.read_json("scheduler_config.json")


def load_classifier(folder: str | os.PathLike = BUNDLED / "classifier") -> Classifier:
    """Read the classifier whose features `bench.quality` compares, in float32."""
    with ModelFolder(Path(folder)) as files:
        return _load_network(files, CLASSIFIERS, torch.float32)[0]


def load_weights(net: nn.Module, tensors: dict[str, Tensor], file: str | os.PathLike, dtype: torch.dtype) -> None:
    """Fill `net` with the tensors; CheckpointError names the first that is missing, left over or of another shape."""
    expected = net.state_dict()
    for name, target in expected.items():
        if name not in tensors:
            raise CheckpointError("missing", name, file)
        if tensors[name].shape != target.shape:
            shapes = f"{tuple(target.shape)}, got {tuple(tensors[name].shape)}"
            raise CheckpointError(f"shape must be {shapes}", name, file)
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"dtype must be floating-point, got {tensors[name].dtype}", name, file)
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(f"{len(extra)} tensors that the model does not have, this is the first", extra[0], file)
    net.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)


class ModelFolder:
    """Opens regular files of one folder by plain name, relative to its descriptor and without following links."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "ModelFolder":
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def open(self, name: str) -> BinaryIO:
        path = self.path / name
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise CheckpointError("file name must be a plain name inside the folder", file=self.path)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            raise CheckpointError("no such file", file=path) from None
        except OSError as error:
            hint = "symlinks are refused: copy the folder with cp -rL"
            raise CheckpointError(f"cannot be opened ({error.strerror}); {hint}", file=path) from None
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise CheckpointError("not a regular file", file=path)
        return open(fd, "rb", buffering=0)

    def read_json(self, name: str) -> dict[str, Any]:
        with self.open(name) as file:
            raw = file.read(MAX_CONFIG + 1)
        if len(raw) > MAX_CONFIG:
            raise CheckpointError(f"larger than {MAX_CONFIG} bytes", file=self.path / name)
        try:
            values = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"not valid JSON ({type(error).__name__})", file=self.path / name) from None
        if not isinstance(values, dict):
            raise CheckpointError("must hold a JSON object", file=self.path / name)
        return values


def _find_folder(name: str) -> Path:
    if name.startswith("bundled:"):
        known = [f"bundled:{path.parent.name}" for path in sorted(BUNDLED.glob("*/scheduler"))]
        if name not in known:
            raise ValueError(f"load_model: {name} is not bundled; known are {', '.join(known)}")
        return BUNDLED / name.removeprefix("bundled:")
    if not Path(name).is_dir():
        raise ValueError(f"load_model: {name} is no folder; give a folder in diffusers layout or bundled:dit")
    return Path(name)


def _load_network(files: ModelFolder, table: Table, dtype: torch.dtype) -> tuple[Any, Any]:
    values = files.read_json("config.json")
    class_name = values.get("_class_name")
    if not isinstance(class_name, str) or class_name not in table:
        raise ValueError(f"load_model: {files.path}: class {class_name!r} is not supported, only {sorted(table)}")
    config_class, build = table[class_name]
    config = config_class.from_dict(values)
    with files.open(WEIGHTS) as file:
        tensors, _ = read_checkpoint(file, files.path / WEIGHTS)
    # on the meta device, because the configuration is not trusted before its sizes have been compared with the file
    with torch.device("meta"):
        net = build(config)
    load_weights(net, tensors, files.path / WEIGHTS, dtype)
    return net.eval(), config


def prediction_of(settings: dict[str, Any]) -> str:
    """What the network predicts according to a scheduler_config.json, a key of process.PREDICTIONS."""
    kind = settings.get("prediction_type", "epsilon")
    if "FlowMatch" in str(settings.get("_class_name")):
        return "flow"
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"load_model: prediction_type {kind!r} is not supported, only {sorted(PREDICTION_TYPES)}")
    return PREDICTION_TYPES[kind]
