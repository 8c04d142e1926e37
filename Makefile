# make demo   set up, train the quickstart, sample a grid of prompts
# make test   set up with all that the tests need, run them (about ten minutes at most); make test-all runs the slow ones, too
# make test-browser   pages in a real browser: sets up a Chromium of its own (apt-get as root, npm otherwise) if there is none
# make docs-check   runs every command in README and docs, and the notebooks, on stand-ins for data and weights (a quarter of an hour); says how, and why some are not
# make check  lint, format, types, tests
# make lock   write both lock files anew after a change of pyproject.toml; make upgrade takes newer versions, too
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
PY := .venv/bin/python
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadscope
READY := .venv/.ready
READY_DEV := .venv/.ready-dev
COMPILE := pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-header

.PHONY: demo test test-all test-browser docs-check check lint types setup setup-dev lock upgrade clean

demo: $(READY)
	$(PY) train.py --config configs/quickstart.yaml resume.checkpoint=last
	rm -rf out/quickstart
	$(PY) sample.py --checkpoint runs/quickstart/ema.safetensors --prompts configs/quickstart_prompts.txt -n 1 --out out/quickstart
	@echo "Look at out/quickstart/grid.png: images from text, by a model that was trained without a caption."

test: $(READY_DEV)
	$(PY) -m pytest -m "not slow and not browser" $(PARALLEL)

test-all: $(READY_DEV)
	$(PY) -m pytest -m "not browser" $(PARALLEL)

test-browser: $(READY_DEV)
	$(PY) tests/browser/chromium.py
	$(PY) -m pytest -m browser tests/browser

docs-check: $(READY_DEV)
	$(PY) tests/walks.py
	$(PY) -m pytest tests/test_docs.py tests/test_walks.py tests/test_extending.py tests/test_recipes.py tests/test_python_docs.py tests/test_slurm.py tests/test_notebooks.py

check: lint types test

lint: $(READY_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY_DEV)
	$(PY) -m mypy

# make setup EXTRAS=app (or several: EXTRAS='app text'): what an extra of pyproject.toml needs, too, as requirements-dev.lock has it
setup: $(READY)
ifdef EXTRAS
	$(UV) $(COMPILE) $(EXTRAS:%=--extra %) --override requirements-override.txt -c requirements-dev.lock -o .venv/extras.txt >/dev/null
	$(UV) pip install --quiet --compile-bytecode --no-deps --python $(PY) --require-hashes -r .venv/extras.txt
endif

setup-dev: $(READY_DEV)

$(READY): requirements.lock | $(UV)
	$(UV) venv --quiet --allow-existing --python '>=3.11,<3.15' .venv
	$(UV) pip install --quiet --compile-bytecode --python $(PY) --require-hashes -r requirements.lock
	touch $@

$(READY_DEV): requirements-dev.lock $(READY)
	$(UV) pip install --quiet --compile-bytecode --no-deps --python $(PY) --require-hashes -r requirements-dev.lock
	touch $@

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet uv

lock: | $(UV)
	$(UV) $(COMPILE) -o requirements.lock >/dev/null
	$(UV) $(COMPILE) --extra dev --override requirements-override.txt -c requirements.lock -o requirements-dev.lock >/dev/null

upgrade: | $(UV)
	$(UV) $(COMPILE) --upgrade -o requirements.lock >/dev/null
	$(UV) $(COMPILE) --upgrade --extra dev --override requirements-override.txt -c requirements.lock -o requirements-dev.lock >/dev/null

clean:
	rm -rf .venv .tools .pytest_cache .ruff_cache .mypy_cache
