"""How a whole network is quantized, and the JSON form of all settings. Nothing here needs torch."""

import dataclasses
import json
import re
import warnings
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from fastdiff.quant.schemes import TRANSFORMS, Rounding, Scheme, TensorSpec, Transform, one_of

VERSION = 1
METHOD = "fastdiff"
TEMPORAL_MODES = ("cache", "quantize", "auto", "off")
ATTENTION = ("float", "int8")


@dataclass(frozen=True)
class TemporalPolicy:
    """What happens to the layers that depend on the timestep only (the temporal information block).

    mode    `cache`: left in floating point, their outputs are kept per step; `quantize`; `auto`: per component whichever
            is nearer to floating point; `off`: treated like any other layer
    scheme  of the block where it is quantized; the rounding `adaround` is learned jointly for the whole block (TFMQ-DM)
    """

    mode: str = "cache"
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        one_of("TemporalPolicy: mode", self.mode, TEMPORAL_MODES)
        if (self.scheme is not None) != (self.mode in ("quantize", "auto")):
            raise ValueError("TemporalPolicy: the modes quantize and auto need a scheme, and only they")


@dataclass(frozen=True)
class QuantConfig:
    """How a whole network is quantized.

    default    the scheme of every linear and convolution layer that nothing below names
    overrides  pattern (searched in the layer's name) and scheme, or None to spare it; the first that matches decides
    spared     patterns of layers that stay as they are, before the overrides
    split_shortcuts  convolutions that read a concatenated input get ranges for either part
    correct_output   the predictable part of the noise is taken off the network's output (PTQD)
    attention        `int8`: codes of queries, of keys less their mean and of values are multiplied; softmax stays in float32
    """

    default: Scheme | None
    overrides: tuple[tuple[str, Scheme | None], ...] = ()
    spared: tuple[str, ...] = ()
    temporal: TemporalPolicy = TemporalPolicy()
    split_shortcuts: bool = False
    correct_output: bool = False
    attention: str = "float"
    calibration: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("QuantConfig: attention", self.attention, ATTENTION)

    def spares(self, name: str) -> bool:
        """Whether the layer stays as it is whatever its kind."""
        return any(re.search(pattern, name) for pattern in self.spared)

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the layer `name`, None when it stays as it is."""
        if self.spares(name):
            return None
        for pattern, scheme in self.overrides:
            if re.search(pattern, name):
                return scheme
        return self.default

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back."""
        return {"quant_method": METHOD, "version": VERSION, **encode(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantConfig":
        """Raises ValueError for another method, a newer version and bad values; unknown entries only warn."""
        if not isinstance(values, dict) or values.get("quant_method") != METHOD:
            raise ValueError(f"QuantConfig: quant_method must be {METHOD!r}")
        version = values.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"QuantConfig: version must be 1 to {VERSION}, got {version!r}; upgrade fastdiff")
        return decode(cls, {k: v for k, v in values.items() if k not in ("quant_method", "version")})

    @classmethod
    def from_json(cls, text: str) -> "QuantConfig":
        return cls.from_dict(json.loads(text))


def encode(value: Any) -> Any:
    """Settings as JSON values; transforms carry their kind."""
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    names = {cls: name for name, cls in TRANSFORMS.items()}
    kind = {"transform": names[type(value)]} if type(value) in names else {}
    return kind | {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}


def decode(cls: type, values: Any) -> Any:
    """The settings that `encode` wrote; an entry of a later version is ignored with a warning."""
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: an object expected, got {type(values).__name__}")
    names = {f.name for f in dataclasses.fields(cls)}
    for key in sorted(set(values) - names):
        warnings.warn(f"{cls.__name__}: unknown entry {key!r} is ignored", stacklevel=2)
    try:
        return cls(**{key: _decode_field(cls, key, value) for key, value in values.items() if key in names})
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def _decode_field(cls: type, key: str, value: Any) -> Any:
    readers = {
        (Scheme, "weight"): lambda v: decode(TensorSpec, v),
        (Scheme, "input"): lambda v: None if v is None else decode(TensorSpec, v),
        (Scheme, "transforms"): lambda v: tuple(_decode_transform(item) for item in v),
        (Scheme, "rounding"): lambda v: decode(Rounding, v),
        (Rounding, "beta"): lambda v: _tuple_of(float, v),
        (TemporalPolicy, "scheme"): _decode_scheme,
        (QuantConfig, "default"): _decode_scheme,
        (QuantConfig, "overrides"): lambda v: tuple((str(p), _decode_scheme(s)) for p, s in v),
        (QuantConfig, "spared"): lambda v: _tuple_of(str, v),
        (QuantConfig, "temporal"): lambda v: decode(TemporalPolicy, v),
    }
    return readers.get((cls, key), lambda v: _plain(cls, key, v))(value)


def _plain(cls: type, key: str, value: Any) -> Any:
    """A value that JSON has as it is; its type must be that of the field. TypeError otherwise."""
    hint = get_type_hints(cls)[key]
    known = tuple(get_origin(t) or t for t in get_args(hint) or (hint,)) if get_origin(hint) is not dict else (dict,)
    if type(value) not in known and not (float in known and type(value) is int):
        raise TypeError(f"{key} must be {' or '.join(t.__name__ for t in known)}, got {value!r:.40}")
    return value


def _tuple_of(kind: type, values: Any) -> tuple:
    if not isinstance(values, (list, tuple)) or any(
        type(v) not in (kind, int if kind is float else kind) for v in values
    ):
        raise TypeError(f"a list of {kind.__name__} expected, got {values!r:.40}")
    return tuple(kind(v) for v in values)


def _decode_scheme(values: Any) -> Scheme | None:
    return None if values is None else decode(Scheme, values)


def _decode_transform(values: dict[str, Any]) -> Transform:
    kind = values.get("transform") if isinstance(values, dict) else None
    one_of("Scheme: transform", kind, TRANSFORMS)
    return decode(TRANSFORMS[kind], {key: value for key, value in values.items() if key != "transform"})
