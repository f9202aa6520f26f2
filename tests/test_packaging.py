"""The shape of the repository: who imports whom, what lies where, what a user gets."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastdiff

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "fastdiff").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "kernels/src").glob("*.py")), *sorted((ROOT / "csrc").rglob("*.*"))]

# a layer may import itself and the layers named here, besides `fastdiff` itself
_OPS = {"kernels"}
_MIDDLE = _OPS | {"ops"}
_LOOP = _MIDDLE | {"guidance", "graph", "cache", "temporal", "program", "quant", "models", "process", "solvers"}
LAYERS = {
    "kernels": set(),
    "ops": _OPS,
    "process": _MIDDLE,
    "solvers": _MIDDLE | {"process"},
    "guidance": _MIDDLE | {"process"},
    "graph": _MIDDLE,
    "cache": _MIDDLE,
    "temporal": _MIDDLE,
    "program": _MIDDLE | {"graph"},
    "quant": _MIDDLE | {"temporal"},
    "models": _MIDDLE | {"process", "temporal", "program", "cache"},
    "sampler": _LOOP,
    "quantized": _LOOP | {"sampler"},
    "artefact": _LOOP | {"sampler"},
    "engine": _LOOP | {"sampler"},
}
# files of the top level that are parts of the sampler
SAMPLER = {"sampler", "arguments", "loop", "carry", "plan", "conditioning", "initial", "plain", "images"}


def _imports(file: Path) -> set[str]:
    """The first part under `fastdiff` of everything that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastdiff"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastdiff.")}
    return found


def _layer(name: str) -> str:
    return "sampler" if name in SAMPLER else name


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downwards(layer):
    files = sorted((ROOT / "kernels/src").glob("*.py")) if layer == "kernels" else []
    for file in PACKAGE:
        name = file.relative_to(ROOT / "fastdiff").parts[0].removesuffix(".py")
        if _layer(name) == layer:
            files.append(file)
    for file in files:
        other = {_layer(name) for name in _imports(file)} - {layer} - LAYERS[layer]
        assert not other & (
            LAYERS.keys() | {"pipeline", "engine", "steering", "inverse", "editing", "tokens", "cli"}
        ), f"{file.relative_to(ROOT)} imports {sorted(other)}"


def test_only_the_drop_in_imports_diffusers():
    allowed = {"pipeline.py", "verify.py", "diffusers.py"}
    for file in PACKAGE:
        if re.search(r"^\s*(import|from) diffusers", file.read_text(), re.M):
            assert file.name in allowed or "diffusers" in file.read_text().split('"""')[1], file


def test_folders_keep_their_rules():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow another package called kernels"
    assert not list((ROOT / "kernels").glob("triton"))
    assert not [f for f in ROOT.glob("*/**/utils.py") if ".venv" not in f.parts and "build" not in f.parts]
    for file in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text()), file


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_file_is_short(file):
    assert len(file.read_text().splitlines()) <= 400


def test_nothing_in_the_package_runs_foreign_code():
    banned = {"pickle", "marshal", "shelve", "joblib", "dill"}
    for file in PACKAGE:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not banned & {name.split(".")[0] for name in names}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "os.system", "__import__"), f"{file}: {called}"
                assert not [k for k in node.keywords if k.arg == "trust_remote_code"], file


def test_no_hosts_and_no_paths_of_a_machine():
    for file in [*SOURCES, *ROOT.glob("*.toml"), ROOT / "Makefile", ROOT / "constraints.txt", ROOT / "setup.py"]:
        text = file.read_text()
        assert not re.search(r"/(home|root|work|Users)/\w", text), file
        assert not re.search(r"(pypi|pythonhosted|debian)\.org", text), file


def test_import_is_light():
    heavy = ("diffusers", "matplotlib", "PIL", "rich", "tqdm", "triton", "scipy", "transformers", "fastdiff._cpu")
    code = f"""import time, torch, sys
before = set(sys.modules)
begin = time.process_time()
import fastdiff
print(time.process_time() - begin, [m for m in sys.modules.keys() - before if m.startswith("fastdiff.")])
every = [getattr(fastdiff, name) for name in fastdiff.__all__]
print([m for m in {heavy} if m in sys.modules.keys() - before])"""
    told, loaded = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert float(told.split()[0]) < 0.2 and told.split(maxsplit=1)[1] == "[]"
    assert loaded == "[]", "every public name is there without what is heavy"


def test_names_load_once_and_misspelt_ones_are_errors():
    assert set(dir(fastdiff)) > set(fastdiff.__all__) and fastdiff.Sampler is fastdiff.sampler.Sampler
    from fastdiff import acceleration

    # no module may have the name of a function: loading it would put it in the function's place
    names = set(fastdiff.__all__)
    assert not [file for file in PACKAGE if file.parent.name == "fastdiff" and file.stem in names]
    assert fastdiff.accelerate is acceleration.accelerate
    with pytest.raises(AttributeError, match="no attribute 'samplr'"):
        fastdiff.samplr  # noqa: B018
    stub = ast.parse((ROOT / "fastdiff/__init__.pyi").read_text())
    listed = next(node for node in stub.body if isinstance(node, ast.Assign)).value
    assert sorted(ast.literal_eval(listed)) == sorted({*names, "FastdiffConfig"})


def test_version_has_one_value():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert version == fastdiff.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from the unpacked source distribution, in isolation from the repository."""
    folder = tmp_path_factory.mktemp("dist")
    build = "from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"

    def run(step: str, where: Path) -> Path:
        environment = {**os.environ, "FASTDIFF_CUDA": "0"}
        command = [sys.executable, "-c", build, step, str(folder)]
        out = subprocess.check_output(command, cwd=where, env=environment, text=True)
        return folder / out.splitlines()[-1]

    archive = run("build_sdist", ROOT)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return run("build_wheel", folder / archive.name.removesuffix(".tar.gz"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_from_the_source_distribution_works(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("fastdiff/py.typed", "fastdiff/__init__.pyi", "fastdiff/kernels/__init__.py"):
        assert wanted in names
    assert [n for n in names if n.startswith("fastdiff/_cpu") and n.endswith(".so")]
    assert not [n for n in names if n.startswith(("tests/", "bench/", "csrc/"))]
    for file in ROOT.glob("fastdiff/models/bundled/**/*.safetensors"):
        assert str(file.relative_to(ROOT)) in names
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        f"import sys; sys.path[:0] = [{str(target)!r}]; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "import torch, fastdiff, fastdiff.kernels\n"
        "from fastdiff.ops import native, philox_normal\n"
        "i = torch.arange(3); print(fastdiff.__file__, native.cpu().isa(), philox_normal(i, i.int(), i.int(), 4).shape)\n"
    )
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    assert out.startswith(str(target)) and "torch.Size([3, 4])" in out


@pytest.mark.slow
def test_a_missing_compiler_says_so_in_one_line(tmp_path):
    code = "import runpy, sys; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py', run_name='__main__')"
    environment = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "FASTDIFF_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("fastdiff:")]
    assert told == [
        "fastdiff: no C++ compiler (no-such-compiler); installing without native code, ops run on their torch reference"
    ]
