# make demo   set up, then search for a cheaper SmolLM2-135M and leave a report   (about 10 minutes after downloads)
# make test   set up, then everything that must hold: lint, types, tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test setup lint

demo: setup
	$(BIN)/fivefold optimize smollm2-135m --budget "memory<=260MB, agreement>=0.85" \
		--minimize latency,energy,size --allowance 8min --out runs/demo

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,openvino]'
	touch $(READY)
