# Every target first sets up .venv, when it is missing or when what it was made from has changed.
#
#   make demo              train the demo preset on the built-in data; an unfinished run goes on
#   make test              all tests (ARGS="-k composite" picks some, JOBS=8 uses more cores)
#   make compiled          the ops' tests on compiled kernels: PTX of three architectures, executed on this CPU; and
#                          what every plan of every size takes of registers and shared memory
#   make counts            what the compiled kernels do, counted on this CPU, against bench/budgets.json
#   make lint              ruff
#   make bench             what this machine can measure (OUT=folder): on a GPU bench/gpu_day.sh, else ratios on the CPU
#   make sanitize          the extension's CPU code under the address, undefined-behaviour and thread sanitizers
#   make extras            every extra installed alone, from the package index, and what it brings run once
#   make test TORCH=2.10.0 another torch than the one for this machine's GPUs and driver, with its Triton
#   make demo DEVICE=cpu   whatever GPUs there are
#   make clean             remove what set-up, tests and builds left (not runs/)

PYTHON  ?= python3
RUN_DIR ?= runs/demo
JOBS    ?= 2
ARGS    ?=
OUT     ?= bench/results

# Which torch: by the GPUs and the driver of this machine, see epigraf_fast/machine.py; TORCH= (and TRITON=) name another.
TORCH   ?=
TRITON  ?=
DEVICE  ?=

# nvcc compiles for minutes what a machine without a GPU does not run; EPIGRAF_FAST_CUDA=1 builds it for another machine.
CUDA = $(or $(EPIGRAF_FAST_CUDA),$(shell $(PYTHON) -I epigraf_fast/machine.py --cuda --device "$(DEVICE)"))

VENV  := .venv
READY := $(VENV)/ready
# A demo needs less than tests, and does with what is there for them.
DEMO  := $(or $(wildcard $(READY)),$(VENV)/demo)

.PHONY: demo test compiled counts lint bench sanitize extras clean force

demo: $(DEMO)
	$(VENV)/bin/python train.py demo --run-dir $(RUN_DIR) --resume auto $(DEVICE:%=--device %)

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

compiled: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/ops tests/ptx tests/test_csrc_compile.py --compiled all -m compiled $(ARGS)
	$(VENV)/bin/python -m bench.resources --only triton

counts: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.counts --check $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY)
	@if $(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		PYTHON=$(VENV)/bin/python bench/gpu_day.sh $(OUT); \
	else \
		PYTHON=$(VENV)/bin/python bench/cpu_ratios.sh $(OUT); \
	fi

extras: $(READY)
	$(VENV)/bin/python tests/extras.py $(ARGS)

# A program of its own over the same launchers, so that no sanitizer has to be loaded into Python.
SANITIZED := bias_act composite decode_triplane layer_epilogue modulation sample_importance upfirdn2d launchers tests/sanitize
SANITIZE = $(CXX) -std=c++17 -O1 -g -Wall -Wno-unknown-pragmas -DEPIGRAF_ISA=base -DEPIGRAF_STD_THREADS -Icsrc \
	$(SANITIZED:%=csrc/%.cpp) -pthread
sanitize:
	@mkdir -p build
	$(SANITIZE) -fsanitize=address,undefined -fno-sanitize-recover=all -o build/sanitize-address
	build/sanitize-address
	$(SANITIZE) -march=native -fsanitize=address,undefined -fno-sanitize-recover=all -o build/sanitize-native
	build/sanitize-native
	$(SANITIZE) -fsanitize=thread -o build/sanitize-thread
	build/sanitize-thread

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache epigraf_fast/_C.*.so epigraf_fast/_build.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): EXTRA := test
$(VENV)/demo: EXTRA := demo
$(READY) $(VENV)/demo: $(VENV)/constraints.txt setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/driver/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "The tested versions need Python 3.11 or newer; name one, as in: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	EPIGRAF_FAST_CUDA=$(CUDA) $(VENV)/bin/python -m pip install -c $< -e '.[$(EXTRA)]'
	@touch $@

# Asked at every call, but touched only when it says something new: that is what re-installs.
$(VENV)/constraints.txt: force
	@$(PYTHON) -I epigraf_fast/machine.py --torch "$(TORCH)" --triton "$(TRITON)" --device "$(DEVICE)" constraints.txt $@
