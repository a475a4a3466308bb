# make demo: install into .venv and audit a small network; make test: all checks. Only Python >= 3.11, git and make are needed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
VISION ?= .venv-vision

.DEFAULT_GOAL := help
.PHONY: help demo test test-vision lint docs claims bench clean

help:
	@echo "make demo    train a small network, audit it, leave the report in out/demo"
	@echo "make test    ruff, mypy, import-linter, pytest"
	@echo "make test-vision  pytest with timm, open_clip and torchvision, in an environment of their own"
	@echo "make lint    the first three of these"
	@echo "make docs    build the documentation into site/"
	@echo "make claims  measure the quick claims again and compare with the published verdicts"
	@echo "make bench   time trimtab against its peers"
	@echo "make clean   remove what the others made"

demo: $(VENV)/.run
	$(BIN)/trimtab demo -o out/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q

test-vision: $(VISION)/.dev
	OMP_NUM_THREADS=1 $(VISION)/bin/pytest -n 2 -q -m vision tests/adaptation

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

claims: $(VENV)/.run
	$(BIN)/trimtab claims check --fast

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "trimtab needs Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("trimtab needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# each level holds the ones before it, so that a later make of an earlier one installs nothing
$(VENV)/.run: $(BIN)/pip pyproject.toml constraints.txt
	@echo "installing trimtab into $(VENV): a few minutes the first time"
	$(PIP) -e '.[onnx]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[bench]'
	@touch $@

# torchvision needs another torch than the one that everything else runs with
$(VISION)/.dev: pyproject.toml constraints-vision.txt
	$(PYTHON) -m venv $(VISION)
	@echo "installing timm, open_clip and torchvision into $(VISION): some minutes and 6 GB the first time"
	$(VISION)/bin/pip install --quiet --disable-pip-version-check -c constraints-vision.txt -e '.[vision-dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(VISION) out site
