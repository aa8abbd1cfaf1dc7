# Everything here works on a fresh machine with Python >= 3.11 and make: the targets set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# One environment for all targets, updated when the dependencies change.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipmini needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[app,demo,lora,onnx,ray,search,serve,dev]'
	touch $@

.PHONY: demo
demo: .venv/.installed  ## train on the included photographs, measure, search and draw: a minute on 2 cores, once installed
	$(BIN)/clipmini train demo --overwrite
	$(BIN)/python examples/demo.py

.PHONY: test
test: .venv/.installed  ## run the fast tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: test-all
test-all: .venv/.installed  ## run all tests, including the slow ones
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps clip-benchmark  # a peer to compare with
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mteb  # another, whose scipy is newer than our lowest
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m 'not gpu and not versions'

.PHONY: test-versions
test-versions: .venv/.installed  ## load a saved folder under five versions of transformers, each in its own environment
	$(BIN)/python -m pytest -m versions tests/versions

# All extras but `app`, since gradio asks for newer versions of what the rest shares.
LOWEST := .venv/lowest
.PHONY: test-lowest
test-lowest:  ## run the fast tests with the lowest versions that pyproject.toml allows, in an environment of their own
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --upgrade --python $(LOWEST) --resolution lowest-direct --editable '.[demo,excel,heic,lora,onnx,ray,search,serve,dev]'
	$(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4

.PHONY: check
check: .venv/.installed  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: fix
fix: .venv/.installed  ## format the code and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

FLICKR8K ?= ../shared/data/flickr8k
.PHONY: bench
bench: .venv/.installed  ## measure the figures of benchmarks/README.md, in hours; FLICKR8K=FOLDER with its parquet files
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/images.py
	$(BIN)/python benchmarks/scan.py
	$(BIN)/python benchmarks/rows.py
	$(BIN)/python benchmarks/ranking.py
	$(BIN)/python benchmarks/ranking.py --num-kept 10
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/recipes.py --source $(FLICKR8K)
	$(BIN)/clipmini train flickr8k --set source=$(FLICKR8K) --set output_dir=runs/bench-flickr8k --overwrite
	$(BIN)/python benchmarks/encoding.py runs/bench-flickr8k/model --source $(FLICKR8K)
	$(BIN)/python benchmarks/bank.py runs/bench-flickr8k/model --source $(FLICKR8K) --gallery offline:photos
	$(BIN)/python benchmarks/fine_tuning.py --folder runs/bench-parts
	$(BIN)/python benchmarks/fine_tuning.py --start runs/bench-flickr8k/heads/model --keep $(FLICKR8K)

.PHONY: build
build: .venv/.installed  ## build the wheel and the source archive in dist/
	$(BIN)/python -m build

.PHONY: release
release: check test  ## build a release and try it in a fresh environment; then say how to publish it
	rm -rf build dist
	$(MAKE) build
	$(BIN)/python -m twine check --strict dist/*
	PYTHON=$(PYTHON) .ci/try_wheel
	@version=$$($(BIN)/python -c 'import clipmini; print(clipmini.__version__)') && \
	echo "Nothing is published yet. To publish version $$version, of the commit that is checked out:" && \
	echo "  git tag v$$version && git push origin v$$version" && \
	echo "  $(BIN)/python -m twine upload dist/*"

.PHONY: clean
clean:  ## remove the environment and all that was built or trained here
	rm -rf .venv build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
