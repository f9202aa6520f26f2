"""Compiles the Triton kernels without a GPU and prints what came out as JSON: `python tests/aot_compile.py [--fast] ARCH ...`.

A script of its own because the tests run with Triton's interpreter, which turns every kernel into plain Python.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

import triton
from aot_attention import ATTENTION
from aot_cases import MEMORY, SOLVER, Case
from aot_conv2d import CONV2D
from aot_linear import LINEAR
from triton.backends.compiler import GPUTarget

CASES = {**SOLVER, **MEMORY, **ATTENTION, **LINEAR, **CONV2D}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _measure(case: Case, arch: int) -> dict:
    source, options = case.build()
    start = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([_CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    number = lambda key: int(re.search(rf"\b{key}:(\d+)", usage)[1])
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    starts = lambda *names: sum(opcode.startswith(names) for opcode in opcodes)
    return {
        "seconds": seconds,
        "registers": number("REG"),
        "stack": number("STACK") + number("LOCAL"),
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "instructions": len(opcodes),
        "local": starts("LDL", "STL"),
        "wide_loads": sum("LDG" in opcode and ".128" in opcode for opcode in opcodes),
        "wide_stores": sum("STG" in opcode and ".128" in opcode for opcode in opcodes),
        "atomics": starts("ATOMG", "ATOM.", "RED.", "REDG"),  # in global memory; tensor memory is allocated by ATOMS
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "opcodes": {name: starts(name) for name in dict(case.opcodes).get(arch, ())},
        "allowed": {"wide": case.wide, "stack": case.stack, "blocks": case.blocks},
        "contracted": len(re.findall(r"\bfma\.", compiled.asm["ptx"])),
    }


if __name__ == "__main__":
    fast = "--fast" in sys.argv
    archs = [int(name) for name in sys.argv[1:] if name.isdigit()]
    wanted = lambda case, arch: arch in case.archs and (case.fast or not fast)
    found = {arch: {n: _measure(case, arch) for n, case in CASES.items() if wanted(case, arch)} for arch in archs}
    json.dump(found, sys.stdout)
