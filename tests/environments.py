"""The version matrix: a wheel of this repository in fresh environments, `python tests/environments.py --folder DIR`.

Makes one environment per version of torch, puts each version of diffusers into it in turn, installs the wheel (built once: it does
not depend on torch), and runs `environments_use.py` there. Prints one line per pair; exit code 1 where one fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH, DIFFUSERS = ("2.7.0", "2.13.0"), ("0.36.0", "0.42.1")


def build_wheel(folder: Path) -> Path:
    """The wheel with the CPU kernels; compiles only what changed since the last build in this tree."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, env={**os.environ, "FASTDIFF_CUDA": "0"})
    return next(folder.glob("fastdiff_engine-*.whl"))


def environment(folder: Path, torch: str, wheel: Path) -> Path:
    """The Python of an environment with this torch and the wheel; an existing one is used again."""
    python = folder / f"torch-{torch}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    pip(python, f"torch=={torch}")
    pip(python, wheel)
    pip(python, "--force-reinstall", "--no-deps", wheel)
    return python


def pip(python: Path, *packages: object) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)


def use(python: Path, diffusers: str) -> dict:
    """What `environments_use.py` reports, or the end of what it said when it failed."""
    pip(python, f"diffusers=={diffusers}", "transformers>=4.56", "sentencepiece", "safetensors")
    command = [python, "-W", "ignore", Path(__file__).with_name("environments_use.py")]
    with tempfile.TemporaryDirectory() as elsewhere:
        # networks of a few thousand parameters only wait for a second thread
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=elsewhere, env=one_thread, capture_output=True, text=True)
    if done.returncode:
        return {"passed": False, "diffusers": diffusers, "error": (done.stderr or done.stdout)[-1500:]}
    return {"passed": True, **json.loads(done.stdout.splitlines()[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the environments are (about 6 GB for a torch with CUDA)"
    )
    parser.add_argument("--torch", nargs="+", default=TORCH)
    parser.add_argument("--diffusers", nargs="+", default=DIFFUSERS)
    parser.add_argument("--wheel", type=Path, help="do not build one, take this")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    wheel, passed = args.wheel or build_wheel(folder), True
    for torch in args.torch:
        python = environment(folder, torch, wheel)
        for diffusers in args.diffusers:
            record = use(python, diffusers)
            passed = passed and record["passed"]
            print(json.dumps(record), flush=True)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
