"""The CUDA compiler and its tools, for tests that need no GPU."""

import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = "-std=c++17 -fmad=false -Icsrc".split()  # as setup.py, except -O3
HOST_FLAGS = "-shared -cudart=static -Xcompiler=-fPIC,-ffp-contract=off,-fno-strict-aliasing".split()


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def find_cuobjdump() -> str | None:
    """Beside nvcc, on the path, or the copy that triton brings along."""
    places = [str(Path(nvcc).resolve().parent)] if (nvcc := find_nvcc()) else []
    places += [os.environ.get("PATH", ""), f"{sysconfig.get_path('purelib')}/triton/backends/nvidia/bin"]
    return next((found for place in places if (found := shutil.which("cuobjdump", path=place))), None)


@dataclass
class Kernel:
    """What the compiler says about one kernel."""

    name: str
    registers: int
    stack: int
    spills: int
    threads: int  # of a block
    blocks: int  # per multiprocessor, at least
    ptx: str
    sass: str


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_kernels(source: Path, arch: str, folder: Path) -> list[Kernel]:
    """Compiles one .cu for one architecture and takes the result apart."""
    target = str(folder / f"{source.stem}.{arch}.o")
    code = f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]"
    log = run(find_nvcc(), "-O3", *FLAGS, code, "-Xptxas=-v", "-c", str(source), "-o", target)
    ptx = _split(r"\.entry (\w+)\(", run(find_cuobjdump(), "-ptx", target))
    sass = _split(r"Function : (\w+)", run(find_cuobjdump(), "-sass", target))
    return [
        _kernel(name, text, ptx[name], sass[name]) for name, text in _split(r"entry function '(\w+)'", log).items()
    ]


def compile_host(source: Path, folder: Path) -> Path:
    """Compiles the host code of a .cu into a library."""
    target = folder / f"{source.stem}.so"
    run(find_nvcc(), "-O1", *FLAGS, "-arch=sm_90", *HOST_FLAGS, str(source), "-o", str(target))
    return target


def _split(pattern: str, text: str) -> dict[str, str]:
    _, *parts = re.split(pattern, text)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _kernel(name: str, log: str, ptx: str, sass: str) -> Kernel:
    number = lambda pattern, text, default=None: int(m[1]) if (m := re.search(pattern, text)) else default
    spills = number(r"(\d+) bytes spill stores", log) + number(r"(\d+) bytes spill loads", log)
    return Kernel(
        name,
        number(r"Used (\d+) registers", log),
        number(r"(\d+) bytes stack frame", log),
        spills,
        number(r"\.maxntid (\d+)", ptx),
        number(r"\.minnctapersm (\d+)", ptx, 1),
        ptx,
        sass,
    )
