# `make demo` and `make test` do everything on a machine that has python3 and make.
#   PYTHON=python3.12   the interpreter the virtual environment is made with
#   VENV=DIR            use or make the environment there (default .venv)
#   RUNTIME=gpu         onnxruntime-gpu instead of onnxruntime (default cpu; never both)

PYTHON ?= python3
VENV ?= .venv
RUNTIME ?= cpu
OUT ?= out
BIN := $(VENV)/bin

OTHER := $(if $(filter gpu,$(RUNTIME)),cpu,gpu)
DISTRIBUTION_cpu := onnxruntime
DISTRIBUTION_gpu := onnxruntime-gpu

EXTRAS_demo := $(RUNTIME)
EXTRAS_test := $(RUNTIME),optimum,rtx,test
EXTRAS_dev := $(RUNTIME),optimum,rtx,test,dev

.PHONY: help demo test lint wheel-check schemas clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         make the shipped model faster, prove and measure it; a page in $(OUT)/"
	@echo "make test         all tests (GPU and browser tests skip with a reason where there is none)"
	@echo "make lint         ruff, mypy --strict, import-linter"
	@echo "make wheel-check  build the wheel, install it clean, run it"
	@echo "make schemas      write the JSON Schemas of the code into sdcompress/schemas/"
	@echo "make clean        remove the environment and what the demo wrote"

demo: $(VENV)/.installed-demo-$(RUNTIME)
	$(BIN)/sdcompress run edge -o $(OUT)
	@echo "The page: $(OUT)/report.html"

test: $(VENV)/.installed-test-$(RUNTIME)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/integration tests/gpu

lint: $(VENV)/.installed-dev-$(RUNTIME)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

schemas: $(VENV)/.installed-dev-$(RUNTIME)
	$(BIN)/python -m sdcompress.commands._schemas

wheel-check: $(VENV)/.installed-dev-$(RUNTIME)
	$(BIN)/python .ci/wheel_check.py

clean:
	rm -rf $(VENV) $(OUT)

# One recipe for the three sets; pip is asked again only when what it reads has changed. The other
# runtime goes first: both install the same files, and would break each other.
$(VENV)/.installed-%-$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	@rm -f $(VENV)/.installed-*-$(OTHER)
	@$(BIN)/pip uninstall --quiet --yes $(DISTRIBUTION_$(OTHER)) 2>/dev/null
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[$(EXTRAS_$*)]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv does not work here; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
