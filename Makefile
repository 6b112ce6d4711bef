# Everything sets itself up in .venv; nothing else has to be installed but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo evaluate test test-precision lint types smoke extras gpu world clean
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

# One process per core, with one thread each: the tests' pipelines are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
test: $(VENV)/.dev
	$(PYTEST)

# What depends on the precision of training: once as on a processor without bfloat16 units, once as on one with them.
PRECISION_TESTS := tests/training tests/saes tests/cli tests/capture tests/adapters/test_stylegan2_training.py \
		tests/adapters/test_vector_vae.py
test-precision: $(VENV)/.dev
	for precision in float32 bfloat16; do \
		DIFFUSERS_SAE_PRECISION=$$precision $(PYTEST) $(PRECISION_TESTS) || exit 1; \
	done

# Every benchmark and example at its smallest size.
smoke: $(VENV)/.dev
	$(BIN)/python benchmarks/smoke.py

# What needs the peers, which don't agree with ours about versions and so have an environment of their own.
PEERS := .venv-peers
$(PEERS)/.peers: setup.cfg constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers.txt
	touch $@

extras: $(PEERS)/.peers
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -m peers tests/loaders/test_peers.py
	$(PEERS)/bin/python benchmarks/training_speed.py --smoke \
		--sides diffusers_sae,sparsify,dictionary_learning,sae_lens,overcomplete
	$(PEERS)/bin/python benchmarks/ground_truth.py --smoke \
		--only diffusers_sae,sparsify,dictionary_learning,sae_lens,overcomplete

# What wants a GPU: tests and figures. Without one it says what it would run.
gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py

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
	rm -rf $(VENV) $(PEERS) outputs build *.egg-info
