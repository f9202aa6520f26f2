"""The CUDA kernels as far as a machine without a GPU can tell: resources, instructions, linkage, good manners."""

import functools
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nvcc import ROOT, Kernel, compile_kernels, find_cuobjdump, find_nvcc, run

import fastdiff
from fastdiff.ops import OPS, native

ARCHS = ["90a", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("80", "100a", "120a"))]
REGISTERS = 65536  # of a multiprocessor, on every architecture
# a stack that must stay, by part of a kernel's name, with its reason; none so far
STACKS: dict[str, str] = {}

needs_nvcc = pytest.mark.skipif(not (find_nvcc() and find_cuobjdump()), reason="needs nvcc and cuobjdump")
MODULE = next((ROOT / "fastdiff").glob("_cuda*.so"), None)
needs_module = pytest.mark.skipif(MODULE is None, reason="fastdiff._cuda is not built")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Compiles all kernels for an architecture, once."""

    @functools.cache
    def compiled(arch: str) -> list[Kernel]:
        folder, sources = tmp_path_factory.mktemp(arch), sorted((ROOT / "csrc/cuda").glob("*.cu"))
        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(lambda source: compile_kernels(source, arch, folder), sources))
        return [kernel for part in parts for kernel in part]

    return compiled


def _count(kernel: Kernel, instruction: str) -> int:
    return len(re.findall(rf"\b{re.escape(instruction)}\b", kernel.sass))


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit_into_registers(kernels, arch):
    found = kernels(arch)
    assert len(found) >= 1 + 2 + 4 + 17  # probe, philox_normal, solver_step, gram
    for kernel in found:
        assert kernel.spills == 0, kernel.name
        assert kernel.stack == 0 or any(part in kernel.name for part in STACKS), (kernel.name, kernel.stack)
        if kernel.threads:
            assert kernel.registers * kernel.threads * kernel.blocks <= REGISTERS, (kernel.name, kernel.registers)


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_contracted(kernels, arch):
    """A contracted product rounds once instead of twice: the bits would differ from the CPU's."""
    for kernel in kernels(arch):
        assert not re.search(r"\b(fma|mad)\.(rn|rz|ftz|f32|f64)", kernel.ptx), kernel.name
        # a correctly rounded square root is itself made of two, and three in the path for extreme arguments
        roots = _count(kernel, "MUFU.RSQ")
        assert _count(kernel, "FFMA") <= (2 * roots + 1 if roots else 0), kernel.name
        assert _count(kernel, "DFMA") == 0, kernel.name


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_contiguous_paths_move_16_bytes(kernels, arch):
    wide = [k for k in kernels(arch) if re.search(r"solver_step_kernelI[fd]Lb1E", k.name)]
    assert len(wide) == 2
    for kernel in wide:  # outputs, slots, x, aux; x, both slots, model_input
        assert _count(kernel, "LDG.E.128") >= 4 + 5 + 1 + 1, kernel.name
        assert _count(kernel, "STG.E.128") >= 4, kernel.name
    (noise,) = [k for k in kernels(arch) if "philox_normal_kernelILb1E" in k.name]
    assert _count(noise, "STG.E.128") == 1
    assert all(_count(k, "LDG.E.128") >= 1 for k in kernels(arch) if "gram_kernel" in k.name)


@needs_module
def test_module_needs_no_driver_and_no_torch():
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "-d", str(MODULE)))
    assert needed and not [name for name in needed if re.match(r"lib(cuda|cudart|torch|c10|nv)", name)]


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver_the_module_says_so():
    code = "import fastdiff._cuda as m; print(m.unusable()); print(m.gram_chunks(4096), m.gram_chunks(4097))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sentence, chunks = done.stdout.splitlines()
    assert "driver" in sentence and chunks == "1 2"


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_launch_without_a_gpu_is_an_error_with_a_name():
    module = native._load("fastdiff._cuda")[0]
    with pytest.raises(RuntimeError, match=r"philox_normal: launch failed for \[2, 8\] on .*"):
        module.philox_normal(0, 0, 0, 0, 2, 8, 0, 0)
    module.philox_normal(0, 0, 0, 0, 2, 0, 0, 0)  # nothing to do
    with pytest.raises(ValueError, match="gram: operands"):
        module.gram(0, 0, [], [1, 1, 1], 0, 0)


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if any(v.name == "cuda" for v in op.variants)])
def test_contracts_and_bindings_agree(monkeypatch, name):
    """Every sample reaches its launch, which is what fails here."""
    monkeypatch.setattr(native, "cuda", lambda: native._load("fastdiff._cuda")[0])
    monkeypatch.setattr(native, "queue", lambda device: (0, 0))
    variant = next(v for v in OPS[name].variants if v.name == "cuda")
    launches = 0
    for call in OPS[name].samples("cpu"):
        try:
            variant.run(*call)
        except RuntimeError as error:
            assert re.match(rf"{name}: launch failed for \[[0-9, ]+\] on ", str(error))
            launches += 1
    assert launches > 5


def test_info_has_a_sentence_for_cuda():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    out = run(sys.executable, "-m", "fastdiff", "info")
    assert fastdiff.__version__ in out
    assert len(re.findall(r"^ +cuda +\S.*GPU", out, re.MULTILINE)) == 3
