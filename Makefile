# make serve      set up what is missing, then serve models/tiny-nsa on http://127.0.0.1:30000
# make test       set up what is missing, then run the whole test suite
# make test-page  the page at GET / in a real browser, where Chromium and its driver are installed
# make test-wheels  the two wheels, installed with pip alone, serve with the compiled kernels
# make test-plugin  the plugin beside released SGLangs, on the CPU (RELEASES=all: beside each)
# make setup      only set up: .venv with the pinned dependencies, the kernel library, and libraries for a GPU that is seen

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  ?= models/tiny-nsa
HOST   ?= 127.0.0.1
PORT   ?= 30000
STEPS  ?= 4
ARGS   ?=
JOBS   ?= 2

KERNEL_SOURCES := $(shell find sgl-kernel -path 'sgl-kernel/build*' -prune -o -type f \
	\( -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name CMakeLists.txt -o -name '*.py' -o -name pyproject.toml \) -print)

.PHONY: serve test test-plugin test-page test-wheels setup lint format cuda cuda-release clean
.DEFAULT_GOAL := help
help:
	@sed -n '/^$$/q; s/^# //p' Makefile

# Where an NVIDIA GPU is seen (GPU=0: not), the extra `gpu` is installed, and a CUDA compiler if there is none: the one that
# belongs to the libraries that torch brings, with the names of folders and files that linkers ask for. Torch is then the release
# that those libraries and our kernels were run with on a GPU.
GPU ?= $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
WITH_GPU := $(filter-out 0,$(GPU))
ADD_NVCC := $(if $(WITH_GPU),$(if $(shell command -v nvcc),,yes))
CUDA_ENV := $(if $(ADD_NVCC),CUDA_HOME="$(abspath $(VENV))/cuda" CUDACXX="$(abspath $(VENV))/cuda/bin/nvcc")
CONSTRAINTS := constraints.txt constraints-$(if $(WITH_GPU),gpu,cpu).txt
PINS := $(addprefix -c ,$(CONSTRAINTS))
TORCH_CUDA = $(BIN)/python -c 'import torch; print(torch.version.cuda)'

# What the kernels are built with comes first, since the runtime depends on their package. Ninja compiles on all cores.
$(VENV)/.torch: $(CONSTRAINTS)
	@echo "== creating $(VENV) and installing the pinned dependencies (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on $(PINS) torch numpy scikit-build-core ninja
	touch $@

$(VENV)/.nvcc: $(VENV)/.torch
	@case "$$($(TORCH_CUDA))" in \
	13.*) echo "== installing a CUDA compiler: no nvcc was found" && \
		$(BIN)/python -m pip install --progress-bar on $(PINS) "cuda-toolkit[nvcc,nvvm,crt,cccl]" && \
		cuda="$$($(BIN)/python -c 'import nvidia.cu13 as cuda; print(*cuda.__path__)')" && \
		ln -sfn lib "$$cuda/lib64" && ln -sfn libcudart.so.13 "$$cuda/lib/libcudart.so" && ln -sfn "$$cuda" $(VENV)/cuda;; \
	None) echo "NOTE: a GPU is seen, but the torch of this package index is built without CUDA" >&2;; \
	*) echo "NOTE: no nvcc was found: the kernels are built for the CPU alone" >&2;; \
	esac
	touch $@

$(VENV)/.kernels: $(VENV)/.torch $(if $(ADD_NVCC),$(VENV)/.nvcc) $(KERNEL_SOURCES)
	@echo "== building sgl-kernel (for CUDA too where the installed torch has it)"
	$(CUDA_ENV) $(BIN)/python -m pip install --progress-bar on --no-deps --no-build-isolation ./sgl-kernel
	touch $@

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/.kernels
	$(BIN)/python -m pip install --progress-bar on $(PINS) -e ".[bench,dev]"
	touch $@

