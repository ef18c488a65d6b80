# Two commands do everything: `make demo` and `make test`.  Both build their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= build/demo
TEXT = examples/tiny_moe/text
export HF_HUB_OFFLINE ?= 1

# A test process for every core, one thread each; files in the order of tests/conftest.py.
WORKERS = -n auto --dist loadfile --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

.PHONY: demo test test-versions test-clients supply-chain constraints quality style clean

demo: $(VENV)/.installed
	@for model in upcycled scratch; do \
	  echo; echo "== examples/tiny_moe/$$model, half of its experts =="; \
	  $(BIN)/optimum-dern compress examples/tiny_moe/$$model $(DEMO)/$$model --overwrite --sparsity 0.5 \
	    --dataset $(TEXT)/calibration --num-samples 64 --sequence-length 256 \
	    --evaluate $(TEXT)/evaluation || exit 2; \
	done
	@echo; echo "plain transformers loads the result, without this package:"
	@$(BIN)/python examples/generate.py $(DEMO)/upcycled

test: $(VENV)/.installed $(VENV)/transformers-4
	DERN_TRANSFORMERS4=$(abspath $(VENV)/transformers-4) $(PYTEST)

# The fast tests with the oldest transformers that is supported, and with the newest there is (which fails nothing).
test-versions: $(VENV)/transformers-oldest
	OMP_NUM_THREADS=1 $(BIN)/python tests/network/versions.py $< $(VENV)/transformers-newest $(WORKERS) -m "not slow"

# Other engines in environments of their own under build/clients (7 GB), compared with transformers: no part of CI.
test-clients: $(VENV)/.installed $(VENV)/transformers-4
	DERN_TRANSFORMERS4=$(abspath $(VENV)/transformers-4) $(BIN)/python tests/network/compare_clients.py

# Audits, the wheel in a clean environment, the fast tests with the oldest and the newest dependencies: no part of CI.
supply-chain: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/network/supply_chain.py audit package lowest highest -- $(WORKERS) -m "not slow"

quality: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Exact versions of everything, so that both commands work on any day.  torch's CPU build comes first and alone where
# there is no NVIDIA GPU: the default one brings several GB of CUDA packages, and its index is asked for nothing else.
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt
CPU_TORCH = --no-deps torch --extra-index-url https://download.pytorch.org/whl/cpu --retries 1

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(shell command -v nvidia-smi),,$(INSTALL) $(CPU_TORCH))
	$(INSTALL) hatchling editables setuptools
	$(INSTALL) --no-build-isolation --editable '.[tests,quality]'
	@mkdir -p build
	@touch $@

# constraints.txt anew: the newest releases, for every platform and Python (torch by hand, a release at a time).
# hatchling builds the package, editables is what it needs for that; setuptools builds rouge_score, which has no wheel.
constraints:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet uv
	printf '%s\n' torch==2.13.0 hatchling editables setuptools | build/uv/bin/uv pip compile pyproject.toml - \
	  --extra tests --extra quality --universal --python-version 3.10 --no-python-downloads --upgrade \
	  --no-annotate --custom-compile-command 'make constraints' --quiet --output-file constraints.txt

# Other releases of transformers in folders of their own, over the same torch.
$(VENV)/transformers-oldest: $(VENV)/.installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ transformers==5.18.0

$(VENV)/transformers-4: $(VENV)/.installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
	  transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2

clean:
	rm -rf build $(VENV)
