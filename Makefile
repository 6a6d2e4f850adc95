# make demo: set up and run the main job · make test: set up and test · make check: style, types, rooms, size
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TORCH := torch==2.13.0
RUN_IN := OMP_NUM_THREADS=1 $(BIN)/python

.PHONY: demo test slow check size bench docs fuzz setup
setup: $(STAMP)

# torch first and alone, unless one is there: then nothing pulls a second build (README, "Set-up"). constraints.txt pins
# the rest.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, found {v[0]}.{v[1]}; set PYTHON=")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/gambeson run digits

test: $(STAMP)
	$(RUN_IN) -m pytest -n 2 --dist loadfile

slow: $(STAMP)
	$(RUN_IN) -m pytest -m slow --timeout 3600

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python dev/shape.py

size: $(STAMP)
	$(BIN)/python dev/shape.py --all

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/python docs/tools/links.py site

fuzz: $(STAMP)
	$(RUN_IN) -m tests.fuzz.run --seconds $${SECONDS_EACH:-60}

bench: $(STAMP)
	$(RUN_IN) benchmarks/side_by_side.py
