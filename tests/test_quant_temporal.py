"""The temporal information block kept per step, inside real networks (T numbers: quantization specification)."""

import copy

import pytest
import torch
from quant_networks import tiny_dit, tiny_unet
from torch import nn
from torch.nn import functional as F

from fastdiff import accelerate, report
from fastdiff.models.embeddings import timestep_sinusoid
from fastdiff.ops import native
from fastdiff.quant.measures import to_bytes
from fastdiff.sampler import Sampler

pytestmark = pytest.mark.skipif(native.cpu() is None, reason="the CPU kernels are not built")

# heun and dpm2 evaluate the network twice a step, the latter at times between those of the schedule; plms once more in all
SOLVERS = ("ddim", "plms", "dpmpp-2m", "euler", "heun", "dpm2")
SHAPE = (3, 1, 8, 8)


class Watch(nn.Module):
    """A network that keeps the times of its calls and the temporal rows that served them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x: torch.Tensor, t: torch.Tensor, **cond) -> torch.Tensor:
        out = self.net(x, t, **cond)
        self.calls.append((t.clone(), cond, table_of(self.net).lookup(t, *cond.values()).clone()))
        return out


def table_of(net: nn.Module):
    return net.__dict__["_fastdiff"].lowered.temporal


def unet_rows(net: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """The time projections of all residual blocks in the order in which they run, from the modules themselves."""
    config = net.config
    emb = net.time_embedding(
        timestep_sinusoid(t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
    )
    blocks = [*net.down_blocks, net.mid_block, *net.up_blocks]
    return torch.cat([r.time_emb_proj(F.silu(emb)) for block in blocks for r in block.resnets], 1)


def dit_rows(net: nn.Module, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    sinusoid = timestep_sinusoid(t, 256, flip_sin_to_cos=True, freq_shift=1)
    norms = [block.norm1 for block in net.transformer_blocks]
    parts = [norm.linear(F.silu(norm.emb(sinusoid, labels))) for norm in norms]
    return torch.cat([*parts, net.proj_out_1(F.silu(norms[0].emb(sinusoid, labels)))], 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_T31_T34_rows_have_the_bits_of_the_modules_at_every_evaluation(solver):
    net = accelerate(tiny_unet(), strict=True)
    watch = Watch(net)
    Sampler(watch).sample(SHAPE, solver=solver, steps=5)
    assert (len(watch.calls) > 5) == (solver in ("plms", "heun", "dpm2"))
    with torch.no_grad():
        for t, _, rows in watch.calls:
            assert torch.equal(rows, unet_rows(net, t))


def test_T34_a_schedule_may_start_anywhere_and_times_may_be_unknown():
    net = accelerate(tiny_unet(), strict=True, exact_time=False)
    x, schedule = torch.randn(SHAPE), torch.tensor([[900.0], [600.0], [300.0], [0.0]])
    net.prepare_schedule(x[:1], schedule)
    table = table_of(net)
    before = table.computed
    with torch.no_grad():
        for t in schedule[2:, 0]:  # as image to image does, from the middle on
            torch.testing.assert_close(table.lookup(t.expand(3)), unet_rows(net, t.expand(3)), rtol=1e-5, atol=1e-6)
        assert table.computed == before
        strange = torch.tensor([123.456])
        torch.testing.assert_close(table.lookup(strange), unet_rows(net, strange), rtol=1e-5, atol=1e-6)
    assert table.computed == before + 1


def test_T32_rows_computed_at_once_differ_by_rounding():
    exact, batched = tiny_unet(), tiny_unet()
    accelerate(exact, strict=True, exact_time=True)
    accelerate(batched, strict=True, exact_time=False)
    images = [Sampler(net).sample(SHAPE, solver="ddim", steps=10) for net in (exact, batched)]
    assert float((to_bytes(images[0]) - to_bytes(images[1])).abs().max()) <= 1
    with torch.no_grad():
        rows, want = table_of(batched).lookup(torch.tensor([899.0])), unet_rows(exact, torch.tensor([899.0]))
    assert float((rows - want).norm() / want.norm()) <= 1e-6


def test_T33_rows_belong_to_time_and_label_in_the_order_of_the_batch():
    net = accelerate(tiny_dit(), strict=True)
    watch = Watch(net)
    labels = torch.tensor([1, 2, 3])
    empty = {"class_labels": torch.full((3,), 10)}
    Sampler(watch).sample(SHAPE, solver="ddim", steps=3, guidance=3.0, cond={"class_labels": labels}, negative=empty)
    with torch.no_grad():
        for t, cond, rows in watch.calls:
            assert len(rows) == 6 and sorted(cond["class_labels"].tolist()) == [1, 2, 3, 10, 10, 10]
            assert torch.equal(rows, dit_rows(net, t, cond["class_labels"]))
        t = torch.tensor([500.0, 500.0])
        a, b = (table_of(net).lookup(t, torch.tensor(pair)) for pair in ([4, 10], [10, 4]))
        assert torch.equal(a[0], dit_rows(net, t, torch.tensor([4, 10]))[0]) and not torch.equal(a[0], b[0])


@pytest.mark.parametrize("stop", ("update", "replace"))
def test_T33_rows_of_other_weights_are_never_used(stop):
    net = accelerate(tiny_unet())
    x, t = torch.randn(SHAPE), torch.tensor([500.0, 400.0, 300.0])
    with torch.no_grad():
        net(x, t)
        projection = net.mid_block.resnets[0].time_emb_proj
        if stop == "update":  # what merging a LoRA does
            projection.weight.add_(0.5)
        else:
            net.mid_block.resnets[0].time_emb_proj = nn.Linear(projection.in_features, projection.out_features)
        plain = tiny_unet()
        plain.load_state_dict(copy.deepcopy(net.state_dict()))
        torch.testing.assert_close(net(x, t), plain(x, t), rtol=1e-4, atol=1e-5)
    assert report(net).calls == {"fused": 2}
