# make demo: train the shipped tiny model offline.   make test: the fast tests.   make test-all: the slow ones too.
# make bench: measured against other programs; make bench ONLY=rollouts for a part.
# make soak: kills, damaged files and full disks by the hundred, with a table; make soak ONLY=killed for a part.
# make check-metal: does it work on this Mac, and how fast.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=          # where torch's wheels come from; on Linux https://download.pytorch.org/whl/cpu is the small build
JOBS ?= 2               # test processes; each computes on one thread
SLOW = parity or seeds or soak or browser or vision
PIP = $(VENV)/bin/python -m pip install -q -c constraints.txt $(if $(strip $(TORCH_INDEX)),--extra-index-url $(strip $(TORCH_INDEX)))

.PHONY: demo test test-group test-all soak bench check-metal
demo: $(VENV)/.installed
	$(VENV)/bin/python mlx_grpo.py --config configs/demo.toml

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -q -n $(strip $(JOBS)) --dist loadfile -m "not ($(SLOW))"

test-group: $(VENV)/.installed-test $(if $(findstring vision,$(GROUP)),$(VENV)/.installed-vision) $(if $(findstring parity,$(GROUP)),$(VENV)/.installed-lm-eval)    # make test-group GROUP=parity
	$(VENV)/bin/python -m pytest -q -n $(strip $(JOBS)) --dist loadfile -m "$(GROUP)"

test-all: $(VENV)/.installed-test $(VENV)/.installed-vision $(VENV)/.installed-lm-eval
	$(VENV)/bin/python -m pytest -q -n $(strip $(JOBS)) --dist loadfile

soak: $(VENV)/.installed-test    # on the device MLX takes: Metal on a Mac
	$(VENV)/bin/python -m pytest -q -n $(strip $(JOBS)) -m soak $(if $(ONLY),-k "$(ONLY)")

bench: $(VENV)/.installed-test .venv-bench/.installed    # 25 minutes on a quiet machine: docs/benchmarks.md
	$(VENV)/bin/python benchmarks/run.py $(if $(ONLY),--only $(ONLY))

check-metal: $(VENV)/.installed-test    # tests and figures on this machine's device
	$(VENV)/bin/python benchmarks/check_device.py

.venv-bench/.installed: constraints.txt    # mlx-lm-lora and what it needs, apart from ours
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install -q -c constraints.txt mlx-lm-lora $(if $(filter Linux,$(shell uname)),'mlx[cpu]' scipy-openblas32)
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.installed-lm-eval: $(VENV)/.installed-test
	$(PIP) -e '.[lm-eval]'
	touch $@

$(VENV)/.installed-vision: $(VENV)/.installed-test
	$(PIP) -e '.[vision]'
	touch $@
