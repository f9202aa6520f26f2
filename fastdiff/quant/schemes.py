"""What is quantized how: frozen settings that survive a round trip through JSON. Nothing here needs torch."""

import dataclasses
import json
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

VERSION = 1
METHOD = "fastdiff"
# number format -> bits of one code
DTYPES = {"int8": 8, "int4": 4, "uint8": 8, "uint4": 4, "fp8_e4m3": 8, "nf4": 4, "nvfp4": 4, "mxfp4": 4}
GRANULARITIES = ("tensor", "channel", "token", "group", "segment")
RANGES = ("absmax", "signed", "mse", "percentile")
ROUNDINGS = ("rtn", "gptq", "adaround")
TEMPORAL_MODES = ("cache", "quantize", "auto", "off")


@dataclass(frozen=True)
class TensorSpec:
    """Number format and range rule of one operand.

    dtype        a key of DTYPES
    granularity  what shares a scale: the whole `tensor`, an output `channel` (weights), a `token` (activations), a
                 `group` of `group_size` consecutive inputs, or each `segment` of a concatenated input
    symmetric    no zero point; asymmetric needs an unsigned dtype
    dynamic      activations: ranges are measured at run time
    per_step     activations: one static range per sampling step
    range        `absmax`, `signed` (the extreme value maps to the lowest code: GGUF's Q4_0), `mse` (search for the least
                 L_p error over `grid` ranges), `percentile` (`p` percent of the magnitudes lie inside)
    """

    dtype: str
    granularity: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    per_step: bool = False
    range: str = "absmax"
    p: float = 2.4
    grid: int = 80

    def __post_init__(self) -> None:
        _one_of("TensorSpec: dtype", self.dtype, DTYPES)
        _one_of("TensorSpec: granularity", self.granularity, GRANULARITIES)
        _one_of("TensorSpec: range", self.range, RANGES)
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("TensorSpec: group_size belongs to granularity 'group', and only to it")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise ValueError(f"TensorSpec: group_size must be a positive integer, got {self.group_size!r}")
        if not self.symmetric and not self.dtype.startswith("uint"):
            raise ValueError(f"TensorSpec: an asymmetric range needs uint8 or uint4, got {self.dtype}")
        if self.dynamic and self.per_step:
            raise ValueError("TensorSpec: a dynamic range has no table per step; set one of dynamic and per_step")
        if self.range == "signed" and self.dtype != "int4":
            raise ValueError(f"TensorSpec: range 'signed' is defined for int4, got {self.dtype}")
        if not isinstance(self.grid, int) or self.grid < 1 or not 0 < self.p <= 100:
            raise ValueError(f"TensorSpec: grid must be >= 1 and p in (0, 100], got {self.grid!r} and {self.p!r}")

    @property
    def bits(self) -> int:
        return DTYPES[self.dtype]

    @property
    def is_static(self) -> bool:
        """Activations: the range is known before sampling and needs calibration data."""
        return not self.dynamic


@dataclass(frozen=True)
class Smooth:
    """Moves magnitude from activation channels to weight columns: s_j = max|x_j|^alpha / max|w_j|^(1 - alpha).

    alpha  a number, or None to search the strength that leaves the least output error
    """

    alpha: float | None = 0.5


@dataclass(frozen=True)
class Rotate:
    """Multiplies inputs and weight columns by an orthogonal block-diagonal matrix: outliers spread over their group.

    group  largest block, a power of 4; a layer uses the largest power of 4 that divides its inputs
    """

    group: int = 256
    kind: str = "regular_hadamard"

    def __post_init__(self) -> None:
        _one_of("Rotate: kind", self.kind, ("regular_hadamard",))
        if self.group < 4 or self.group & (self.group - 1) or self.group.bit_length() % 2 == 0:
            raise ValueError(f"Rotate: group must be a power of 4 from 4 on, got {self.group}")


@dataclass(frozen=True)
class LowRank:
    """Keeps a rank-`rank` part of the weight in floating point; the rest is quantized, `iters` times in turn."""

    rank: int = 32
    iters: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1 or self.iters < 1:
            raise ValueError(f"LowRank: rank and iters must be >= 1, got {self.rank} and {self.iters}")


@dataclass(frozen=True)
class Rounding:
    """How weights become codes: to the nearest, by GPTQ, or learned (AdaRound) with these settings.

    iters, lr, batch  steps, Adam's learning rate and samples per step
    lam, beta, warmup  weight of the term that drives the rounding to 0 or 1, its exponent from..to, share without it
    damp, block        GPTQ: share of the mean diagonal that is added to the Hessian, columns per lazy update
    """

    kind: str = "rtn"
    iters: int = 20000
    lr: float = 1e-3
    batch: int = 32
    lam: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    damp: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        _one_of("Rounding: kind", self.kind, ROUNDINGS)
        if self.iters < 1 or self.batch < 1 or not 0 <= self.warmup < 1:
            raise ValueError("Rounding: iters and batch must be >= 1 and warmup in [0, 1)")


