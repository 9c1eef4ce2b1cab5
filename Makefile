# treecast: `make help` lists what there is.
VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
PYTHON  ?= python3
# Of `make gpu`: one whose torch sees the device, which that of .venv does not.
GPU_PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help setup demo up bench chaos test check lint chart format dashboards protos release-protos gpu clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | \
	  awk -F'|' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Make .venv with everything (CPU build of torch)

$(STAMP): pyproject.toml constraints.txt protos/build_hook.py $(wildcard protos/treecast/v1/*.proto)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade -c constraints.txt pip
	$(PY) -m pip install --quiet -c constraints.txt -e '.[engine,dev]'
	touch $@

demo: setup  ## Real model, whole mesh, a few prompts, then the table beside plain decoding
	$(VENV)/bin/treecast demo

up: setup  ## Run the whole mesh on this machine until Ctrl-C
	$(VENV)/bin/treecast up

bench: setup  ## Side by side with transformers, plain and speculative
	$(VENV)/bin/treecast bench

chaos: setup  ## Every fault under load, each stream compared; CHAOS=--quick for two minutes
	$(PY) -m treecast.bench.chaos $(CHAOS)
	$(PY) -m treecast.bench.chaos --tls --only rotated $(CHAOS)

test: setup  ## All but the slow tests, about 10 minutes on 2 cores
	$(PY) -m pytest -m 'not slow and not gpu' -n 2 --dist loadfile --no-loadscope-reorder

check: setup lint  ## Everything that needs no accelerator
	$(PY) -m pytest -m 'not gpu'

lint: setup  ## Style, types, import floors, wire compatibility
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(PY) protos/compatibility.py

dashboards: setup  ## Write dashboards, alerts and their documentation anew
	$(PY) -m treecast.dashboards

chart: setup  ## The Helm chart and the images: lint, schemas, policies, flags, refusals
	$(PY) -m pytest -m 'not gpu' -v tests/chart

format: setup  ## Rewrite the code in the house style
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

protos: setup  ## Generate treecast.v1 anew from protos/
	$(PY) protos/build_hook.py

release-protos: setup  ## Make today's wire the one that `lint` compares with
	$(PY) protos/compatibility.py release

gpu:  ## On a machine with a CUDA device: check kernels and engine there, then time them
	$(if $(wildcard src/treecast/v1),,$(GPU_PYTHON) protos/build_hook.py)
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -c tests/gpu/bare.ini --rootdir . \
	  --confcutdir tests/gpu -m gpu tests/gpu
	PYTHONPATH=src $(GPU_PYTHON) -m treecast.bench.gpu \
	  $(if $(MODEL),--model $(MODEL)) $(if $(DRAFT),--draft $(DRAFT))

clean:  ## Remove what was built
	rm -rf $(VENV) dist build src/treecast/v1 .mypy_cache .ruff_cache .pytest_cache
