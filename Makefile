# Two commands matter: `make demo` shows the whole idea on this machine, `make test` proves it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: install demo test lint gpu-test wheel clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(if $(SEED),--seed $(SEED))

# Triton's interpreter must be switched on before a kernel is defined, hence the second process.
test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu and not interpret'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m 'interpret'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Needs a CUDA device; not part of `make test`.
gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info kernels/*.egg-info
