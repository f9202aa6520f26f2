"""Small convolutional classifier whose features measure how close two sets of images are."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .embeddings import check_integers, config_from_dict

Tensor = torch.Tensor


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the classifier."""

    in_channels: int = 1
    sample_size: int = 32
    widths: tuple[int, ...] = (32, 64, 128)
    features: int = 128
    num_classes: int = 10

    FIXED: ClassVar[dict[str, tuple]] = {}

    def __post_init__(self) -> None:
        if not isinstance(self.widths, tuple) or not 1 <= len(self.widths) <= 8:
            raise ValueError(f"ClassifierConfig: widths must be a list of 1 to 8 integers, got {self.widths!r}")
        check_integers(
            "ClassifierConfig",
            4096,
            in_channels=self.in_channels,
            sample_size=self.sample_size,
            features=self.features,
            num_classes=self.num_classes,
            **{f"widths[{i}]": width for i, width in enumerate(self.widths)},
        )
        if any(width % 8 for width in self.widths) or self.sample_size % 2 ** len(self.widths):
            raise ValueError(
                "ClassifierConfig: widths must be multiples of 8 and sample_size a multiple of "
                f"2^{len(self.widths)}, got {self.widths} and {self.sample_size}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ClassifierConfig":
        """Read a config.json; ValueError names the first entry that is not supported."""
        return config_from_dict(cls, values)


class Classifier(nn.Module):
    """Convolutions with halved resolution after each, a feature vector, class scores."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        ins = (config.in_channels, *config.widths)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(ins, config.widths, strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in config.widths)
        side = config.sample_size // 2 ** len(config.widths)
        self.to_features = nn.Linear(ins[-1] * side**2, config.features)
        self.to_scores = nn.Linear(config.features, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return what the last layer sees, before its activation.

        x        `[B, in_channels, sample_size, sample_size]` in [-1, 1]
        returns  `[B, features]`
        """
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return self.to_features(x.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores `[B, num_classes]`, before the softmax."""
        return self.to_scores(F.relu(self.features(x)))
