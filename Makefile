PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test test-fast quality style clean

# The environment is made once, and again when pyproject.toml changes.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,eval]"
	touch $@

# Trains a small DDPM on toy paintings; run again after an interruption, it goes on where it stopped.
quickstart: $(VENV)/installed
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
