"""Importers of other libraries' quantized weights (T numbers: section 8 of the quantization specification)."""

import copy
import io
import random
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastdiff.imported import import_weights
from fastdiff.models.header import CheckpointError
from fastdiff.quant.gguf import BLOCKS, decode, read_gguf, to_qtensor
from fastdiff.quant.importers import from_int8, from_nunchaku, nunchaku_low_rank, nunchaku_vector
from fastdiff.quant.measures import sqnr_db
from fastdiff.quant.state import from_tensors, to_tensors

KINDS = {block.name: (code, block) for code, block in BLOCKS.items()}


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, dtype=np.float16)[0])


def sub_scale(packed: bytes, j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block j out of the 12 bytes that eight of them share."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, (packed[j + 4] >> 4) | (packed[j] >> 6) << 4


def scalar(name: str, b: bytes) -> list[float]:
    """One block, number by number."""
    f = np.float32
    if name == "Q8_0":
        return [f(half(b[:2])) * f(struct.unpack("b", b[2 + i : 3 + i])[0]) for i in range(32)]
    if name == "Q4_0":
        return [f(half(b[:2])) * f((b[2 + i % 16] >> (4 * (i // 16)) & 15) - 8) for i in range(32)]
    if name in ("Q4_K", "Q5_K"):
        d, dmin, out = f(half(b[:2])), f(half(b[2:4])), []
        codes = b[16:] if name == "Q4_K" else b[48:]
        for i in range(256):
            j = i // 32
            scale, low = sub_scale(b[4:16], j)
            code = codes[32 * (j // 2) + i % 32] >> (4 * (j % 2)) & 15
            if name == "Q5_K":
                code |= (b[16 + i % 32] >> j & 1) << 4
            out.append(d * f(scale) * f(code) - dmin * f(low))
        return out
    out = []  # Q6_K
    for i in range(256):
        part, at = i // 128, i % 128
        low = b[64 * part + at % 64] >> (4 * (at // 64)) & 15
        high = b[128 + 32 * part + at % 32] >> (2 * (at // 32)) & 3
        scale = struct.unpack("b", b[192 + i // 16 : 193 + i // 16])[0]
        out.append(f((low | high << 4) - 32) * f(scale) * f(half(b[208:])))
    return out


def blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, KINDS[name][1].size), dtype=np.uint8)
    scale = (rng.random((count, 2)).astype(np.float16) + np.float16(0.01)).view(np.uint8).reshape(count, 4)
    if name == "Q6_K":
        raw[:, 208:] = scale[:, :2]
    else:
        raw[:, : 4 if name.endswith("K") else 2] = scale[:, : 4 if name.endswith("K") else 2]
    return raw


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_T22_blocks_decode_as_number_by_number(name):
    raw = blocks(name, 5)
    got = decode(raw, KINDS[name][1])
    want = np.array([scalar(name, row.tobytes()) for row in raw], dtype=np.float32)
    assert got.shape == want.shape and np.array_equal(got, want)


@pytest.mark.parametrize("name,dtype", [("Q8_0", "int8"), ("Q4_0", "int4")])
def test_T22_integer_blocks_convert_without_loss(name, dtype):
    raw = blocks(name, 24)
    raw[3, :2] = 0  # a block of zeros
    if name == "Q8_0":
        with pytest.raises(ValueError, match="-128"):
            to_qtensor(np.where(raw == 127, np.uint8(128), raw), KINDS[name][1], (6, 128))
        raw[:, 2:][raw[:, 2:] == 128] = 129
    if name == "Q4_0":
        raw[4, 1] |= 0x80  # its scale is signed
    made = to_qtensor(raw, KINDS[name][1], (6, 128))
    assert np.array_equal(made.dequantize().flatten().numpy(), decode(raw, KINDS[name][1]).flatten())
    assert made.spec.dtype == dtype and made.group == 32 and bool((made.scale != 0).all())
    codes = np.array([scalar(name, b"\0\x3c" + row[2:].tobytes()) for row in raw]).reshape(6, 128)
    codes.reshape(-1, 32)[3] = 0
    assert np.array_equal(made.codes.numpy(), codes)
    with pytest.raises(ValueError, match="no integer grid"):
        to_qtensor(blocks("Q4_K", 2), KINDS["Q4_K"][1], (2, 256))


def gguf_file(tensors: dict, extra: bytes = b"", keys: int = 1) -> bytes:
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    head = (
        b"GGUF" + struct.pack("<IQQ", 3, len(tensors), keys) + text("general.name") + struct.pack("<I", 8) + text("x")
    )
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        body += b"\0" * (-len(body) % 32)
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", KINDS[kind][0], len(body))
        body += raw.tobytes()
    return head + extra + b"\0" * (-len(head + extra) % 32) + body


TENSORS = {"a.weight": ("Q8_0", (3, 64), blocks("Q8_0", 6)), "b.weight": ("Q4_0", (2, 32), blocks("Q4_0", 2)), "a.bias": ("F32", (3,), np.arange(3, dtype=np.float32).view(np.uint8).reshape(3, 4))}  # fmt: skip


def test_files_are_read_and_broken_ones_refused():
    blob = gguf_file(TENSORS)
    made = read_gguf(io.BytesIO(blob), len(blob))
    for name, (kind, shape, raw) in TENSORS.items():
        assert made[name][0].name == kind and made[name][1] == shape and np.array_equal(made[name][2], raw)
    assert decode(made["a.bias"][2], made["a.bias"][0]).flatten().tolist() == [0, 1, 2]
    for cut in range(0, len(blob), 7):
        with pytest.raises(ValueError, match="gguf"):
            read_gguf(io.BytesIO(blob[:cut]), cut)
    for seed in range(500):
        draw = random.Random(seed)
        broken = bytearray(blob)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(200)] = draw.randrange(256)
        try:
            read_gguf(io.BytesIO(broken), len(broken))
        except ValueError as error:
            assert "gguf" in str(error)


def test_int8_rows_of_others():
    codes, scale = torch.randint(-127, 128, (5, 16), dtype=torch.int8), torch.rand(5) + 0.1
    for given in (scale, scale[:, None], scale.bfloat16()):
        made = from_int8(codes, given)
        want = codes.float() * given.float().reshape(5, 1)
        assert torch.equal(made.dequantize(), want)
    assert torch.equal(from_int8(codes, torch.tensor(0.5)).dequantize(), codes * 0.5)
    with pytest.raises(ValueError, match="-128"):
        from_int8(torch.full((2, 2), -128, dtype=torch.int8), torch.ones(2))
    with pytest.raises(ValueError, match="one scale per row"):
        from_int8(codes, torch.ones(4))


def test_T23_nunchaku_tiles_are_inverted():
    """The forward order is built element by element from the fragment maps of mma.m16n8k64 (section 3.3)."""
    N, K = 256, 128
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    words = np.zeros(N * K // 8, dtype=np.uint64)
    place = 0
    for n_tile in range(N // 128):
        for k_tile in range(K // 64):
            for pack in range(8):
                for n_lane in range(8):
                    for k_lane in range(4):
                        for n_half in range(2):
                            for k_half in range(2):
                                n = 128 * n_tile + 16 * pack + 8 * n_half + n_lane
                                k = 64 * k_tile + 32 * k_half + 8 * k_lane
                                for r in range(8):
                                    words[place] |= np.uint64((int(codes[n, k + r]) & 15) << (4 * r))
                                place += 1
    qweight = torch.from_numpy(words.astype(np.uint32).view(np.int8).reshape(N, K // 2).copy())
    scale = torch.rand(N, K // 64)
    lanes = [
        16 * group + 2 * lane + 8 * half + low
        for group in range(8)
        for lane in range(4)
        for half in range(2)
        for low in range(2)
    ]
    assert lanes[:8] == [0, 1, 8, 9, 2, 3, 10, 11] and lanes[-4:] == [118, 119, 126, 127]
    stored = torch.stack(
        [torch.stack([scale[128 * tile + torch.tensor(lanes), g] for g in range(K // 64)]) for tile in range(N // 128)]
    )
    made = from_nunchaku(qweight, stored.reshape(K // 64, N))
    assert torch.equal(made.codes, codes) and torch.equal(made.scale, scale)
    bias = torch.randn(256)
    assert torch.equal(nunchaku_vector(bias.view(2, 128)[:, lanes].reshape(-1)), bias)
    with pytest.raises(ValueError, match="multiple of 128"):
        from_nunchaku(qweight[:64], stored.reshape(2, 256))


def low_rank_order(rows: int, columns: int, tile_of) -> list[tuple[int, int]]:
    """Elements of a factor in storage order: tiles of 16 x 16, then lanes, then four registers of two numbers."""
    order = []
    for first, second in tile_of(rows // 16, columns // 16):
        for n_lane in range(8):
            for k_lane in range(4):
                for n_half in range(2):
                    for k_half in range(2):
                        for low in range(2):
                            order.append(
                                (16 * first + 8 * n_half + n_lane, 16 * second + 8 * k_half + 2 * k_lane + low)
                            )
    return order


def test_T23_nunchaku_low_rank_factors_are_inverted():
    up, down = torch.randn(64, 32), torch.randn(32, 48)
    order = low_rank_order(64, 32, lambda n, k: [(i, j) for i in range(n) for j in range(k)])
    packed = torch.stack([up[i, j] for i, j in order]).view(64, 32)
    assert torch.equal(nunchaku_low_rank(packed, down=False), up)
    order = low_rank_order(32, 48, lambda n, k: [(i, j) for j in range(k) for i in range(n)])
    packed = torch.stack([down[i, j] for i, j in order]).view(48, 32)
    assert torch.equal(nunchaku_low_rank(packed, down=True), down)


class Small(nn.Module):
    """A fused projection of the files is two layers here, and a norm stays in floating point."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(128, 128), nn.Linear(128, 128)
        self.norm, self.out = nn.LayerNorm(128), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return self.out(self.norm(self.to_q(x) * self.to_k(x)))


def expected(net: nn.Module, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network with these weights in floating point, activations not quantized."""
    same = copy.deepcopy(net)
    for name, weight in weights.items():
        setattr(same, name, nn.Linear(*weight.shape[::-1], bias=getattr(net, name).bias is not None))
        getattr(same, name).weight.data.copy_(weight)
        if getattr(net, name).bias is not None:
            getattr(same, name).bias.data.copy_(net.get_submodule(name).bias)
    return same(x)


def int8_tensors(net: Small, names: tuple[str, str], scale_shape=(-1,)) -> dict[str, torch.Tensor]:
    weight, scale = names
    tensors = {"norm.weight": torch.rand(128), "norm.bias": torch.randn(128)}
    for name in ("to_q", "to_k", "out"):
        rows = getattr(net, name).out_features
        tensors[f"{name}{weight}"] = torch.randint(-127, 128, (rows, 128), dtype=torch.int8)
        tensors[f"{name}{scale}"] = (torch.rand(rows) * 0.01 + 1e-3).reshape(scale_shape)
        if name != "out":
            tensors[f"{name}.bias"] = torch.randn(rows)
    return tensors


@pytest.mark.parametrize("source", ("torchao", "torchao-dynamic", "ModelOpt", "ModelOpt-static"))
def test_files_of_int8_weights_are_imported_without_loss(tmp_path, source):
    torch.manual_seed(0)
    net, metadata = Small(), {}
    if source.startswith("torchao"):
        names = ("._weight_qdata", "._weight_scale")
        tensors = int8_tensors(net, names, (-1, 1))
        kind = '{"granularity": {}}' if source.endswith("dynamic") else "null"
        metadata = {f"{n}.weight": f'{{"_type": "Int8Tensor", "_data": {{"act_quant_kwargs": {kind}}}}}' for n in ("to_q", "to_k", "out")}  # fmt: skip
    else:
        names = (".weight", ".weight_scale")
        tensors = int8_tensors(net, names)
        if source.endswith("static"):
            tensors |= {f"{n}.input_scale": torch.tensor(0.03) for n in ("to_q", "to_k", "out")}
            tensors |= {f"{n}.pre_quant_scale": torch.rand(128) + 0.5 for n in ("to_q", "to_k")}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "m.safetensors", metadata)
    made = import_weights(net, tmp_path / "m.safetensors")
    for name in ("to_q", "to_k", "out"):
        layer = getattr(net, name)
        want = tensors[f"{name}{names[0]}"].float() * tensors[f"{name}{names[1]}"].reshape(-1, 1)
        assert torch.equal(layer.codes().dequantize(), want)
        assert (layer.input_scale is None) == (source != "ModelOpt-static")
        assert (layer.scheme.input is None) == (source == "torchao")
        if name != "out":
            assert torch.equal(layer.bias, tensors[f"{name}.bias"])
    assert torch.equal(net.norm.weight, tensors["norm.weight"]) and [r.bits for r in made.layers] == [8.25] * 3
    weights = {n: getattr(net, n).dense() for n in ("to_q", "to_k", "out")}
    x = torch.randn(5, 128)
    assert sqnr_db(expected(net, weights, x), net(x)) > (90 if source == "torchao" else 20)


def tiles_of(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix and scales in nunchaku's order, found by importing numbered positions."""
    N, K = codes.shape
    forward = lambda tensor: from_nunchaku(tensor, torch.ones(K // 64, N)).codes
    place = torch.zeros(N, K, dtype=torch.long)  # of every code among the nibbles of the file
    for bit in range((N * K).bit_length()):
        ones = (torch.arange(N * K) >> bit & 1).view(N, K // 2, 2).to(torch.uint8)
        place += (forward((ones[..., 0] | ones[..., 1] << 4).view(torch.int8)).long() & 1) << bit
    flat = torch.zeros(N * K, dtype=torch.uint8)
    flat[place.flatten()] = codes.flatten().view(torch.uint8) & 15
    packed = (flat[::2] | flat[1::2] << 4).view(torch.int8).view(N, K // 2)
    order = nunchaku_vector(torch.arange(128.0)).long()
    stored = torch.zeros(N // 128, K // 64, 128)
    stored[:, :, order] = scale.view(N // 128, 128, K // 64).transpose(1, 2)
    return packed, stored.view(K // 64, N)


def test_T23_files_of_nunchaku_are_imported_with_branch_and_smoothing(tmp_path):
    torch.manual_seed(0)
    net = Small()
    codes, scale = torch.randint(-8, 8, (256, 128), dtype=torch.int8), torch.rand(256, 2) * 0.01 + 1e-3
    qweight, wscales = tiles_of(codes, scale)
    smooth, bias = torch.rand(128) + 0.5, torch.randn(256)
    into = lambda values: torch.zeros_like(values).index_put((nunchaku_vector(torch.arange(float(len(values)))).long(),), values)  # fmt: skip
    down, up = torch.randn(128, 16) * 0.1, torch.randn(256, 16) * 0.1
    tensors = {
        "qkv.qweight": qweight,
        "qkv.wscales": wscales,
        "qkv.smooth_factor": into(smooth),
        "qkv.bias": into(bias),
    }
    tensors |= {"qkv.proj_down": down, "qkv.proj_up": up, "qkv.smooth_factor_orig": smooth}
    tensors |= {"norm.weight": torch.rand(128), "norm.bias": torch.randn(128), "out.weight": torch.randn(64, 128)}
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "m.safetensors")
    rename = lambda name: ("to_q", "to_k") if name == "qkv" else name
    import_weights(net, tmp_path / "m.safetensors", rename)
    branch = nunchaku_low_rank(up, down=False) @ nunchaku_low_rank(down, down=True)
    want = codes.float() * scale.repeat_interleave(64, 1) / smooth + branch
    got = torch.cat((net.to_q.dense(), net.to_k.dense()))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat((net.to_q.bias, net.to_k.bias)), bias)
    assert torch.equal(net.to_q.codes().codes, codes[:128]) and type(net.out) is nn.Linear


def test_T22_gguf_files_are_imported_exactly_and_can_be_saved(tmp_path):
    net = Small()
    tensors = {"to_q.weight": ("Q8_0", (128, 128), blocks("Q8_0", 512)), "to_k.weight": ("Q4_0", (128, 128), blocks("Q4_0", 512)), "out.weight": ("Q6_K", (64, 256), blocks("Q6_K", 64))}  # fmt: skip
    net.out = nn.Linear(256, 64, bias=False)
    tensors["to_q.weight"][2][:, 2:][tensors["to_q.weight"][2][:, 2:] == 128] = 129
    floats = {"to_q.bias": 128, "to_k.bias": 128, "norm.weight": 128, "norm.bias": 128}
    tensors |= {
        n: ("F32", (c,), np.arange(c, dtype=np.float32).view(np.uint8).reshape(c, 4)) for n, c in floats.items()
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file(tensors))
    made = import_weights(net, path)
    for name in ("to_q", "to_k", "out"):
        kind, shape, raw = tensors[f"{name}.weight"]
        want = decode(raw, KINDS[kind][1]).reshape(shape)
        dense = net.get_submodule(name).codes().dequantize() if name != "out" else net.out.weight
        assert np.array_equal(dense.detach().numpy(), want)
    assert net.to_q.bias.tolist() == list(range(128)) and {r.scheme.weight.dtype for r in made.layers} == {
        "int8",
        "int4",
    }
    saved, _, settings = to_tensors(made)
    again = Small()
    again.out = nn.Linear(256, 64, bias=False)
    from_tensors(again, settings, saved)
    assert torch.equal(again.to_k.weight, net.to_k.weight)


def test_files_that_do_not_fit_change_nothing(tmp_path):
    net, path = Small(), tmp_path / "m.safetensors"
    before = {n: t.clone() for n, t in net.state_dict().items()}
    good = int8_tensors(net, (".weight", ".weight_scale"))
    changed = lambda **parts: {n: t for n, t in (good | {k.replace("__", "."): v for k, v in parts.items()}).items() if t is not None}  # fmt: skip
    for tensors, words in (
        (changed(norm__bias=None), "norm.bias"),
        (changed(norm__bias=torch.zeros(5)), "norm.bias"),
        (changed(extra__weight=torch.zeros(5)), "no module 'extra'"),
        (changed(out__weight_scale=torch.full((64,), torch.nan)), "finite positive"),
        (changed(out__weight=torch.zeros(64, 64, dtype=torch.int8)), r"out must be \[64, 128\]"),
        (changed(to_q__bias=None), "to_q.bias"),
        ({"norm.weight": torch.zeros(128)}, "no quantized layers"),
    ):
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=words):
            import_weights(net, path)
        assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    path.write_bytes(b"GGUF" + bytes(30))
    with pytest.raises(CheckpointError, match="gguf"):
        import_weights(net, path)