Transform = Smooth | Rotate | LowRank
_TRANSFORMS = {"smooth": Smooth, "rotate": Rotate, "lowrank": LowRank}


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized.

    input        None leaves activations in floating point
    transforms   applied in this order before rounding
    split_input  channels of the first part of a concatenated input; the parts have their own ranges
    """

    weight: TensorSpec
    input: TensorSpec | None = None
    transforms: tuple[Transform, ...] = ()
    rounding: Rounding = Rounding()
    split_input: int | None = None

    def __post_init__(self) -> None:
        if self.weight.granularity not in ("channel", "group"):
            raise ValueError(f"Scheme: weights are scaled per channel or group, got {self.weight.granularity!r}")
        if self.weight.dynamic or self.weight.per_step:
            raise ValueError("Scheme: weights have one static range; unset dynamic and per_step")
        if self.input is not None and self.input.granularity == "channel":
            raise ValueError("Scheme: activations cannot be scaled per channel inside a product; use token or tensor")

    @property
    def needs_data(self) -> bool:
        """Whether quantizing a layer this way needs calibration inputs."""
        static = self.input is not None and self.input.is_static
        return static or self.rounding.kind != "rtn" or any(isinstance(t, Smooth) for t in self.transforms)


@dataclass(frozen=True)
class TemporalPolicy:
    """What happens to the layers that depend on the timestep only (the temporal information block).

    mode  `cache`: left in floating point, their outputs are kept per step; `quantize`; `auto`: per component whichever
          is nearer to floating point; `off`: treated like any other layer
    tiar  learn the rounding of the whole block jointly (TFMQ-DM) when it is quantized
    """

    mode: str = "cache"
    tiar: bool = False

    def __post_init__(self) -> None:
        _one_of("TemporalPolicy: mode", self.mode, TEMPORAL_MODES)


@dataclass(frozen=True)
class QuantConfig:
    """How a whole network is quantized.

    default    the scheme of every linear and convolution layer that nothing below names
    overrides  pattern (searched in the layer's name) and scheme, or None to spare it; the first that matches decides
    spared     patterns of layers that stay as they are, before the overrides
    """

    default: Scheme | None
    overrides: tuple[tuple[str, Scheme | None], ...] = ()
    spared: tuple[str, ...] = ()
    temporal: TemporalPolicy = TemporalPolicy()
    calibration: dict[str, Any] = field(default_factory=dict)

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the layer `name`, None when it stays as it is."""
        if any(re.search(pattern, name) for pattern in self.spared):
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
    names = {cls: name for name, cls in _TRANSFORMS.items()}
    kind = {"transform": names[type(value)]} if type(value) in names else {}
    return kind | {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}


def decode(cls: type, values: Any) -> Any:
    """The settings that `encode` wrote; an entry of a later version is ignored with a warning."""
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: an object expected, got {type(values).__name__}")
    names = {f.name for f in dataclasses.fields(cls)}
    for key in sorted(set(values) - names):
        warnings.warn(f"{cls.__name__}: unknown entry {key!r} is ignored", stacklevel=2)
    known = {key: _decode_field(cls, key, value) for key, value in values.items() if key in names}
    try:
        return cls(**known)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def _decode_field(cls: type, key: str, value: Any) -> Any:
    readers = {
        (Scheme, "weight"): lambda v: decode(TensorSpec, v),
        (Scheme, "input"): lambda v: None if v is None else decode(TensorSpec, v),
        (Scheme, "transforms"): lambda v: tuple(_decode_transform(item) for item in v),
        (Scheme, "rounding"): lambda v: decode(Rounding, v),
        (Rounding, "beta"): tuple,
        (QuantConfig, "default"): _decode_scheme,
        (QuantConfig, "overrides"): lambda v: tuple((str(p), _decode_scheme(s)) for p, s in v),
        (QuantConfig, "spared"): tuple,
        (QuantConfig, "temporal"): lambda v: decode(TemporalPolicy, v),
    }
    return readers.get((cls, key), lambda v: v)(value)


def _decode_scheme(values: Any) -> Scheme | None:
    return None if values is None else decode(Scheme, values)


def _decode_transform(values: dict[str, Any]) -> Transform:
    kind = values.get("transform") if isinstance(values, dict) else None
    _one_of("Scheme: transform", kind, _TRANSFORMS)
    return decode(_TRANSFORMS[kind], {key: value for key, value in values.items() if key != "transform"})


def _one_of(what: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
