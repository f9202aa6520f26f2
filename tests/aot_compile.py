"""Compiles the Triton kernels without a GPU and prints what came out as JSON: `python tests/aot_compile.py ARCH ...`.

A script of its own because the tests run with Triton's interpreter, which turns every kernel into plain Python.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff.kernels import gram, philox_normal, solver_step

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_KNOWN = {"tick_ptr": "*i32", "meta_ptr": "*i32", "rows_ptr": "*i32", "source_ptr": "*i32", "seed_ptr": "*i64"}
_KNOWN |= {"step_ptr": "*i32", "stream_ptr": "*i32", "partial_ptr": "*fp64"}


def _source(kernel, types: dict[str, str], constants: dict, aligned: tuple[str, ...]) -> ASTSource:
    """Unnamed arguments are int32; pointers and `aligned` sizes are multiples of 16, as at run time."""
    signature, attrs = {}, {}
    for position, name in enumerate(kernel.arg_names):  # positions count constants too
        signature[name] = "constexpr" if name in constants else types.get(name, _KNOWN.get(name, "i32"))
        if name not in constants and (signature[name].startswith("*") or name in aligned):
            attrs[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attrs)


def _step(
    model: str, outputs: int, slots: int, state: str = "fp32", flat: bool = True, field: bool = False, extra=False
):
    types = {f"{name}_ptr": "*" + state for name in ("x", "history", "aux", "coef")}
    types |= {"input_ptr": "*bf16"} | {f"m{j}_ptr": "*" + model for j in range(outputs)}
    constants = {"OUTPUTS": outputs, "SLOTS": slots, "FLAT": flat, "FIELD": field, "BLOCK": solver_step.BLOCK}
    constants |= {f"m{j}_ptr": None for j in range(outputs, 4)} | (
        {} if extra else {"aux_ptr": None, "source_ptr": None}
    )
    constants |= {f"m{j}_stride_e": 1 for j in range(outputs)} if flat else {}
    aligned = ("n", *(f"m{j}_stride_b" for j in range(4)))
    return _source(solver_step.solver_step_kernel, types, constants, aligned), solver_step.OPTIONS


def _gram(dtype: str, count: int):
    types = {f"v{i}_ptr": "*" + dtype for i in range(count)}
    constants = {f"v{i}_ptr": None for i in range(count, gram.MAX_OPERANDS)}
    constants |= {f"v{i}_stride_e": 1 for i in range(count)}
    constants |= {"N": count, "FLAT": True, "BLOCK": gram.BLOCK, "LANES": gram.LANES, "CHUNK": gram.CHUNK}
    constants["TYPE"] = triton.language.float64 if dtype == "fp64" else triton.language.float32
    aligned = ("n", *(f"v{i}_stride_b" for i in range(count)))
    return _source(gram.gram_kernel, types, constants, aligned), gram.OPTIONS


def _normal():
    types = {"out_ptr": "*fp32"}
    constants = {"BLOCK": philox_normal.BLOCK}
    return _source(philox_normal.philox_normal_kernel, types, constants, ("n",)), philox_normal.OPTIONS


def _finish():
    constants = {"N": 4, "BLOCK": gram.FINISH_BLOCK}
    return _source(gram.gram_finish_kernel, {"out_ptr": "*fp64"}, constants, ()), {"num_warps": 1}


CASES = {
    "philox_normal": _normal,
    "solver_step: guided bf16, 2 slots": lambda: _step("bf16", 2, 2),
    "solver_step: guided fp32, 3 slots": lambda: _step("fp32", 2, 3),
    "solver_step: everything, fp32": lambda: _step("fp32", 4, 5, extra=True),
    "solver_step: strided fp16": lambda: _step("fp16", 2, 2, flat=False),
    "solver_step: coefficient fields": lambda: _step("fp32", 2, 2, flat=False, field=True),
    "solver_step: float64": lambda: _step("fp32", 2, 3, state="fp64"),
    "gram: 2 fp32": lambda: _gram("fp32", 2),
    "gram: 4 bf16": lambda: _gram("bf16", 4),
    "gram: 8 fp32": lambda: _gram("fp32", 8),
    "gram: 3 fp64": lambda: _gram("fp64", 3),
    "gram_finish": _finish,
}


def _measure(case: str, arch: int) -> dict:
    source, options = CASES[case]()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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
        "registers": number("REG"),
        "stack": number("STACK") + number("LOCAL"),
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "instructions": len(opcodes),
        "local": starts("LDL", "STL"),
        "wide_loads": sum("LDG" in opcode and ".128" in opcode for opcode in opcodes),
        "wide_stores": sum("STG" in opcode and ".128" in opcode for opcode in opcodes),
        "atomics": starts("ATOM", "RED."),
        "contracted": len(re.findall(r"\bfma\.", compiled.asm["ptx"])),
    }


if __name__ == "__main__":
    json.dump({arch: {case: _measure(case, int(arch)) for case in CASES} for arch in sys.argv[1:]}, sys.stdout)
