"""Models: equal to diffusers' own classes, loading is strict, the bundled weights draw what they should."""

import pytest
import torch

from bench import train
from bench.quality import agreement, features, quality, sample
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.models.embeddings import grid_sinusoid, timestep_sinusoid
from fastdiff.models.load import BUNDLED, load_classifier, load_model
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.quant.perceptual import frechet_distance

DITS = {
    "bundled": {"num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 3, "patch_size": 4},
    "patch 2, learned variance": {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "out_channels": 2},
    "no bias, other eps": {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "attention_bias": False, "norm_eps": 1e-3},
}  # fmt: skip
PLAIN, ATTENTION = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
UNETS = {
    "bundled": ((32, 64, 128), (PLAIN, PLAIN, ATTENTION), {"layers_per_block": 1, "attention_head_dim": 32}),
    "two layers, attention above": ((16, 24, 8), (ATTENTION, PLAIN, PLAIN), {"layers_per_block": 2}),
    "one head, padding 0": ((16, 32), (PLAIN, ATTENTION), {"attention_head_dim": None, "downsample_padding": 0}),
    "DDPM's embedding": ((16, 16), (ATTENTION, ATTENTION), {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}),
    "no attention in the middle": ((16, 32), (PLAIN, PLAIN), {"add_attention": False}),
    "one level": ((16,), (ATTENTION,), {"layers_per_block": 3}),
}  # fmt: skip


def dit_settings(name: str) -> dict:
    return {"in_channels": 1, "sample_size": 32, "num_embeds_ada_norm": 10, **DITS[name]}


def unet_settings(name: str) -> dict:
    widths, kinds, more = UNETS[name]
    sizes = {
        "sample_size": 32,
        "in_channels": 1,
        "out_channels": 1,
        "norm_num_groups": 8,
        "block_out_channels": widths,
    }
    down, up = [kind[0] for kind in kinds], [kind[1] for kind in reversed(kinds)]
    return sizes | {"down_block_types": tuple(down), "up_block_types": tuple(up)} | more


def inputs(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, 32, 32, generator=generator)
    return x, torch.rand(batch, generator=generator) * 999, torch.arange(batch) % 11


def shaken(net: torch.nn.Module) -> torch.nn.Module:
    """Random values in every parameter: norms and biases that start as one or zero would hide a mistake."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return net.eval()


def assert_as_exact(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    assert ours.shape == exact.shape
    # the tolerance rule of this repository
    limit = 2 * (theirs.double() - exact).abs().max() + 1e-6
    assert (ours.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("name", DITS)
@torch.no_grad()
def test_dit_equals_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is what this test compares with")
    theirs = shaken(diffusers.DiTTransformer2DModel(**dit_settings(name)))
    ours = DiT(DiTConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, labels = inputs()
    result, expected = ours(x, t, labels), theirs(x, t, labels).sample
    assert_as_exact(result, expected, ours.double()(x.double(), t, labels))
    assert (result - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_equals_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is what this test compares with")
    theirs = shaken(diffusers.UNet2DModel(**unet_settings(name)))
    ours = UNet(UNetConfig.from_dict(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, _ = inputs()
    result, expected = ours(x, t), theirs(x, t).sample
    assert_as_exact(result, expected, ours.double()(x.double(), t))
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_one_timestep_serves_all_rows():
    x, _, labels = inputs(3)
    dit, unet = shaken(DiT(DiTConfig(**dit_settings("bundled")))), shaken(UNet(UNetConfig(**unet_settings("bundled"))))
    rows = torch.full((3,), 17.0)
    for t in (17, 17.0, torch.tensor(17)):
        assert torch.equal(dit(x, t, labels), dit(x, rows, labels))
        assert torch.equal(unet(x, t), unet(x, rows))


@torch.no_grad()
def test_every_row_has_its_own_time_and_label():
    x, t, labels = inputs(4)
    x = x.double()
    dit = shaken(DiT(DiTConfig(**dit_settings("bundled")))).double()
    unet = shaken(UNet(UNetConfig(**unet_settings("bundled")))).double()
    for b in range(4):
        row = slice(b, b + 1)
        assert (dit(x, t, labels)[row] - dit(x[row], t[row], labels[row])).abs().max() < 1e-12
        assert (unet(x, t)[row] - unet(x[row], t[row])).abs().max() < 1e-12
    assert (dit(x, t, labels) - dit(x, t.flip(0), labels)).abs().max() > 1e-3
    assert (dit(x, t, labels) - dit(x, t, labels.flip(0))).abs().max() > 1e-3


def test_sinusoids_against_the_formula():
    t = torch.tensor([0.0, 1.5, 999.0], dtype=torch.float64)
    table = timestep_sinusoid(t, 6, flip_sin_to_cos=True, freq_shift=1)
    angles = t[:, None] * 10000.0 ** (-torch.arange(3) / 2)
    assert torch.allclose(table.double(), torch.cat((angles.cos(), angles.sin()), 1), atol=1e-4)
    assert timestep_sinusoid(t, 5, flip_sin_to_cos=False, freq_shift=0)[:, 4].tolist() == [0.0] * 3
    grid = grid_sinusoid(8, 3).reshape(3, 3, 8).double()
    for y, x in ((0, 2), (2, 1)):
        expected = [f(at * w) for at in (x, y) for f in (torch.sin, torch.cos) for w in torch.tensor([1.0, 0.01])]
        assert torch.allclose(grid[y, x], torch.stack(expected).double(), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "values", "says"),
    [
        (DiTConfig, {"norm_type": "ada_norm_single"}, "norm_type"),
        (DiTConfig, {"activation_fn": "geglu"}, "gelu-approximate"),
        (DiTConfig, {"num_layers": 0}, "num_layers"),
        (DiTConfig, {"num_layers": 1 << 40}, "num_layers"),
        (DiTConfig, {"num_attention_heads": 65536, "attention_head_dim": 65536}, "heads"),
        (DiTConfig, {"num_attention_heads": 3, "attention_head_dim": 5}, "multiple of 4"),
        (DiTConfig, {"attention_head_dim": True}, "attention_head_dim"),
        (DiTConfig, {"sample_size": 30, "patch_size": 4}, "patch_size"),
        (DiTConfig, {"attention_bias": "yes"}, "attention_bias"),
        (DiTConfig, {"num_embeds_ada_norm": None}, "num_embeds_ada_norm"),
        (DiTConfig, {"caption_channels": 4096}, "caption_channels"),
        (UNetConfig, {"class_embed_type": "timestep"}, "class_embed_type"),
        (UNetConfig, {"time_embedding_type": "fourier"}, "positional"),
        (UNetConfig, {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        (UNetConfig, {"down_block_types": ["SkipDownBlock2D"] * 4}, "AttnDownBlock2D"),
        (UNetConfig, {"up_block_types": ["UpBlock2D"]}, "up_block_types"),
        (UNetConfig, {"block_out_channels": 3}, "block_out_channels"),
        (UNetConfig, {"block_out_channels": []}, "block_out_channels"),
        (UNetConfig, {"norm_num_groups": 33}, "norm_num_groups"),
        (UNetConfig, {"downsample_padding": 2}, "downsample_padding"),
        (UNetConfig, {"norm_eps": 0}, "norm_eps"),
        (UNetConfig, {"flip_sin_to_cos": 1}, "flip_sin_to_cos"),
        (UNetConfig, {"layers_per_block": 10**6}, "layers_per_block"),
    ],
)
def test_config_says_what_is_not_supported(config, values, says):
    with pytest.raises(ValueError, match=says):
        config.from_dict(values)


def test_frechet_distance_against_the_closed_form():
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(base.T.cov()), (base - base.mean(0)).T, upper=False
    ).T
    scales_a, scales_b = torch.tensor([1.0, 2, 0.5, 3, 1]), torch.tensor([2.0, 2, 1, 0, 4])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    a, b = (whitened * scales_a) @ turn, (whitened * scales_b + torch.tensor([3.0, 0, 0, 0, 4])) @ turn
    # with equal axes the distance is that of the means plus that of the deviations
    assert frechet_distance(a, b) == pytest.approx(25 + float((scales_a - scales_b).square().sum()), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two rows"):
        frechet_distance(a[:1], b)


def test_bundled_files_are_small():
    sizes = [path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(sizes) < 16_000_000


@pytest.mark.parametrize("name", ["dit", "unet"])
@torch.no_grad()
def test_bundled_weights_are_the_same_model_in_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is what this test compares with")
    model = load_model(f"bundled:{name}")
    folder, cls = {"dit": ("transformer", "DiTTransformer2DModel"), "unet": ("unet", "UNet2DModel")}[name]
    theirs, unused = getattr(diffusers, cls).from_pretrained(
        BUNDLED / name / folder, output_loading_info=True, torch_dtype=torch.float32
    )
    assert not any(unused.values())
    scheduler = diffusers.DDPMScheduler.from_pretrained(BUNDLED / name / "scheduler")
    assert scheduler.config.prediction_type == model.scheduler_config["prediction_type"]
    x, t, labels = inputs()
    args = (x, t, labels) if name == "dit" else (x, t)
    expected = theirs.eval()(*args).sample
    assert (model.net(*args) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def fashion() -> tuple[torch.Tensor, torch.Tensor]:
    from bench.fashion_mnist import DEFAULT_FOLDER, load_split, to_unit_range

    if not DEFAULT_FOLDER.is_dir():
        pytest.skip("the data set package dataset-fashion-mnist is not installed")
    images, labels = load_split("test")
    return to_unit_range(images), labels


@torch.no_grad()
def test_classifier_names_nine_in_ten(fashion):
    images, labels = fashion
    right = (load_classifier()(images[:2000]).argmax(1) == labels[:2000]).float().mean()
    assert right >= 0.90


@pytest.mark.parametrize("name", ["dit", "unet"])
@torch.no_grad()
def test_bundled_models_denoise_test_images(fashion, name):
    """At each noise level the predicted image is closer to the true one than the best multiple of the noisy one."""
    images, labels = fashion[0][:64], fashion[1][:64]
    model, levels = load_model(f"bundled:{name}"), train.alpha_bar(torch.device("cpu"))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
    for t in (100, 300, 500):
        alpha, sigma = levels[t].sqrt(), (1 - levels[t]).sqrt()
        x = alpha * images + sigma * noise
        out = model.net(x, torch.full((64,), t), *([labels] if name == "dit" else []))
        data = alpha * x - sigma * out if model.prediction == "v" else (x - sigma * out) / alpha
        linear = x * ((x * images).sum() / (x * x).sum())
        # a trained network leaves a tenth of what scaling leaves; an untrained one leaves more than all
        assert (data - images).square().mean() < 0.3 * (linear - images).square().mean()


@torch.no_grad()
def test_features_tell_classes_apart(fashion):
    images, labels = fashion
    net = load_classifier()
    shirts, boots = (features(images[labels == label][:300], net) for label in (0, 9))
    others = features(images[labels == 0][300:600], net)
    assert frechet_distance(shirts, boots) > 10 * frechet_distance(shirts, others)


@torch.no_grad()
def test_quality_ranks_training_images_before_noise(fashion):
    from bench.fashion_mnist import load_split, to_unit_range

    images, labels = (part[:500] for part in load_split("train"))
    images, net = to_unit_range(images), load_classifier()
    noisy = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(5))).clamp(-1, 1)
    assert 5 * quality(images, net=net) < quality(noisy, net=net)
    assert agreement(images, labels, net) > 0.9
    assert agreement(images, labels.roll(1), net) < 0.3


def test_quality_samples_do_not_depend_on_the_batch():
    model = load_model("bundled:dit")
    settings = {"seed": 3, "guidance": 2.0, "solver": "ddim", "steps": 3}
    whole, labels = sample(model, 5, batch=5, **settings)
    parts, _ = sample(model, 5, batch=2, **settings)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    # the networks of torch round differently at another batch size
    assert (whole - parts).abs().max() < 1e-3
    assert sample(load_model("bundled:unet"), 1, solver="ddim", steps=2)[1] is None


@pytest.mark.parametrize("name", list(train.TASKS))
def test_training_lowers_the_loss_and_resumes(tmp_path, name, monkeypatch):
    images = torch.full((8, 1, 32, 32), -1.0)
    images[:, :, 8:24, 8:24] = 0.6
    labels = torch.full((8,), 3)
    monkeypatch.setattr(train, "WARMUP_STEPS", 2)

    def loss(run: train.Run, seed: int) -> torch.Tensor:
        return run.task.loss(run.net, images, labels, torch.Generator().manual_seed(seed))

    def mean_loss(run: train.Run) -> float:
        with torch.no_grad():
            return sum(float(loss(run, seed)) for seed in range(4)) / 4

    run = train.Run(train.TASKS[name], torch.device("cpu"))
    first = mean_loss(run)
    for step in range(20):
        run.update(loss(run, 100 + step), progress=0.0)
    assert mean_loss(run) < 0.8 * first
    run.save(tmp_path)
    again = train.Run(train.TASKS[name], torch.device("cpu"))
    again.load(tmp_path)
    assert again.step == 20
    for each in (run, again):
        each.update(loss(each, 7), progress=0.5)
    assert all(torch.equal(a, b) for a, b in zip(run.net.parameters(), again.net.parameters(), strict=True))
    assert all(torch.equal(run.ema[key], again.ema[key]) for key in run.ema)
