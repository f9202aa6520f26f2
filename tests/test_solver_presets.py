"""Presets: the steps of published codes, against loops in their own variables and against settings of schedulers."""

import numpy as np
import pytest
from scipy.integrate import quad
from solvers_problems import Mixture, execute

from fastdiff.process import VE, VPLinear
from fastdiff.sampler import Sampler
from fastdiff.solvers import PRESETS, SOLVERS, compile_table, solver
from fastdiff.solvers.compat import diffusers_setup
from fastdiff.solvers.compat.verify import PEERS
from fastdiff.solvers.spacing import levels_of_sigmas

SIGMAS = np.append(np.geomspace(20.0, 0.05, 9), 0.0)  # 9 steps: few enough for diffusers to lower the last orders
PROCESS, MIXTURE = VE(), Mixture()
LEVELS = levels_of_sigmas(PROCESS, SIGMAS)
START = SIGMAS[0] * np.array([-1.1, 0.2, 0.9])


def dpmpp_2m(x):
    old = None
    for i, (s, to) in enumerate(zip(SIGMAS[:-1], SIGMAS[1:], strict=True)):
        denoised = MIXTURE.denoise(LEVELS[i], x)
        used = denoised
        h = np.log(s / to) if to else np.inf
        if old is not None and to:
            r = np.log(SIGMAS[i - 1] / s) / h
            used = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x, old = to / s * x - np.expm1(-h) * used, denoised
    return x


def lms(x):
    slopes = []
    for i in range(len(SIGMAS) - 1):
        slopes = [*slopes, (x - MIXTURE.denoise(LEVELS[i], x)) / SIGMAS[i]][-4:]
        places = SIGMAS[i - len(slopes) + 1 : i + 1]
        for j, slope in enumerate(slopes):
            others = np.delete(places, j)
            basis = lambda s, j=j, others=others, places=places: np.prod((s - others) / (places[j] - others))
            x = x + quad(basis, SIGMAS[i], SIGMAS[i + 1], epsrel=1e-10)[0] * slope
    return x


@pytest.mark.parametrize("name, loop", [("dpmpp-2m", dpmpp_2m), ("lms", lms)])
def test_k_diffusion_takes_the_steps_of_its_loops(name, loop):
    made = solver(name, compat="k-diffusion")
    got = execute(compile_table(made, LEVELS, PROCESS).rows, made.history, MIXTURE.denoise, START)
    np.testing.assert_allclose(got, loop(START), rtol=1e-9)


def test_presets_differ_in_short_runs_that_end_with_noise():
    # where the last step ends without noise, it has order 1 in both
    coef = [
        compile_table(solver("dpmpp-2m", compat=c), LEVELS[:-1], PROCESS).coef for c in ("diffusers", "k-diffusion")
    ]
    np.testing.assert_array_equal(coef[0][:-1], coef[1][:-1])
    assert not np.allclose(coef[0][-1], coef[1][-1], rtol=0.01)


CLASSES = [
    (name, *PEERS[name][0]) for name in PRESETS["diffusers"] if not PEERS[name][0][0].startswith(("EDM", "IPNDM"))
]


@pytest.mark.parametrize("name, class_name, config", CLASSES)
def test_diffusers_presets_have_the_weights_of_the_schedulers(name, class_name, config):
    setup = diffusers_setup(class_name, config, 9, precision="float64")
    made = solver(name, compat="diffusers")
    if class_name == "DPMSolverSinglestepScheduler":
        made = made.with_options(history="data", plan=(3, 3, 2, 1))
    table = compile_table(made, setup.levels, setup.process, setup.prediction, setup.clamp)
    np.testing.assert_allclose(table.coef, setup.table().coef, rtol=1e-12, atol=1e-14)


def test_given_options_go_before_those_of_a_preset():
    assert solver("dpmpp-2m", compat="diffusers", lower_order_below=3).options["lower_order_below"] == 3
    assert solver("deis-3", compat="diffusers").options["order"] == 3


def test_a_batch_may_mix_presets():
    sampler = Sampler(lambda x, t: x, process=VPLinear())
    first, second = sampler.plan(
        2, solver="dpmpp-2m", steps=9, final="t_min", compat=["diffusers", "k-diffusion"]
    ).tables
    assert not np.array_equal(first.coef, second.coef)


def test_presets_name_real_solvers_and_refuse_others():
    assert all(table.keys() <= SOLVERS.keys() for table in PRESETS.values())
    with pytest.raises(ValueError, match="k-diffusion has no such sampler; it has euler"):
        solver("unipc", compat="k-diffusion")
    with pytest.raises(ValueError, match="compat='sd'.*known are diffusers, k-diffusion"):
        solver("ddim", compat="sd")
    with pytest.raises(ValueError, match="needs the solver's name"):
        solver(SOLVERS["ddim"], compat="diffusers")
