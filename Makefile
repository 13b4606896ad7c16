# Everything lives in .venv; each target sets up what it needs and is quick the second time.
PYTHON    ?= python3
PIP_FLAGS ?=
PORT      ?= 8501
# Two files at a time, in the order of tests/conftest.py: many tests wait for processes that they start.
WORKERS   ?= -n 2 --dist loadfile --no-loadscope-reorder
VENV      := .venv
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)

.PHONY: run setup runtimes test test-all check bench bench-inspect bench-moe bench-compress bench-distil bench-profile docs chromium sshd clean
.DEFAULT_GOAL := run

run: setup                     ## open the dashboard on 127.0.0.1:$(PORT)
	$(BIN)/slimscope ui --port $(PORT)

setup: $(VENV)/.installed      ## environment, demo models, prepared cache

runtimes: setup                ## ONNX Runtime (with GenAI), OpenVINO and llama.cpp, to measure variants in what would serve them
	$(PIP) --constraint constraints.txt --editable ".[runtimes,llama]"

test: $(VENV)/.installed-dev chromium sshd ## lint, types and every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(WORKERS)

test-all:                      ## `make test` with every rotating test, not a quarter of them: what to run before a release
	SLIMSCOPE_ROTATION=all $(MAKE) test

check: $(VENV)/.installed-dev  ## the quick half of `make test`: lint, types, tests under ~10 s each
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow and not browser"

bench: setup                   ## one table per benchmark; ratios in one run
	@for script in $(filter-out benchmarks/peers.py benchmarks/runtimes.py benchmarks/distillation%.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

bench-inspect: setup           ## looking inside: ratios on ten prompt pairs; 1 thread, so that CPU time compares on a busy machine
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/inspection.py --pairs 10 --threads 1

bench-moe: setup               ## mixture of experts: routing capture against a plain forward, a million tokens counted; 1 thread, as above
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/moe.py --threads 1

bench-compress: setup          ## every method × bits, and what other libraries make of the same files; PEERS="python …" names their environments
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compression.py $(if $(PEERS),--peers $(PEERS))

bench-distil: setup            ## students beside their controls; DATA=folder of labelled files, QUICK=1, WORK=folder to go on in, PEER=python with TRL
	$(BIN)/python benchmarks/distillation.py $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA)) $(if $(WORK),--work $(WORK))
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/distillation_speed.py $(if $(QUICK),--updates 2 --rows 2 --micro 2 --rounds 1) $(if $(PEER),--peer $(PEER))

bench-profile: runtimes        ## SmolLM2 and MiniLM in every runtime: bytes, prefill, decode, memory, parity, share of bandwidth
	$(BIN)/python benchmarks/runtimes.py

docs: $(VENV)/.installed-dev   ## rewrite the method table in README.md from the registry
	$(BIN)/python scripts/method_table.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --upgrade pip

# torch goes first and by exact pin: a looser requirement of another package would fetch a CUDA build.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt requirements-demo.txt
	$(PIP) torch==2.13.0
	$(PIP) --constraint constraints.txt --editable .
	$(PIP) --no-deps --require-hashes --requirement requirements-demo.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Browser tests drive Debian's Chromium; without it they are skipped and say so.
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || test -n "$$CHROMIUM" || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium >/dev/null; \
	else echo "No Chromium found: browser tests will be skipped. Install it (sudo apt-get install chromium) or set CHROMIUM=/path/to/chromium."; fi

# Tests of remote devices log in to a real SSH server of their own on loopback; without one they are skipped and say so.
sshd:
	@command -v sshd >/dev/null || test -x /usr/sbin/sshd || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y openssh-server >/dev/null; \
	else echo "No sshd found: tests of remote devices will be skipped. Install it (sudo apt-get install openssh-server)."; fi

clean:                         ## remove the environment and caches, never the catalog
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
