"""Builds the native modules fastdiff._cpu and fastdiff._cuda, without torch. Environment:

FASTDIFF_NATIVE=0         no native code: every op runs on its torch reference
FASTDIFF_CUDA=0|1         without or with CUDA kernels (default: with them where nvcc is found)
FASTDIFF_CUDA_ARCHS=80;90a    architectures (default: 80;90a;100a;120a, as far as nvcc knows them)
FASTDIFF_SANITIZE=address,undefined    a checking build with planted faults
CXX, CUDA_HOME, MAX_JOBS  the compiler ("ccache g++" works), the toolkit, the number of compilers at once
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# one copy of every kernel per instruction set; dispatch.cpp chooses at run time
LEVELS = {
    "baseline": [],
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16".split(),
}
LEVELS["amx"] = [*LEVELS["avx512"], *"-mamx-tile -mamx-int8 -mamx-bf16".split()]
ONCE = {"dispatch.cpp", "parallel.cpp", "workspace.cpp"}  # in csrc/cpu, compiled for the baseline only
# in csrc/cpu, compiled for AMX as well: those that multiply matrices
TILED = {"linear.cpp", "linear_w8a8.cpp", "linear_w8a16.cpp", "linear_w4a16.cpp", "linear_w4a8.cpp"}
SANITIZE = os.environ.get("FASTDIFF_SANITIZE", "")
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = [
    *"-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized".split(),
    # bits must not depend on the compiler's choices; a buffer is read as floats and as integers
    *"-ffp-contract=off -fno-math-errno -fno-strict-aliasing".split(),
    f"-ffile-prefix-map={os.getcwd()}=.",
    *("-O1 -g1 -fno-omit-frame-pointer -DFASTDIFF_FAULTS".split() if SANITIZE else ["-O3", "-g0"]),
    *([f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"] if SANITIZE else []),
]
LINK = [
    "-Wl,-z,relro,-z,now",
    *([f"-fsanitize={SANITIZE}"] if SANITIZE else ["-static-libstdc++", "-static-libgcc", "-Wl,-s"]),
]


def find_nvcc() -> str | None:
    """The CUDA compiler: FASTDIFF_CUDA decides, then CUDA_HOME, the path, and NVIDIA's pip packages."""
    wanted = os.environ.get("FASTDIFF_CUDA", "auto")
    if wanted == "0" or not list(Path("csrc/cuda").glob("*.cu")):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    pip = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc"))
    found = [p for p in (home and shutil.which("nvcc", path=f"{home}/bin"), shutil.which("nvcc"), *map(str, pip)) if p]
    if wanted == "1" and not found:
        sys.exit("fastdiff: FASTDIFF_CUDA=1 but there is no nvcc; set CUDA_HOME or pip install nvidia-cuda-nvcc")
    return found[0] if found else None


def extensions() -> list[Extension]:
    """What can be built here; says in one line what cannot."""
    if os.environ.get("FASTDIFF_NATIVE") == "0":
        return []
    if platform.machine() not in ("x86_64", "AMD64") or shutil.which(CXX[-1]) is None:
        why = (
            f"no C++ compiler ({CXX[-1]})" if shutil.which(CXX[-1]) is None else f"no kernels for {platform.machine()}"
        )
        print(f"fastdiff: {why}; installing without native code, ops run on their torch reference", file=sys.stderr)
        return []
    cuda = [Extension("fastdiff._cuda", [], optional=os.environ.get("FASTDIFF_CUDA") != "1")] if find_nvcc() else []
    return [Extension("fastdiff._cpu", []), *cuda]


