PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# Where this is set, as in many containers, each process would compile all of torch again: 13 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-fast quality style clean

# Index of PyTorch's builds without CUDA (0.2 GB instead of several), for a machine without an NVIDIA GPU.
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
REACH = import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)

# The environment is made once, and again when pyproject.toml changes. --no-compile: Python compiles a module when it is first
# imported; all of torch beforehand would take two minutes on one core.
$(VENV)/usable: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "Installing PyTorch with CUDA and hfgen into $(VENV): several GB, some minutes."; \
	elif $(BIN)/python -c '$(REACH)' $(CPU_TORCH) 2>/dev/null; then \
		echo "No NVIDIA GPU found: installing PyTorch for CPUs into $(VENV), then hfgen."; \
		$(BIN)/python -m pip install --no-compile --disable-pip-version-check --index-url $(CPU_TORCH) torch torchvision \
			|| echo "That failed: installing the default PyTorch."; \
	else \
		echo "No NVIDIA GPU found, but $(CPU_TORCH) cannot be reached:"; \
		echo "installing the default PyTorch and hfgen into $(VENV): with CUDA several GB, some minutes."; \
	fi
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check -e ".[eval]"
	@touch $@

$(VENV)/installed: $(VENV)/usable
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check -e ".[dev,eval]"
	@touch $@

# Trains a small DDPM on toy paintings; run again after an interruption, it goes on where it stopped.
quickstart: $(VENV)/usable
	$(BIN)/python training_scripts/train_ddpm.py --preset quickstart --resume latest

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow" $(TESTS)

# mypy looks at the installed wheel: in the checkout it cannot see that pipelines/ is hfgen.pipelines, and so on.
quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typed .
	cd build && MYPYPATH=typed ../$(BIN)/mypy --config-file ../pyproject.toml -p hfgen

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info $(VENV)
