# Two commands: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test
WORKERS ?= 2
RUN := $(VENV)/bin/python

.PHONY: help setup demo test test-lowest test-install test-kernels test-deepspeed test-gpu lint bench bench-gpu notebook clean

help:
	@echo "make demo            train a Mamba on real data, cut its state in training, load the result in stock transformers"
	@echo "make test            all tests"
	@echo "make test-lowest     all tests with the oldest supported transformers; LOWEST_TESTS=... for some folders"
	@echo "make test-install    installs the package as a user does, without pinned versions, and uses its command"
	@echo "make test-kernels    the code of GPUs (mamba-ssm, flash-linear-attention, our own) in Triton's interpreter"
	@echo "make test-deepspeed  the tests of ZeRO-1, 2 and 3, with DeepSpeed and its CPU backend"
	@echo "make bench           all benchmarks; rewrites the tables in recipes/benchmarks/results"
	@echo "make bench-gpu       all that is measured on one CUDA device, and its tests; PARTS=... for some of it"
	@echo "make test-gpu        the tests on a CUDA device alone (both take the python3 that has torch: RUN=python3)"
	@echo "make notebook        run recipes/notebooks anew, and keep its outputs"
	@echo "make lint            style checks"
	@echo "make clean           remove the virtual environments and what the demo wrote"

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	touch $@

demo: setup
	$(RUN) recipes/digits/demo.py

test: setup lint
	$(RUN) -m pytest --numprocesses $(WORKERS) --dist loadfile --quiet

test-lowest:
	$(MAKE) setup VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt
	.venv-lowest/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --quiet $(LOWEST_TESTS)

test-install:
	$(PYTHON) tests/install/check_install.py

# mamba-ssm without its compiled parts: its Triton kernels, and all others, run in Triton's interpreter.
test-kernels: .venv-kernels/.kernels
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-kernels/bin/python -m pytest --numprocesses $(WORKERS) --quiet \
	    tests/kernels tests/ops/test_sampled_states.py tests/ops/test_selective_gramians.py -k "kernels or triton"

.venv-kernels/.kernels:
	$(MAKE) setup VENV=.venv-kernels
	.venv-kernels/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0 einops==0.8.2 \
	    ninja==1.13.2 packaging wheel "setuptools>=77" flash-linear-attention==0.6.0 fla-core==0.6.0
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .venv-kernels/bin/python -m pip install --quiet \
	    --disable-pip-version-check --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
	touch $@

test-deepspeed:
	$(MAKE) setup VENV=.venv-deepspeed EXTRAS=test,deepspeed
	OMP_NUM_THREADS=1 .venv-deepspeed/bin/python -m pytest --quiet tests/distributed/test_deepspeed.py

lint: setup
	$(RUN) -m ruff check hf_compressm recipes tests setup.py
	$(RUN) -m ruff format --check hf_compressm recipes tests setup.py

bench: setup
	$(RUN) recipes/benchmarks/run_all.py

bench-gpu:
	PYTHONPATH=. $(RUN) recipes/benchmarks/run_gpu.py --configurations 2 --seconds 80 $(if $(PARTS),--parts $(PARTS))

test-gpu:
	PYTHONPATH=. $(RUN) recipes/benchmarks/run_gpu.py --parts tests

notebook: setup
	$(RUN) recipes/notebooks/execute.py

clean:
	rm -rf .venv .venv-lowest .venv-kernels .venv-deepspeed demo_output
