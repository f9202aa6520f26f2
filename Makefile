# make demo   sets everything up in .venv and draws pictures with the bundled model into out/sample.png
# make test   the same set-up, then the tests

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fastdiff-installed
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test
demo: $(STAMP)
	@mkdir -p out
	@$(PY) -m fastdiff sample --out out/sample.png

test: $(STAMP)
	@$(PY) -m pytest -q

# one set of extras for both, so that nothing is installed twice
$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "fastdiff needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 2; }
	@set -- $${CXX:-g++}; for last in "$$@"; do :; done; command -v "$$last" >/dev/null || \
	  echo "no C++ compiler ($$last): using the slow torch reference; apt-get install g++ for the fast kernels"
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed: apt-get install python3-venv"; exit 2; }
	@echo "installing into $(VENV), a few minutes the first time"
	@$(PY) -m pip install --quiet --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@
