# make run [KNOB=value ...] · make lab · make test · make test-colab · make release [REPOSITORY=owner/name]
# Each makes its own environment first.

NOTEBOOK := CIFAR_10_Classification.ipynb
RESULTS := models/runs
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
KNOBS := $(foreach name,$(filter-out PYTHON VENV REPOSITORY,$(.VARIABLES)),$(if $(findstring command line,$(origin $(name))),$(name)))

.DELETE_ON_ERROR:
.PHONY: run lab test release lint

run: $(VENV)/ready
	@valid=$$($(BIN)/papermill --help-notebook $(NOTEBOOK) 2>/dev/null | sed -n 's/^  \([A-Z_]*\): .*/\1/p' | tr '\n' ' '); \
	for knob in $(KNOBS); do case " $$valid" in *" $$knob "*) ;; \
	*) echo "$$knob is not a knob of the notebook. The knobs are: $$valid" >&2; exit 2;; esac; done
	@mkdir -p $(RESULTS)
	@$(BIN)/papermill $(NOTEBOOK) $(RESULTS)/$(NOTEBOOK) --kernel python3 --log-output --no-progress-bar \
	$(foreach knob,$(KNOBS),-y '$(knob): $($(knob))')
	@grep -oE '(This run is kept in models|Test accuracy[a-z ]*: [01])[^"\]*' $(RESULTS)/$(NOTEBOOK)
	@echo "Executed notebook: $(RESULTS)/$(NOTEBOOK)"

lab: $(VENV)/ready
	$(BIN)/jupyter lab $(NOTEBOOK)

test: $(VENV)/ready-to-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# Other sets of versions (tests/stacks), each in an environment of its own: test-colab, test-oldest, test-jax, test-torch.
test-%: tests/stacks/%.txt
	$(PYTHON) -m venv $(VENV)/stacks/$*
	$(VENV)/stacks/$*/$(notdir $(BIN))/python -m pip install --quiet --disable-pip-version-check -r $<
	KERAS_BACKEND=$(or $(filter jax torch,$*),tensorflow) $(VENV)/stacks/$*/$(notdir $(BIN))/python -m pytest \
	-m 'stack$(if $(filter colab,$*), or colab or browser)'

release: $(VENV)/ready-to-test
	@test -n "$$CIFAR10_NPZ" || { echo "Set CIFAR10_NPZ to the array file of the real data." >&2; exit 2; }
	$(if $(REPOSITORY),$(BIN)/python tests/release.py --repository '$(REPOSITORY)')
	$(MAKE) run
	$(BIN)/python tests/release.py $(RESULTS)/$(NOTEBOOK)

$(VENV)/ready: requirements.txt
	@test -n "$(PYTHON)" || { echo "Please install Python 3.11, 3.12 or 3.13 (with venv) from python.org." >&2; exit 2; }
	@echo "Making the environment in $(VENV), once: some minutes, about 3 GB."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/ready-to-test: $(VENV)/ready tests/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@
