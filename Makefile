# `make demo` and `make test` do all set-up on a fresh machine with Python 3.11.
PYTHON ?= python3
BIN := .venv/bin

# Rounds of `make bench-parts`.
ROUNDS ?= 25
# --no-large leaves out the shape of 1B, which takes long where bfloat16 is slow.
LARGE ?= --large

# Length of `make soak`.
MINUTES ?= 30

# What is installed comes without bytecode, which the first import writes. Where nothing may be
# written, each process that imports vLLM takes 20 s longer to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-pure test-slow test-0.29 test-0.33 test-ray ray-demo lint lock docs bench bench-guard bench-parts gpu-check soak train clean

help:
	@echo "make demo   set up .venv and ask SmolLM2 eight questions, dense, under a plan, and healed"
	@echo "make test   set up .venv and run the tests"
	@echo "make test-pure  set up .venv-pure, without vLLM and torch, and run what does without them"
	@echo "make test-slow  two ranks, two engines behind two front ends"
	@echo "make test-0.29  set up .venv-0.29 and run what another vLLM release could break"
	@echo "make test-0.33  the same with the newest release, which has no CPU build"
	@echo "make test-ray  the same with Ray, and run what needs it: two replicas, an offline job"
	@echo "make ray-demo  the bundled model on Ray Serve, a mixed load, plan affinity off and on"
	@echo "make lint   ruff, mypy, import-linter"
	@echo "make lock   the newest versions for test-pure into deploy/dev.lock; needs uv"
	@echo "make docs   set up .venv-docs, build the pages as a site, and check their links"
	@echo "make bench  adaskip bench: stock vLLM, the plugin and deleted layers side by side"
	@echo "make bench-guard  a fast subset of it, whose ratios must not fall"
	@echo "make bench-parts  K/V fills; reading prompts; early exit; shortened prompts"
	@echo "make gpu-check  on a machine with a GPU and vLLM: mixed plans against transformers, speed"
	@echo "make soak   the torture test for half an hour; make soak MINUTES=5 for less"
	@echo "make train  train the bundled model again, into build/model (about an hour)"
	@echo "make clean  remove .venv and caches"

setup: .venv/.ready

.venv/.ready: pyproject.toml deploy/setup_venv.py deploy/vllm-metadata/pyproject.toml
	$(PYTHON) deploy/setup_venv.py

.venv/.demo: pyproject.toml deploy/setup_venv.py deploy/vllm-metadata/pyproject.toml
	$(PYTHON) deploy/setup_venv.py --demo

demo: .venv/.demo
	$(BIN)/adaskip demo

# Two processes, as there are cores on the smallest machine that is wanted; a file stays in one,
# and files come in the order of tests/conftest.py. Without those of test-slow.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# datasets without the extra fit, whose peft brings torch.
.venv-pure/.ready: pyproject.toml deploy/dev.lock
	$(PYTHON) -m venv .venv-pure
	.venv-pure/bin/python -m pip install -c deploy/dev.lock -e '.[dev,eval]' datasets
	touch $@

# The newest of all that `test-pure` installs, by uv; the comment at the top of the file stays.
lock:
	echo datasets | uv pip compile --universal --python-version 3.11 --no-header --no-annotate -q \
		--upgrade --extra dev --extra eval pyproject.toml - > build/dev.lock
	sed -i '/^#/!d' deploy/dev.lock && cat build/dev.lock >> deploy/dev.lock

test-pure: .venv-pure/.ready
	.venv-pure/bin/python -m pytest -m pure

# One after the other: several processes each, on both cores.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# What another release of vLLM could break.
OTHER_RELEASE := -m pytest -p no:cacheprovider tests/compat tests/engine/test_v1_feeder.py \
	tests/engine/test_v2_feeder.py tests/engine/test_both_feeders.py tests/engine/test_model_runner_v2.py

# That users of ray[llm] have.
test-0.29: .venv-0.29/.ready
	.venv-0.29/bin/python $(OTHER_RELEASE)

# The newest, whose Python runs over the kernels of .venv.
test-0.33: setup
	$(BIN)/python deploy/newer_vllm.py 0.33.0
	PYTHONPATH=build/vllm-0.33.0 $(BIN)/python $(OTHER_RELEASE)

.venv-0.29/.ready: pyproject.toml deploy/setup_venv.py deploy/vllm-metadata/pyproject.toml
	$(PYTHON) deploy/setup_venv.py cpu-0-29

# Beside what setup installs, none of which it replaces.
.venv/.ray: .venv/.ready
	$(BIN)/python -m pip install -e '.[ray]'
	touch $@

test-ray: .venv/.ray
	$(BIN)/python -m pytest tests/ray

ray-demo: .venv/.ray
	$(BIN)/python -m deploy.ray.demo

lint: .venv/.ray
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In an environment of its own, as it needs neither torch nor vLLM. All warnings are errors.
.venv-docs/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -e '.[docs]'
	touch $@

docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

bench: setup
	$(BIN)/adaskip bench

bench-guard: setup
	$(BIN)/adaskip bench guard

bench-parts: setup
	$(BIN)/python benchmarks/paged_kv.py --rounds $(ROUNDS)
	$(BIN)/python benchmarks/reading_prompts.py --rounds $(ROUNDS) $(LARGE)
	$(BIN)/python benchmarks/early_exit.py --rounds $(ROUNDS) $(LARGE)
	$(BIN)/python benchmarks/shortened_prompts.py --model bundled --tokens 300 --rounds $(ROUNDS)

# With the Python that has vLLM for the GPU, which no set-up of ours installs.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

soak: setup
	$(BIN)/python tests/torture/soak.py --minutes $(MINUTES)

train: setup
	$(BIN)/python -m vllm_adaskip.lab.testbed.train --out build/model

clean:
	rm -rf .venv .venv-0.29 .venv-docs .venv-pure build *.egg-info deploy/lab-data/build deploy/lab-data/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
