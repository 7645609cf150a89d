# Two commands do everything: `make demo` and `make test`. Both make the virtual environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Test processes side by side, of 2 to 3 GB each and on one thread: the threads of several would wait for each other.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: demo test install lint types unit notebooks browser bench clean

demo: $(READY)
	$(BIN)/tracelens demo --out demo

test: lint types unit notebooks browser

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright

unit: $(READY)
	$(PYTEST) --numprocesses $(WORKERS) --dist loadfile --ignore tests/browser --jaxtyping-packages=tracelens,beartype.beartype

notebooks: $(READY)
	$(PYTEST) --numprocesses $(WORKERS) --nbmake --nbmake-timeout=600 -p no:cacheprovider notebooks

# One after the other: a browser, a JupyterLab and a kernel are at work at a time.
browser: $(READY)
	$(PYTEST) tests/browser --jaxtyping-packages=tracelens,beartype.beartype

bench: $(READY)
	@for name in pair audit sweep moments smearing loading patching widgets; do echo "== bench_$$name"; $(BIN)/python -m tests.benchmarks.bench_$$name || exit 1; done

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
