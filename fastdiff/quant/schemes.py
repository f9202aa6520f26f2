"""How one layer is quantized: frozen settings. Nothing here needs torch."""

from dataclasses import dataclass
from typing import Any

# number format -> bits of one code
DTYPES = {"int8": 8, "int4": 4, "uint8": 8, "uint4": 4, "fp8_e4m3": 8, "nf4": 4, "nvfp4": 4, "mxfp4": 4}
FLOATING = ("fp8_e4m3", "nf4", "nvfp4", "mxfp4")
GRANULARITIES = ("tensor", "channel", "token", "group")
RANGES = ("absmax", "signed", "nested", "mse", "percentile")
ROUNDINGS = ("rtn", "gptq", "adaround")


def one_of(what: str, value: Any, known: Any) -> None:
    """Raises ValueError with the known keys unless `value` is one of them."""
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True)
class TensorSpec:
    """Number format and range rule of one operand.

    dtype        a key of DTYPES
    granularity  what shares a scale: the whole `tensor`, an output `channel` (weights), a `token` (activations; in a
                 convolution: a sample), or a `group` of `group_size` consecutive inputs
    symmetric    no zero point; asymmetric needs an unsigned dtype
    dynamic      activations: ranges are measured at run time
    per_step     activations: one static range per sampling step
    range        `absmax`, `signed` (the extreme value maps to the lowest code: GGUF's Q4_0), `nested` (scales of groups are 1
                 to 17 times a step of the output: as int8 the codes have one scale per output, as in QServe), `mse` (search
                 for the least L_p error over `grid` ranges), `percentile` (`p` percent of the magnitudes lie inside)
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
        one_of("TensorSpec: dtype", self.dtype, DTYPES)
        one_of("TensorSpec: granularity", self.granularity, GRANULARITIES)
        one_of("TensorSpec: range", self.range, RANGES)
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
        if self.range == "nested" and (self.dtype != "int4" or self.granularity != "group"):
            raise ValueError(f"TensorSpec: range 'nested' is defined for int4 in groups, got {self.dtype}")
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
        one_of("Rotate: kind", self.kind, ("regular_hadamard",))
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
        one_of("Rounding: kind", self.kind, ROUNDINGS)
        if self.iters < 1 or self.batch < 1 or not 0 <= self.warmup < 1:
            raise ValueError("Rounding: iters and batch must be >= 1 and warmup in [0, 1)")


Transform = Smooth | Rotate | LowRank
TRANSFORMS = {"smooth": Smooth, "rotate": Rotate, "lowrank": LowRank}


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized.

    input        None leaves activations in floating point
    transforms   applied in this order before rounding
    split_input  channels of the first part of a concatenated input; the parts have their own weight and input ranges
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
        if self.input is not None:
            _check_input(self.input)
        rotated = any(isinstance(t, Rotate) for t in self.transforms)
        if rotated and any(isinstance(t, LowRank) for t in self.transforms):
            raise ValueError("Scheme: a low-rank branch is not fitted to a rotated weight; use Smooth with LowRank")
        if rotated and self.weight.dtype in FLOATING:
            raise ValueError(
                f"Scheme: rotation lowers the quality of the floating format {self.weight.dtype}; remove it"
            )
        if self.rounding.kind == "gptq" and self.weight.range == "nested":
            raise ValueError("Scheme: gptq chooses the scale of each group when it comes to it; use range 'absmax'")
        if self.rounding.kind != "rtn" and self.weight.dtype in FLOATING:
            raise ValueError(f"Scheme: {self.rounding.kind} needs integer weights, got {self.weight.dtype}")

    def transform(self, kind: type) -> Any:
        """The transform of this type, or None."""
        return next((t for t in self.transforms if isinstance(t, kind)), None)

    @property
    def static_input(self) -> bool:
        """Whether activation ranges are fixed before sampling."""
        return self.input is not None and self.input.is_static

    @property
    def needs_moments(self) -> bool:
        """Whether the weights are chosen by the second moments of the layer's inputs."""
        smooth = self.transform(Smooth)
        return self.rounding.kind == "gptq" or (smooth is not None and smooth.alpha is None)

    @property
    def needs_data(self) -> bool:
        """Whether quantizing a layer this way needs calibration inputs."""
        return self.static_input or self.rounding.kind != "rtn" or self.transform(Smooth) is not None


def _check_input(spec: TensorSpec) -> None:
    """Raises ValueError for ranges that activations cannot have."""
    if spec.granularity == "channel":
        raise ValueError("Scheme: activations cannot be scaled per channel inside a product; use token or tensor")
    if spec.dynamic and spec.granularity not in ("token", "group"):
        raise ValueError(f"Scheme: dynamic activations are scaled per token or group, got {spec.granularity!r}")
    if spec.dtype in ("nf4", "mxfp4") or (spec.dtype == "nvfp4" and not spec.dynamic):
        raise ValueError(
            f"Scheme: activations cannot be in {spec.dtype} with these ranges; use int8, fp8_e4m3 or dynamic nvfp4"
        )
