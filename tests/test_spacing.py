"""Spacings against published lists, their defining properties, and diffusers' own grids."""

import diffusers
import numpy as np
import pytest
from scipy import stats

from fastdiff.process import VE, Flow, TrigFlow, VPCosine, VPDiscrete, VPLinear, discrete_alphas
from fastdiff.solvers.spacing import SPACINGS, levels, levels_of_sigmas
from fastdiff.solvers.spacing_tables import AYS

SD = VPDiscrete(alphas_cumprod=discrete_alphas("scaled_linear", 0.00085, 0.012))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def times(*args, **kwargs):
    return np.array([level.time for level in levels(*args, **kwargs)])


def kappas(*args, **kwargs):
    return np.array([level.kappa for level in levels(*args, **kwargs)])


def test_karras_list():
    got = kappas(VE(), 10, "karras")
    want = [80, 42.4152, 21.1087, 9.7232, 4.0661, 1.5017, 0.47, 0.1166, 0.0204, 0.002, 0.0]
    np.testing.assert_allclose(got, want, atol=6e-5)
    ends = kappas(VE(), 10, "karras", "t_min")
    assert ends[0] == pytest.approx(80.0) and ends[-1] == 0.002 and ends[-2] > 0.003


def test_shifts():
    t = [level.t for level in levels(Flow(), 4, "shift")]
    np.testing.assert_allclose(t, [1.0, 0.9, 0.75, 0.5, 0.0], rtol=1e-15)
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        t = [level.t for level in levels(Flow(), 4, "shift", tokens=tokens)]
        s = np.exp(mu)
        np.testing.assert_allclose(t, [s * u / (1 + (s - 1) * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)], rtol=1e-14)
    np.testing.assert_allclose([level.t for level in levels(Flow(), 4, "uniform")], [1.0, 0.75, 0.5, 0.25, 0.0])


def test_align_your_steps():
    sd1 = kappas(SD, 10, "ays")
    np.testing.assert_allclose(sd1[[0, 1, 9, 10]], [14.6146, 6.4746, 0.1515, 0.0], rtol=1e-9)
    twenty = kappas(SD, 20, "ays")
    assert twenty[2] == pytest.approx(6.4746) and twenty[1] == pytest.approx((14.6146 * 6.4746) ** 0.5)
    svd = kappas(VE(edm=True), 10, "ays", table="svd")
    assert svd[0] == pytest.approx(700.0) and svd[9] == pytest.approx(0.034)
    with pytest.raises(ValueError, match="sd1, sdxl, svd"):
        levels(SD, 10, "ays", table="sd3")


def test_align_your_steps_are_the_levels_of_the_published_times():
    schedules = diffusers.schedulers.AysSchedules
    for table, name in (("sd1", "StableDiffusionTimesteps"), ("sdxl", "StableDiffusionXLTimesteps")):
        published = [level.kappa for level in SD.levels(np.array(schedules[name], dtype=np.float64))]
        # the table has four decimals
        np.testing.assert_allclose(AYS[table][:10], published, rtol=3e-4)
    assert list(AYS["svd"][:10]) == schedules["StableDiffusionVideoSigmas"][:10]


def test_uniform_lambda_and_exponential_are_geometric_in_kappa():
    for name in ("uniform-lambda", "exponential"):
        k = kappas(VPLinear(), 9, name, "t_min")
        ends = VPLinear().levels([VPLinear().t_max, VPLinear().t_min])
        np.testing.assert_allclose(np.diff(np.log(k)), np.log(ends[1].kappa / ends[0].kappa) / 9, rtol=1e-11)
    rho2 = np.log(kappas(VE(), 5, "polyexponential", rho=2.0)[:-1] / 0.002) / np.log(80 / 0.002)
    np.testing.assert_allclose(rho2, np.linspace(1, 0, 5) ** 2, atol=1e-13)


def test_beta_quantiles_against_scipy():
    t = [level.t for level in levels(VPLinear(), 12, "beta")][:-1]
    np.testing.assert_allclose(t, stats.beta.ppf(1.0 - np.arange(12) / 12, 0.6, 0.6), rtol=1e-12)
    t = [level.t for level in levels(VPLinear(), 7, "beta", a=2.0, b=0.3)][:-1]
    np.testing.assert_allclose(t, stats.beta.ppf(1.0 - np.arange(7) / 7, 2.0, 0.3), rtol=1e-11)


def test_a_process_without_signal_starts_where_signal_mirrors_the_end():
    for process in (Flow(), TrigFlow()):
        k = kappas(process, 8, "uniform-lambda")
        assert k[0] * k[-2] == pytest.approx(1.0, rel=1e-9) and k[-1] == 0.0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 999, 1000])
def test_training_steps_equal_diffusers(spacing, steps):
    for offset in (0, 1) if spacing == "leading" and steps <= 50 else (0,):
        scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(steps)
        options = {"offset": offset} if spacing == "leading" else {}
        got = SPACINGS[spacing](SD, steps, **options)
        np.testing.assert_array_equal(got, scheduler.timesteps.numpy())


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_training_steps_of_the_dpm_schedulers(spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, timestep_spacing=spacing)
    for steps in (5, 20, 33):
        scheduler.set_timesteps(steps)
        np.testing.assert_array_equal(SPACINGS[spacing](SD, steps, skip_last=True), scheduler.timesteps.numpy())


@pytest.mark.parametrize(
    "spacing, flags",
    [
        ("karras", {"use_karras_sigmas": True}),
        ("exponential", {"use_exponential_sigmas": True}),
        ("beta-sigma", {"use_beta_sigmas": True}),
    ],
)
def test_sigma_grids_equal_diffusers(spacing, flags):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace", **flags)
    scheduler.set_timesteps(12)
    made = levels(SD, 12, spacing, interpolation="log-sigma")
    np.testing.assert_allclose([level.kappa for level in made], scheduler.sigmas.numpy(), rtol=3e-5, atol=1e-7)
    np.testing.assert_allclose([level.time for level in made][:-1], scheduler.timesteps.numpy(), rtol=2e-4, atol=2e-2)


