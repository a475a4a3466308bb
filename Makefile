PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint docs bench clean

demo: $(VENV)/.run
	$(BIN)/trimtab demo -o out/demo

test: lint
	$(BIN)/pytest -n 2 -q

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	$(BIN)/python -m benchmarks

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("trimtab needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(PIP) -e '.[onnx]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) out site
