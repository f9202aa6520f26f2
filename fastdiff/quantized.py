"""Quantizing a loaded model by a recipe, and measuring it against the original: what the command line does."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastdiff.carry import Carry, Hook
from fastdiff.models.load import LoadedModel
from fastdiff.ops.solver_step import COEF
from fastdiff.quant import QuantConfig, Quantized
from fastdiff.quant import quantize as quantize_network
from fastdiff.quant.calibration import SETS, CalibrationSet
from fastdiff.quant.config import encode
from fastdiff.quant.correction import NAME, EpsCorrection, predictions
from fastdiff.quant.evaluate import check_gate, evaluate, frechet, layer_sqnr_db
from fastdiff.quant.measures import sqnr_db
from fastdiff.quant.quantize import Store
from fastdiff.quant.recipes import Calibration, Recipe, recipe_of
from fastdiff.quant.report import describe, layer_to_spare
from fastdiff.sampler import Sampler
from fastdiff.solvers.compat import process_of

Tensor = torch.Tensor

_LAYER_SAMPLES = 4  # trajectories that the output of every layer is compared on


def sampler_of(model: LoadedModel) -> Sampler:
    """A sampler for the model's own process and prediction."""
    return Sampler(model.net, prediction=model.prediction, process=process_of(model.scheduler_config))


def conditions(model: LoadedModel, rows: Sequence[int]) -> dict[str, Any]:
    """`cond` for these samples: the classes take turns; nothing for an unconditional model."""
    if model.num_classes is None:
        return {}
    return {"cond": {"class_labels": torch.tensor([row % model.num_classes for row in rows])}}


def calibrate(model: LoadedModel, wanted: Calibration, seed: int = 0) -> CalibrationSet:
    """Draws the calibration set of a recipe with the model itself."""
    if wanted.kind not in SETS:
        raise ValueError(f"calibrate: unknown kind {wanted.kind!r}; known are {', '.join(SETS)}")
    shape = (wanted.samples, model.channels, model.size, model.size)
    settings = {
        "solver": wanted.solver,
        "steps": wanted.steps,
        "seed": seed,
        **conditions(model, range(wanted.samples)),
    }
    return SETS[wanted.kind](sampler_of(model), shape, **settings, **dict(wanted.options))


class GateError(RuntimeError):
    """A quantized network fails its gate; `layer` is the one to spare first. The network has its original layers."""

    def __init__(self, reason: str, layer: str | None) -> None:
        super().__init__(f"quantize: {reason}; spare {layer} first" if layer else f"quantize: {reason}")
        self.layer = layer


def quantize(
    target: Any,
    recipe: str | Recipe | QuantConfig = "w8a8",
    data: CalibrationSet | None = None,
    *,
    gate: float | None = None,
    seed: int = 0,
    keep_originals: bool = False,
) -> Quantized:
    """Quantizes a network in place.

    target  a LoadedModel, a module, or a diffusers pipeline (its `transformer` or `unet`)
    data    what the network is called with; a LoadedModel draws the recipe's own set, others need it where the recipe
            calibrates
    gate    least signal-to-noise ratio in dB of the outputs over `data`; GateError puts the layers back
    """
    recipe = recipe_of(recipe)
    if isinstance(target, LoadedModel):
        data = calibrate(target, recipe.calibration or Calibration(samples=4), seed) if data is None else data
        target = target.net
    net = next(
        (part for part in (getattr(target, n, None) for n in ("transformer", "unet")) if part is not None), target
    )
    if not isinstance(net, torch.nn.Module):
        raise TypeError(f"quantize: a module, a pipeline or a LoadedModel expected, got {type(target).__name__}")
    if gate is None:
        return quantize_network(net, recipe.config, data, keep_originals=keep_originals)
    if data is None:
        raise ValueError("quantize: the gate compares outputs over calibration data; give data=")
    before = predictions(net, data)
    made = quantize_network(net, recipe.config, data, keep_originals=True)
    reached = sqnr_db(before, predictions(net, data))
    if not reached >= gate:
        report = describe(made)
        made.undo()
        raise GateError(f"outputs reach {reached:.2f} dB, the gate is {gate:g} dB", layer_to_spare(report))
    if not keep_originals:
        made.forget_originals()
    return made


