"""Both halves of an `AutoencoderKL` on fused kernels: their own numbers within each mode's bound, whole and in tiles."""

import copy

import pytest
import torch
from unet_networks import BF16, EXACT, call, calls_of, decibels, relative_error

import fastdiff
from fastdiff.ops import native

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=f"no native code: {native.cpu_missing()}")
SIGNAL = 22.0  # of w8a8, to noise, dB: no skip connections around its layers, few channels to average over
_CONFIG = dict(
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(16, 32, 64),
    layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32,
)  # fmt: skip


def _autoencoder(**changes):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**{**_CONFIG, **changes}).eval()


def _latents(rows: int, *size: int) -> torch.Tensor:
    return torch.randn(rows, 4, *size, generator=torch.Generator().manual_seed(rows))


CONFIGS = {"usual": {}, "no attention": dict(mid_block_add_attention=False), "one level": dict(
    down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(24,)
)}  # fmt: skip


@pytest.mark.parametrize("half", ("decoder", "encoder"))
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_mode_gives_the_modules_numbers(changes, half):
    net = getattr(_autoencoder(**changes), half)
    sizes = ((1, (4, 6)), (3, (5, 3)), (2, (4, 6))) if half == "decoder" else ((1, (16, 8)), (2, (12, 20)))
    channels = net.conv_in.in_channels
    samples = [_latents(rows, *size)[:, :channels] for rows, size in sizes]
    truths, wide = [call(net, x) for x in samples], copy.deepcopy(net).double()
    for mode in ("exact", "bf16", "w8a8"):
        fastdiff.accelerate(net, mode, strict=True)
        for x, truth in zip(samples, truths, strict=True):
            got = call(net, x)
            assert got.shape == truth.shape and got.dtype == truth.dtype and torch.equal(got, call(net, x))
            if mode == "exact":
                exact = call(wide, x.double())
                assert relative_error(got, truth) < EXACT
                assert relative_error(got.double(), exact) < 2 * relative_error(truth.double(), exact) + 1e-6
            elif mode == "bf16":
                assert relative_error(got, truth) < BF16
            else:
                assert decibels(got, truth) > SIGNAL


def test_attention_over_wide_heads():
    net = _autoencoder(block_out_channels=(8, 512), down_block_types=_CONFIG["down_block_types"][:2],
                       up_block_types=_CONFIG["up_block_types"][:2]).decoder  # fmt: skip
    x = _latents(2, 6, 4)
    truth = call(net, x)
    for mode, least in (("exact", 100), ("bf16", 35), ("w8a8", SIGNAL)):
        assert decibels(call(fastdiff.accelerate(net, mode, strict=True), x), truth) > least


def test_autoencoders_call_it_whole_and_in_tiles():
    vae, plain = _autoencoder(), _autoencoder()
    fastdiff.accelerate(vae.decoder, "exact", strict=True)
    fastdiff.accelerate(vae.encoder, "exact", strict=True)
    x, image = _latents(2, 12, 20), torch.rand(2, 3, 32, 48)
    for change in ("disable_tiling", "enable_tiling", "enable_slicing"):
        for one in (vae, plain):
            getattr(one, change)()
            one.tile_sample_min_size, one.tile_latent_min_size = 32, 8
        with torch.no_grad():
            assert relative_error(vae.decode(x).sample, plain.decode(x).sample) < EXACT
            got, own = vae.encode(image).latent_dist, plain.encode(image).latent_dist
        assert relative_error(got.parameters, own.parameters) < EXACT
    assert set(calls_of(vae.decoder)) == set(calls_of(vae.encoder)) == {"fused"}


def test_undo_weights_and_arguments():
    net = _autoencoder().decoder
    x, keys = _latents(1, 4, 4), set(net.__dict__)
    truth = call(net, x)
    fastdiff.accelerate(net, "w8a8")
    call(net, x)
    with (
        pytest.raises(RuntimeError, match="size of tensor"),
        torch.no_grad(),
    ):  # the module's own forward has no use for it either
        net(x, torch.ones(1, 4, 4, 4))
    assert any("latent_embeds" in reason for reason in calls_of(net))
    assert torch.equal(call(fastdiff.undo(net), x), truth) and set(net.__dict__) == keys
    fastdiff.accelerate(net, "exact", strict=True)
    with torch.no_grad():
        net.conv_in.weight.mul_(2)
    own = call(fastdiff.undo(copy.deepcopy(net)), x)
    assert relative_error(call(net, x), own) < EXACT < relative_error(truth, own)


def test_decoders_of_other_autoencoders_are_left_to_the_walker():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    other = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), scaling_factor=1.0,
    ).eval()  # fmt: skip
    x = _latents(1, 4, 4)
    own = call(other.decoder, x)
    fastdiff.accelerate(other.decoder, "exact")
    assert not fastdiff.report(other.decoder).lowered and relative_error(call(other.decoder, x), own) < EXACT
