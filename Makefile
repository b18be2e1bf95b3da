# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Flower must not phone home nor install anything at run time.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0
# Idle threads sleep instead of spinning: two shared cores are the machine this is built for.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test lint types unit test-deploy accept-path accept-privacy accept-models accept-consortium accept-release accept-deployment clean install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 13), "medgen needs Python 3.11 or 3.12; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/medgen simulate demo

test: install lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest

# Real SuperLink, SuperNodes and agents as processes: minutes.
test-deploy: install
	$(BIN)/pytest -m deployed

accept-path: install
	$(BIN)/python tests/acceptance/path.py $(if $(LINES),--lines $(LINES))

accept-privacy: install
	$(BIN)/python tests/acceptance/privacy.py $(if $(LINES),--lines $(LINES)) $(if $(WORK),--work $(WORK))

accept-models: install
	$(BIN)/python tests/acceptance/models.py $(if $(LINES),--lines $(LINES)) $(if $(WORK),--work $(WORK))

accept-consortium: install
	$(BIN)/python tests/acceptance/consortium.py $(if $(LINES),--lines $(LINES)) $(if $(WORK),--work $(WORK))

# Also looks at PDFs, so it installs the extra that draws them.
accept-release: install
	$(BIN)/pip install --quiet --editable '.[dev,pdf]'
	$(BIN)/python tests/acceptance/release.py $(if $(LINES),--lines $(LINES)) $(if $(WORK),--work $(WORK))

accept-deployment: install
	$(BIN)/python tests/acceptance/deployment.py $(if $(WORK),--work $(WORK))

clean:
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
