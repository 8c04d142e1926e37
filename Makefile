# make demo   set up, train the quickstart, sample a grid of prompts
# make test   set up, run the tests (about ten minutes at most); make test-all runs the slow ones, too
# make check  lint, format, tests
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test test-all check lint setup lock clean

demo: $(READY)
	$(PY) train.py --config configs/quickstart.yaml resume.checkpoint=last
	rm -rf out/quickstart
	$(PY) sample.py --checkpoint runs/quickstart/ema.safetensors --prompts configs/quickstart_prompts.txt -n 1 --out out/quickstart
	@echo "Look at out/quickstart/grid.png: images from text, by a model that was trained without a caption."

test: $(READY)
	$(PY) -m pytest -m "not slow"

test-all: $(READY)
	$(PY) -m pytest

check: lint test

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

setup: $(READY)

$(READY): requirements.lock | $(UV)
	$(UV) venv --quiet --allow-existing --python '>=3.11,<3.13' .venv
	$(UV) pip install --quiet --python $(PY) --require-hashes -r requirements.lock
	touch $@

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet uv

lock: | $(UV)
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header -o requirements.lock

clean:
	rm -rf .venv .tools .pytest_cache .ruff_cache
