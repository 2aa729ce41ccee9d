# The everyday jobs. Each installs what it needs into .venv the first time, and again only when
# pyproject.toml or constraints.txt change.
#
#   make profile   measure every backend of biformer_tiny on this machine (under 3 minutes on 2 slow cores)
#   make test      the tests, then the Triton kernels in Triton's interpreter
#   make faults    the table of docs/faults.md: every fault, many times (minutes)
#   make check     ruff, ruff format, mypy --strict
#   make wheels    wheels with the C kernels inside, for x86-64 and Arm (the compiler is a download of 100 MB)
#   make gpu       on a machine with an NVIDIA GPU: the GPU tests and the measurements worth keeping

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: profile test faults check wheels gpu clean

profile: $(VENV)/.installed
	$(BIN)/bratune profile

test: $(VENV)/.tests
	$(BIN)/python -m pytest -q -n 3 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m interpreter tests/kernels tests/predict

faults: $(VENV)/.tests
	$(BIN)/python tests/run/fault_table.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheels: $(VENV)/.dev
	$(INSTALL) --editable '.[native]' wheel
	.ci/wheels

gpu:
	.ci/gpu

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# torch comes first and alone, so that the build at hand is taken and nothing replaces it later.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch triton
	touch $@

# Each holds what those before it hold, so that one installation does for all of them.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable .
	touch $@

$(VENV)/.tests: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[test]'
	touch $(VENV)/.installed $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[test,dev]'
	touch $(VENV)/.installed $(VENV)/.tests $@
