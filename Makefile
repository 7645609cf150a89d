# Two commands do everything: `make demo` and `make test`. Both make the virtual environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test install lint types unit notebooks bench clean

demo: $(READY)
	$(BIN)/tracelens demo --out demo

test: lint types unit notebooks

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
	$(BIN)/pytest --jaxtyping-packages=tracelens,beartype.beartype

notebooks: $(READY)
	$(BIN)/pytest --nbmake --nbmake-timeout=600 -p no:cacheprovider notebooks

bench: $(READY)
	@for name in pair audit sweep moments smearing loading patching; do echo "== bench_$$name"; $(BIN)/python -m tests.benchmarks.bench_$$name || exit 1; done

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