def quantize_model(
    model: LoadedModel,
    recipe: str | Recipe,
    data: CalibrationSet | None = None,
    *,
    seed: int = 0,
    spare: Sequence[str] = (),
    store: Store | None = None,
    keep_originals: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Quantized:
    """Quantizes the model's network in place; draws the recipe's calibration set unless `data` is given.

    spare  patterns of further layers that stay in floating point
    """
    recipe = recipe_of(recipe)
    if data is None and recipe.calibration is not None:
        data = calibrate(model, recipe.calibration, seed)
    config = replace(recipe.config, spared=(*recipe.config.spared, *spare))
    if data is not None:
        used = {"recipe": recipe.name, "seed": seed, "sha256": data.digest(), "rows": len(data)}
        config = replace(config, calibration=used | encode(recipe.calibration or Calibration()).copy())
    return quantize_network(model.net, config, data, store=store, keep_originals=keep_originals, progress=progress)


def measure(
    reference: LoadedModel,
    quantized: LoadedModel,
    made: Quantized | None = None,
    *,
    samples: int = 16,
    solver: str = "ddim",
    steps: int = 20,
    seed: int = 0,
    gate: dict[str, float] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    real: Tensor | None = None,
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The report of `quantized` against `reference` from equal noise, and both sets of pictures.

    made      what `quantize` returned, for the figures of the layers;  gate  lower bounds on figures of the report
    features  pictures to [B, D], for Frechet distances;  real  pictures that they are to, else the original's
    """
    begin = time.perf_counter()
    shape = (samples, reference.channels, reference.size, reference.size)
    settings = {"solver": solver, "steps": steps, "seed": seed, **conditions(reference, range(samples))}
    report = evaluate(sampler_of(reference), sampler_of(quantized), shape, **settings)
    images = report.pop("images")
    report |= {"model": quantized.name, "reference": reference.name, "samples": samples, "solver": solver}
    report |= {"sampling_steps": steps, "seed": seed, "torch": torch.__version__, "threads": torch.get_num_threads()}
    report |= {} if features is None else frechet(images, features, real)
    report["bytes_reference"] = _bytes(reference.net)
    report["bytes"] = _bytes(quantized.net)
    if made is not None:
        report |= describe(made)
        few = Calibration(samples=_LAYER_SAMPLES, steps=steps, solver=solver, options=(("every", max(1, steps // 4)),))
        names = [record.name for record in made.layers if record.scheme is not None]
        report["output_sqnr_db"] = layer_sqnr_db(
            reference.net, quantized.net, names, calibrate(reference, few, seed + 1), made.steps
        )
    report["failures"] = check_gate(report, gate or {})
    report["spare"] = layer_to_spare(report) if report["failures"] else None
    report["seconds"] = round(time.perf_counter() - begin, 2)
    return report, images


def _bytes(net: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*net.parameters(), *net.buffers()))


class ResidualVariance(Hook):
    """Lets a stochastic solver inject less noise: the variance that quantization has added already (PTQD, He et al. 2023).

    correction  the EpsCorrection of a quantized network; its `var` is what remains of an output's error, per time
    """

    def __init__(self, correction: EpsCorrection) -> None:
        self._correction = correction

    def coefficients(self, carry: Carry, coef: Tensor) -> Tensor:
        """The coefficients [B, 21] of this call with C0 and C1 scaled; a solver without noise is left as it is."""
        time = torch.as_tensor(carry.plan.time[carry.tick]) if carry.time is None else carry.time
        correction = self._correction
        rows = (time.float().reshape(-1, 1).to(correction.times.device) - correction.times).abs().argmin(1)
        of = lambda *names: coef[:, [COEF.index(name) for name in names]]
        # an error of an output reaches the state through the prediction, clamped or not
        reach = (of("B") + of("R")) * of("b0", "b1", "b2", "b3")
        added = reach.square().sum(1) * correction.var[rows].to(coef)
        injected = of("C0", "C1").square().sum(1)
        share = torch.where(
            injected > 0, (1 - added / injected.clamp(min=1e-30)).clamp(min=0), torch.ones_like(injected)
        )
        coef = coef.clone()
        coef[:, [COEF.index("C0"), COEF.index("C1")]] *= share.sqrt()[:, None]
        return coef


def noise_hooks(net: torch.nn.Module) -> tuple[Hook, ...]:
    """`hooks=` for sampling with a quantized network: what its output correction knows about noise, if it has one."""
    correction = getattr(net, NAME, None)
    return () if correction is None else (ResidualVariance(correction),)
