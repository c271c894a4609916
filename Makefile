# The commands of the project. Set-up needs Python 3.11 or newer with venv; everything it installs goes into .venv.
#
#   make demo         set up .venv and run the main job once: `dicomnode demo` into a fresh ./demo-out
#   make test         set up .venv with the test tools, check style, types and import direction, run the tests
#   make test-system  install with apt what the `system` tests need (Orthanc, DCMTK, PostgreSQL, …), then make test
#   make test-long    the tests marked `long`: hours or high counts
#   make format       let ruff rewrite the code in the project's style
#
# ARGS is handed to `dicomnode demo` (make demo ARGS='--input FOLDER --out DIR'), PYTEST_ARGS to pytest. The tests run in WORKERS
# processes; PYTEST_ARGS=-n0 runs them in one, for a debugger or an order of your own.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 3
# Images of containers like to set this. Then each of the hundred processes that tests and node start would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

start := $(shell date +%s)
seconds = $$(( $$(date +%s) - $(start) ))
has_python = $(shell $(PYTHON) -c 'import sys, venv, ensurepip; print(int(sys.version_info >= (3, 11)))' 2>/dev/null)
require_python = $(if $(filter 1,$(has_python)),,$(error dicomnode needs Python 3.11 or newer with its venv module (Debian: python3-venv), and `$(PYTHON)` is not that))
# --no-compile: bytecode is written on first import, for what is imported only
pip_install = $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-system test-long check format
.NOTPARALLEL:

demo: $(VENV)/run.stamp
	@echo "set-up took $(seconds) s"
	@$(if $(findstring --out,$(ARGS)),,rm -rf demo-out)
	@$(BIN)/dicomnode demo $(ARGS); status=$$?; echo "make demo took $(seconds) s"; exit $$status

test: check
	@echo "set-up and static checks took $(seconds) s; pytest tells its own time below"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-system:
	@bash .ci/run

test-long: $(VENV)/test.stamp
	@$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

check: $(VENV)/test.stamp
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/test.stamp
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(require_python)
	@echo "setting up $(VENV) with what the node needs to run: one to three minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(pip_install) -e .
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt
	$(require_python)
	@echo "setting up $(VENV) with what the tests need: one to four minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(pip_install) -e '.[test]'
	@touch $(VENV)/run.stamp $@
