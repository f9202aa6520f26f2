"""What a UNet computes from the timestep and from conditioning that is one vector per row."""

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.models.embeddings import timestep_sinusoid
from fastdiff.models.lower.coded_layers import is_coded
from fastdiff.models.lower.lowered import require

Tensor = torch.Tensor
_CLASS_EMBEDDINGS = (None, "timestep", "identity", "projection", "simple_projection")


class UNetTime:
    """The time projections of all residual blocks of a UNet, next to each other.

    names   the arguments of the UNet's forward that it needs besides the timestep
    """

    def __init__(self, module: nn.Module, resnets: list[nn.Module]) -> None:
        config = module.config
        self._module, self._resnets = module, resnets
        self._class_type = getattr(config, "class_embed_type", None)
        extra = getattr(config, "addition_embed_type", None)
        require(self._class_type in _CLASS_EMBEDDINGS, f"class_embed_type {self._class_type} is not lowered")
        require(extra in (None, "text_time"), f"addition_embed_type {extra} is not lowered")
        wanted = {
            "class_labels": getattr(module, "class_embedding", None) is not None,
            "timestep_cond": getattr(module.time_embedding, "cond_proj", None) is not None,
            "text_embeds": extra == "text_time",
            "time_ids": extra == "text_time",
        }
        self.names = tuple(name for name, needed in wanted.items() if needed)

    def inputs(self, rows: int, given: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        """The arguments in the order of `names`; raises UnsupportedError for one that is missing or not needed."""
        for name, value in given.items():
            require(value is None or name in self.names or name in ("text_embeds", "time_ids"), f"{name} has no use")
        for name in self.names:
            value = given.get(name)
            fits = isinstance(value, Tensor) and value.dim() >= 1 and value.shape[0] == rows
            require(fits, f"{name}: a tensor with {rows} rows is needed")
        return tuple(given[name] for name in self.names)

    def __call__(self, t: Tensor, *inputs: Tensor) -> Tensor:
        """`[R]` timesteps and the inputs of R rows to the projections `[R, columns]`."""
        emb = self._embed(t, dict(zip(self.names, inputs, strict=True)))
        parts = [r.time_emb_proj(emb if getattr(r, "skip_time_act", False) else F.silu(emb)) for r in self._resnets]
        return torch.cat(parts, dim=1)

    def _embed(self, t: Tensor, given: dict[str, Tensor]) -> Tensor:
        module = self._module
        condition = [given["timestep_cond"]] if "timestep_cond" in given else []
        emb = module.time_embedding(self._features(t), *condition)
        if "class_labels" in given:
            emb = self._with_class(emb, given["class_labels"])
        if "time_ids" in given:
            ids = module.add_time_proj(given["time_ids"].flatten()).view(t.shape[0], -1)
            emb = emb + module.add_embedding(torch.cat([given["text_embeds"], ids], dim=1).to(emb.dtype))
        act = getattr(module, "time_embed_act", None)
        return emb if act is None else act(emb)

    def _features(self, t: Tensor) -> Tensor:
        module, config = self._module, self._module.config
        if hasattr(module, "time_proj"):
            features = module.time_proj(t)
        else:
            width = config.block_out_channels[0]
            features = timestep_sinusoid(t, width, config.flip_sin_to_cos, config.freq_shift)
        first = module.time_embedding.linear_1
        return features.to(torch.float32 if is_coded(first) else first.weight.dtype)

    def _with_class(self, emb: Tensor, labels: Tensor) -> Tensor:
        if self._class_type == "timestep":
            labels = self._features(labels)
        classes = self._module.class_embedding(labels).to(emb.dtype)
        if getattr(self._module.config, "class_embeddings_concat", False):
            return torch.cat([emb, classes], dim=1)
        return emb + classes