def test_levels_of_sigmas_keep_sigmas_exactly():
    given = [12.0, 3.0, 0.7, 0.1, 0.0]
    for options in ({}, {"interpolation": "log-sigma"}, {"rounded_time": True}):
        made = levels_of_sigmas(SD, given, **options)
        np.testing.assert_allclose([level.kappa for level in made], given, rtol=1e-9)
        assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1.0, abs=1e-9) for level in made)
    rounded = [level.time for level in levels_of_sigmas(SD, given, "log-sigma", rounded_time=True)]
    assert rounded == list(np.rint(rounded))
    # between two training steps: log sigma is interpolated linearly in the step
    low, high = (level.kappa for level in SD.levels([500.0, 501.0]))
    (middle,) = levels_of_sigmas(SD, [(low * high) ** 0.5], "log-sigma")
    assert middle.time == pytest.approx(500.5, abs=1e-9)


def test_explicit_values():
    np.testing.assert_array_equal(times(SD, None, [900.0, 500, 100]), [900.0, 500.0, 100.0, 0.0])
    np.testing.assert_array_equal(times(SD, 3, "timesteps", timesteps=[900, 500, 100]), [900.0, 500.0, 100.0, 0.0])
    np.testing.assert_allclose(kappas(VE(), None, "sigmas", sigmas=[8.0, 1.0, 0.0]), [8.0, 1.0, 0.0])
    np.testing.assert_array_equal([level.t for level in levels(Flow(), None, [0.9, 0.4, 0.0])], [0.9, 0.4, 0.0])
    rising = levels(VPLinear(), None, [0.1, 0.5, 0.9], final="given")
    assert [level.t for level in rising] == [0.1, 0.5, 0.9]


@pytest.mark.parametrize("name", [name for name in SPACINGS if name not in ("timesteps", "sigmas")])
@pytest.mark.parametrize(
    "process", [VPLinear(), VPCosine(), SD, VE(), Flow(), TrigFlow()], ids=lambda p: type(p).__name__
)
def test_every_spacing_falls_and_ends_where_it_says(name, process):
    for steps in (1, 2, 13):
        for final in ("zero", "t_min"):
            if name in ("leading", "trailing", "linspace") and not isinstance(process, VPDiscrete):
                with pytest.raises(ValueError, match="training steps"):
                    levels(process, steps, name, final)
                continue
            if name == "shift" and not isinstance(process, Flow):
                with pytest.raises(ValueError, match="Flow"):
                    levels(process, steps, name, final)
                continue
            if name in ("leading", "linspace") and final == "t_min":
                with pytest.raises(ValueError, match="monotonic"):  # the last call is already at t_min
                    levels(process, steps + 1, name, final)
                continue
            made = levels(process, steps, name, final)
            assert len(made) == steps + 1
            assert all(a.kappa > b.kappa for a, b in zip(made[:-1], made[1:], strict=True))
            assert made[-1].sigma == 0.0 if final == "zero" else made[-1].t == process.t_min


BAD = {
    "no steps": ((VPLinear(), 0), {}, "positive integer"),
    "half a step": ((VPLinear(), 2.5), {}, "positive integer"),
    "unknown name": ((VPLinear(), 4, "karas"), {}, "karras, exponential"),
    "unknown end": ((VPLinear(), 4, "karras", "end"), {}, "zero, t_min, given"),
    "more steps than training": ((SD, 1001, "trailing"), {}, "at most 1000"),
    "rising times": ((VPLinear(), None, [0.1, 0.5]), {}, "monotonic"),
    "repeated sigmas": ((VE(), None, "sigmas"), {"sigmas": [2.0, 2.0, 1.0]}, "monotonic"),
    "negative sigma": ((VE(), None, "sigmas"), {"sigmas": [2.0, -1.0]}, "non-negative"),
    "infinite sigma": ((VE(), None, "sigmas"), {"sigmas": [np.inf, 1.0]}, "finite"),
    "negative time": ((SD, None, [900.0, -0.2]), {}, "non-negative"),
    "infinite time": ((SD, None, [np.inf, 1.0]), {}, "finite"),
    "no times": ((SD, None, ["a"]), {}, "vector"),
    "unknown option": ((VE(), 4, "karras"), {"rh": 7.0}, "no option 'rh'; known are rho, sigma_min"),
    "option without a use": ((SD, 4, "trailing"), {"rho": 7.0}, "no option 'rho'; known are none"),
    "zero rho": ((VE(), 4, "karras"), {"rho": 0.0}, "rho of spacing 'karras' must be a positive"),
    "rho in words": ((VE(), 4, "karras"), {"rho": "x"}, "positive number"),
    "no count": ((VPLinear(), None, "karras"), {}, "needs a number of steps"),
    "no sigmas": ((VE(), None, "sigmas"), {}, r"sigmas=\[...\]"),
    "nan time": ((VPLinear(), None, [0.9, np.nan]), {}, "NaN"),
    "empty times": ((VPLinear(), None, []), {}, "at least one"),
    "matrix": ((VPLinear(), None, [[0.9]]), {}, "vector"),
    "interpolation": ((SD, 4, "karras"), {"interpolation": "linear"}, "log-sigma"),
    "log-sigma elsewhere": ((VE(), 4, "karras"), {"interpolation": "log-sigma"}, "VPDiscrete"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_spacings_say_what_is_wrong(case):
    args, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        levels(*args, **options)
