"""diffusers' own tests, unmodified, on our schedulers, accelerated modules and attention: the same pass as without us."""

import os
import re
import subprocess
import sys

import pytest

SUITES = {
    "swap_schedulers": ["tests/schedulers"],
    "accelerate_modules": ["tests/hooks"],
}
BACKENDS = ["flux", "wan", "ltx"]
TREE = os.environ.get("FASTDIFF_DIFFUSERS_TREE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not TREE, reason="set FASTDIFF_DIFFUSERS_TREE to an unpacked source tree of diffusers"),
]


def _run(*arguments: str) -> tuple[str, set[str]]:
    """What pytest prints in the tree, and the names of the tests that pass."""
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-rA", "-p", "no:cacheprovider"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(command, cwd=TREE, env=env, capture_output=True, text=True).stdout
    return out, set(re.findall(r"^PASSED (\S+)", out, re.M))


@pytest.mark.parametrize("plugin", SUITES)
def test_the_same_tests_pass(plugin):
    _, stock = _run(*SUITES[plugin])
    out, ours = _run(*SUITES[plugin], "-p", f"fastdiff.testing.{plugin}")
    assert len(stock) > 10 and stock <= ours
    if plugin == "swap_schedulers":
        fused, left = map(int, re.search(r"(\d+) steps on the fused kernel, (\d+) on diffusers", out).groups())
        assert len(stock) > 500 and fused > 4 * left
    else:
        assert int(re.search(r"(\d+) modules of", out).group(1)) > 10


def test_tests_of_attention_backends_pass_with_ours():
    files = [f"tests/models/transformers/test_models_transformer_{name}.py" for name in BACKENDS]
    _, passed = _run(*files, "-m", "attention", "-k", "fastdiff", "-p", "fastdiff.testing.attention_backend")
    assert len(passed) >= 3 * len(BACKENDS)
