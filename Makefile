# Everything sets itself up in .venv; nothing else has to be installed but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo evaluate test lint types world clean
.DEFAULT_GOAL := demo

$(VENV)/.demo: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[evaluate]"
	touch $@

$(VENV)/.dev: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/diffusers-sae demo

evaluate: $(VENV)/.demo
	$(BIN)/diffusers-sae evaluate

# One process a core, with one thread each: the tests' pipelines are too small for more.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Trains everything that ships again, from the drawings on; hours on a CPU. Every step goes on where it was stopped.
world: $(VENV)/.demo
	$(PIP) --editable ".[world]"
	for step in sprites train_autoencoder train_clip train_unet train_judge train_sae choose_steering train_kandinsky \
			ship; do \
		$(BIN)/python examples/emoji_world/$$step.py || exit 1; \
	done

clean:
	rm -rf $(VENV) outputs build *.egg-info
