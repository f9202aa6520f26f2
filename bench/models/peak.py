"""The arithmetic limits of this machine, measured with register-only loops: G(FL)OP/s by precision."""

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

# one multiply-add instruction on 12 independent accumulators, as many vectors as hide its latency; widest unit first
_LOOP = """
#include <immintrin.h>
#include <omp.h>
extern "C" void spin(int threads, long n) {
  #pragma omp parallel num_threads(threads)
  {
    TYPE c[12], a = {}, b = {};
    for (int i = 0; i < 12; ++i) c[i] = a;
    for (long k = 0; k < n; ++k) {
      asm volatile(BODY : "+v"(c[0]), "+v"(c[1]), "+v"(c[2]), "+v"(c[3]), "+v"(c[4]), "+v"(c[5]), "+v"(c[6]), "+v"(c[7]),
                   "+v"(c[8]), "+v"(c[9]), "+v"(c[10]), "+v"(c[11]) : "v"(a), "v"(b));
    }
  }
}
"""
_CALLS = 12 * 400_000
# precision -> (cpu flag, instruction, vector type, operations per instruction), best first
_UNITS = {
    "int8": (
        ("avx512_vnni", "vpdpbusd", "__m512i", 128),
        ("avx_vnni", "{vex} vpdpbusd", "__m256i", 64),
    ),
    "bf16": (("avx512_bf16", "vdpbf16ps", "__m512", 64),),
    "fp32": (("avx512f", "vfmadd231ps", "__m512", 32), ("fma", "vfmadd231ps", "__m256", 16)),
}


def measure(threads: int, tries: int = 200) -> dict[str, float]:
    """Best of `tries` short runs per precision; a precision without an instruction, or a machine without a compiler, is absent."""
    flags = _cpu_flags()
    found = {}
    for precision, units in _UNITS.items():
        unit = next((unit for unit in units if unit[0] in flags), None)
        spin = _compile(*unit[1:3]) if unit else None
        if spin:
            seconds = min(_seconds(spin, threads) for _ in range(tries))
            found[precision] = threads * _CALLS * unit[3] / seconds / 1e9
    return found


def _compile(instruction: str, vector: str):
    body = "".join(f'"{instruction} %13, %12, %{i}\\n"' for i in range(12))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "spin.cpp"), Path(folder, "spin.so")
        source.write_text(_LOOP.replace("TYPE", vector).replace("BODY", body))
        command = ["c++", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return ctypes.CDLL(str(library)).spin


def _seconds(spin, threads: int) -> float:
    start = time.perf_counter()
    spin(ctypes.c_int(threads), ctypes.c_long(_CALLS // 12))
    return time.perf_counter() - start


def _cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return set(next(line for line in file if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return set()
