# make run [KNOB=value ...] · make lab · make test · make test-all · make release [PRESET=full | REPOSITORY=owner/name]
# Each makes its own environment first.

NOTEBOOK := CIFAR_10_Classification.ipynb
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
# The first Python that Keras and TensorFlow support.
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)
# What was set on the command line is a knob of the notebook's `parameters` cell.
KNOBS := $(foreach name,$(filter-out PYTHON VENV REPOSITORY PART CIFAR10_NPZ,$(.VARIABLES)),$(if $(findstring command line,$(origin $(name))),$(name)))

.DELETE_ON_ERROR:
STACKS := $(basename $(notdir $(wildcard tests/stacks/*.txt)))
.PHONY: run lab test test-all test-slow release $(STACKS:%=test-%)

run: $(VENV)/ready
	@$(BIN)/python scripts/run_notebook.py $(foreach name,$(KNOBS),'$(name)=$($(name))')

lab: $(VENV)/ready
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u 2>/dev/null)),--allow-root) $(NOTEBOOK)

test: $(VENV)/ready-to-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 3 --dist loadgroup -m 'not slow'

# All that takes long, too: 40 kills, the scripts, the other sets of versions (of which Colab's runs the tests of Colab).
test-all: test test-slow $(STACKS:%=test-%)

# With PART=1/2, every other one.
test-slow: $(VENV)/ready-to-test
	$(BIN)/python -m pytest -n 3 --dist loadgroup -m 'slow and not colab' --part $(or $(PART),1/1)

# Other sets of versions (tests/stacks), each in an environment of its own: test-colab, test-oldest, test-jax, test-torch.
$(STACKS:%=test-%): test-%: tests/stacks/%.txt
	$(PYTHON) -m venv $(VENV)/stacks/$*
	$(VENV)/stacks/$*/$(notdir $(BIN))/python -m pip install --quiet --disable-pip-version-check -r $<
	KERAS_BACKEND=$(or $(filter jax torch,$*),tensorflow) $(VENV)/stacks/$*/$(notdir $(BIN))/python -m pytest \
	-m 'stack$(if $(filter oldest,$*), or versions)$(if $(filter jax,$*), or devices)$(if $(filter colab,$*), or colab or (browser and not slow))'

release: $(VENV)/ready
	@$(BIN)/python scripts/release.py $(foreach name,$(KNOBS) $(if $(REPOSITORY),REPOSITORY),'$(name)=$($(name))')

$(VENV)/ready: requirements.txt
	@test -n "$(PYTHON)" || { echo "Please install Python 3.11, 3.12 or 3.13 (with venv) from python.org." >&2; exit 2; }
	@echo "Making the environment in $(VENV), once: some minutes, about 3 GB."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/ready-to-test: $(VENV)/ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@