# sgl-flash-mla names the newest torch as its dependency, while its library needs no more than torch's stable ABI, which
# 2.10 has: so it comes without dependencies.
$(VENV)/.gpu: pyproject.toml $(CONSTRAINTS) | $(VENV)/.installed
	@echo "== installing kernels for the GPU: FlashInfer, FlashMLA, DeepGEMM"
	$(BIN)/python -m pip install --progress-bar on $(PINS) flashinfer-python sgl-deep-gemm
	$(BIN)/python -m pip install --progress-bar on $(PINS) --no-deps sgl-flash-mla
	touch $@

setup: $(VENV)/.kernels $(VENV)/.installed $(if $(WITH_GPU),$(VENV)/.gpu)

# The path and the compiler are for FlashInfer, which compiles its kernels with ninja at their first use.
serve: setup
	PATH="$(abspath $(BIN)):$$PATH" $(CUDA_ENV) SGLANG_NSA_ENABLE_MTP_PRECOMPUTE_METADATA=1 \
	exec $(BIN)/python -m sglang.launch_server \
		--model-path $(MODEL) --served-model-name $(notdir $(MODEL)) --host $(HOST) --port $(PORT) \
		--speculative-algorithm NEXTN --speculative-num-steps $(STEPS) $(ARGS)

# Two processes, each with whole files, so that fixtures are made once, in conftest.py's order; one thread in each, since
# their servers and workers share the machine. JOBS=0: all in one process, for -s or a debugger.
test: setup $(VENV)/.emulation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-page: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs test/page $(ARGS)

# Both wheels, installed with pip alone into an environment that has only their dependencies.
test-wheels: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest test/wheels $(ARGS)

RELEASES ?= 0.5.12 0.5.23
test-plugin: setup
	$(BIN)/python plugin/tests/run.py $(RELEASES) $(if $(ARGS),-- $(ARGS))

# The CUDA kernels compiled for the CPU, thread by thread: what their tests run on a machine without a GPU.
$(VENV)/.emulation: $(VENV)/.torch $(KERNEL_SOURCES)
	cmake -S sgl-kernel -B sgl-kernel/build -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DSGL_KERNEL_CUDA=OFF
	cmake --build sgl-kernel/build --parallel
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'sgl-kernel/*.cu' 'sgl-kernel/*.cuh' 'sgl-kernel/*.cc' 'sgl-kernel/*.cpp' 'sgl-kernel/*.h' \
		| xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'sgl-kernel/*.cu' 'sgl-kernel/*.cuh' 'sgl-kernel/*.cc' 'sgl-kernel/*.cpp' 'sgl-kernel/*.h' \
		| xargs -r $(BIN)/clang-format -i

# Compiles and links the CUDA library; needs nvcc, no GPU and no CUDA build of torch.
cuda: $(VENV)/.torch
	cmake -S sgl-kernel -B sgl-kernel/build-cuda -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DSGL_KERNEL_CUDA=ON
	cmake --build sgl-kernel/build-cuda --parallel

# What is given to others: built with a CUDA 12 compiler, its library serves CUDA 12 and 13 drivers.
# A compiler before 12.8 does not know sm_100, which then takes sm_90's PTX: RELEASE_ARCHS="80-real;90".
CUDA_HOME ?= /usr/local/cuda-12.8
RELEASE_ARCHS ?= 80-real;90-real;100
cuda-release: $(VENV)/.torch
	@"$(CUDA_HOME)/bin/nvcc" --version 2>/dev/null | grep -q "release 12\." || { echo "CUDA_HOME=$(CUDA_HOME): expected a\
	 CUDA 12 toolkit with bin/nvcc (a library of CUDA 13 needs a driver of the 580 series)" >&2; exit 1; }
	cmake -S sgl-kernel -B sgl-kernel/build-cuda-release -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DSGL_KERNEL_CUDA=ON \
		-DSGL_KERNEL_EMULATION=OFF -DCMAKE_CUDA_COMPILER="$(CUDA_HOME)/bin/nvcc" -DCMAKE_CUDA_ARCHITECTURES="$(RELEASE_ARCHS)"
	cmake --build sgl-kernel/build-cuda-release --parallel

clean:
	rm -rf $(VENV) sgl-kernel/build sgl-kernel/build-cuda sgl-kernel/build-cuda-release