class Build(build_ext):
    """Compiles with ninja where it is found, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        folder = Path(
            "build", f"{name}-{sys.implementation.cache_tag}-{SANITIZE.replace(',', '-')}".rstrip("-")
        ).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        exports = folder / "exports.map"
        exports.write_text(f"{{ global: PyInit_{name}; local: *; }};\n")
        compiles = cpu_compiles(folder) if name == "_cpu" else cuda_compiles(folder)
        objects = [command[-1] for command in compiles]
        link = [
            *CXX,
            "-shared",
            *objects,
            *LINK,
            "-Xlinker",
            f"--version-script={exports}",
            "-ldl",
            "-lpthread",
            "-o",
            str(output),
        ]
        if name == "_cuda":  # nvcc knows where its runtime is
            script = f"-Xlinker=--version-script={exports}"
            link = [find_nvcc(), "-shared", "-cudart=static", *objects, script, "-o", str(output)]
        run_ninja(folder, compiles, link) if ninja() else run_plain(compiles, link)


def cpu_compiles(folder: Path) -> list[list[str]]:
    levels = [name for name, flags in LEVELS.items() if knows(flags)]
    base = [*CXX, *FLAGS, *includes(), f"-DFASTDIFF_LEVELS={len(levels)}"]
    commands = [compile_command(base, Path("csrc/bindings.cpp"), folder / "bindings.o")]
    for source in sorted(Path("csrc/bind").glob("*.cpp")):
        commands.append(compile_command(base, source, folder / f"bind.{source.stem}.o"))
    for source in sorted(Path("csrc/cpu").glob("*.cpp")):
        if source.name in ONCE:
            commands.append(compile_command(base, source, folder / f"{source.stem}.o"))
            continue
        for level in levels if source.name in TILED else levels[:3]:
            flags = [*LEVELS[level], f"-DFASTDIFF_ISA={level}"]
            commands.append(compile_command([*base, *flags], source, folder / f"{source.stem}.{level}.o"))
    return commands


def cuda_compiles(folder: Path) -> list[list[str]]:
    nvcc, known = find_nvcc(), ""
    archs = [a for a in os.environ.get("FASTDIFF_CUDA_ARCHS", "").replace(",", ";").split(";") if a]
    if not archs:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        archs = [a for a in ("80", "90a", "100a", "120a") if f"sm_{a.rstrip('a')}" in known]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(
        f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"
    )  # for later GPUs, compiled by the driver
    device = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets]
    commands = [compile_command([*CXX, *FLAGS, *includes()], Path("csrc/cuda_bindings.cpp"), folder / "bindings.o")]
    for source in sorted(Path("csrc/cuda").glob("*.cu")):
        commands.append(compile_command(device, source, folder / f"{source.stem}.o"))
    return commands


def includes() -> list[str]:
    import pybind11

    return ["-Icsrc", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def compile_command(flags: list[str], source: Path, target: Path) -> list[str]:
    return [*flags, "-MMD", "-MF", f"{target}.d", "-c", str(source), "-o", str(target)]


def knows(flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "empty.cpp").write_text("")
        command = [*CXX, *flags, "-c", f"{folder}/empty.cpp", "-o", f"{folder}/empty.o"]
        return subprocess.run(command, capture_output=True).returncode == 0


def ninja() -> str | None:
    return shutil.which("ninja")


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def run_ninja(folder: Path, compiles: list[list[str]], link: list[str]) -> None:
    quote = lambda command: shlex.join(command).replace("$", "$$")
    path = lambda text: text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
    lines = [
        f"builddir = {path(str(folder))}",
        "rule run",
        "  command = $do",
        "rule compile",
        "  command = $do",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for command in compiles:
        lines += [f"build {path(command[-1])}: compile {path(command[-3])}", f"  do = {quote(command)}"]
    lines += [f"build {path(link[-1])}: run {' '.join(path(c[-1]) for c in compiles)}", f"  do = {quote(link)}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    run([ninja(), "-f", str(folder / "build.ninja"), "-j", str(jobs())])


def run_plain(compiles: list[list[str]], link: list[str]) -> None:
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(run, compiles))
    run(link)


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise CompileError(f"fastdiff: failed: {shlex.join(command)}")


setup(
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels"],
    package_dir={"fastdiff.kernels": "kernels/src"},
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
)
