# Two commands: `make demo` and `make test`. Each prepares a virtual environment of its own first.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The comparison with PyTorch is part of the tests on Python 3.11; `make test PARITY=0` leaves it out.
PARITY ?= $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))')
WORKERS ?= 2
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# What depends most on JAX: the models, answers, one update.
JAX_TESTS := tests/models tests/inference tests/planning $(addprefix tests/training/test_,step.py reference_batch.py export.py snapshot.py)

.PHONY: demo test scale newest fast lint build clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --out demo_output

# The time it prints last is that of the tests; `user` is the CPU's.
test: $(VENV)/.installed-test-$(PARITY) lint
	time $(PYTEST) -m "not scale"

# Programs of eight devices, jobs of two and of four processes, runs in a bucket: one test after the other.
scale: $(VENV)/.installed-test-$(PARITY)
	time $(PYTEST) -n 0 -m scale

# For a second Python and its JAX: all that depends on them most, and of the rest what does not take long.
newest: $(VENV)/.installed-test-$(PARITY) lint
	time $(PYTEST) -m "not scale" $(JAX_TESTS)
	time $(PYTEST) -m "not scale and not slow" $(addprefix --ignore ,$(JAX_TESTS))

# What can be known in two minutes: no run of train.py, no comparison with PyTorch, no large program compiled.
fast: $(VENV)/.installed-test-$(PARITY)
	$(PYTEST) -m "not slow and not scale" --ignore tests/parity

lint: $(VENV)/.installed-test-$(PARITY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python

build: $(VENV)/.installed-test-$(PARITY)
	$(BIN)/python -m build --outdir dist

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[medical,tensorboard]'
	touch $@

$(VENV)/.installed-test-$(PARITY): $(VENV)/.installed
	# First and together: which boto3 fits both pip would else try among hundreds, for minutes.
	$(BIN)/python -m pip install --quiet s3fs 'moto[server]'
ifeq ($(PARITY),1)
	$(BIN)/python -m pip install --quiet --editable '.[test,parity,bucket,dicom,eval,itk]'
	# sam2 declares torchvision, which its modelling code does not need.
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --no-deps sam2==1.1.0
else
	$(BIN)/python -m pip install --quiet --editable '.[test,bucket,dicom,eval,itk]'
endif
	touch $@

clean:
	rm -rf $(VENV) demo_output dist build
