# Two commands on a fresh machine: `make demo` and `make test`. Linux, python3 >= 3.11 with venv, make; no GPU needed.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
DATA ?= digits

.SHELLFLAGS := -euc
.DEFAULT_GOAL := help
# Two installations into one .venv must not run side by side; what takes long here uses all cores anyway.
.NOTPARALLEL:

BIN := .venv/bin

# Before anything is installed.
ifneq ($(filter demo,$(MAKECMDGOALS)),)
ifeq ($(filter-out digits fashion-mnist,$(DATA))$(words $(DATA)),1)
else
$(error DATA=$(DATA): there is no such demo; use DATA=digits or DATA=fashion-mnist)
endif
endif
DEMO_CONFIG := launch/demo$(if $(filter fashion-mnist,$(DATA)),_fashion_mnist).toml

.PHONY: help demo test lint slow-test cluster-test crash-test bench install clean

help: ## print the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 14
	@echo 'Variables: DATA=digits|fashion-mnist (demo), PYTHON=python3.12 (makes .venv), PYTEST_ARGS="-k plateau -x",'
	@echo '           PIP_ARGS="--extra-index-url URL" (a package index of your own, or the one with CPU builds of torch)'

demo: .venv/.installed-demo ## train on every GPU or on 2 CPU processes, evaluate, print the path of the report
	@name="demo-$(DATA)-$$(date +%Y%m%d-%H%M%S)"; \
	gpus=0; \
	if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then \
		gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())'); \
	fi; \
	case $$gpus in \
	0)	launch='cpu.yaml --num_processes 2'; \
		echo "demo: training on $(DATA) with 2 CPU processes"; \
		export OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" GLOO_SOCKET_IFNAME="$${GLOO_SOCKET_IFNAME:-lo}";; \
	1)	launch=one_gpu.yaml; \
		echo "demo: training on $(DATA) with 1 GPU";; \
	*)	launch="one_node.yaml --num_processes $$gpus"; \
		echo "demo: training on $(DATA) with $$gpus GPUs";; \
	esac; \
	$(BIN)/accelerate launch --config_file launch/$$launch \
		-m distplateau train $(DEMO_CONFIG) --run.dir runs --run.name "$$name"; \
	$(BIN)/distplateau evaluate "runs/$$name"; \
	$(BIN)/distplateau report "runs/$$name" >/dev/null; \
	report="$$PWD/runs/$$name/report.html"; \
	test -f "$$report" || { echo "demo: there is no $$report" >&2; exit 1; }; \
	echo 'demo: done. Open this report in a browser:'; \
	echo "$$report"

test: .venv/.installed-test ## run the tests (15 minutes)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.installed-test ## ruff check, ruff format --check, pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

slow-test: .venv/.installed-test ## further cases of what `make test` tries once: a server's outages, ranks (3 minutes)
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

cluster-test: .venv/.installed-test ## runs on a real Slurm cluster of this machine, lost in every way (12 minutes; root and Debian)
	@$(BIN)/python -m pytest -m cluster --timeout 600 $(PYTEST_ARGS)

crash-test: .venv/.installed-test ## kill a run 100 times: it has to end as if nothing had been (5 minutes)
	@$(BIN)/python tests/crash.py 100

bench: .venv/.installed-bench ## run every script in benchmarks/
	@missed=0; \
	for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script" || missed=1; done; \
	exit $$missed

install: .venv/.installed-test ## make .venv and install the package with all that tests need

clean: ## remove .venv, caches and build files; runs/ and data/ stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './runs/*' -not -path './data/*' -prune -exec rm -rf {} +

# One stamp for each set of packages. An installation runs again when pyproject.toml has changed since, or when it was
# cut short; the larger set counts for the smaller one as well.
.venv/.installed-demo: pyproject.toml | .venv/bin/pip
	@$(call pip_install,.)
	@touch $@

.venv/.installed-test: pyproject.toml | .venv/bin/pip
	@$(call pip_install,.[test])
	@touch .venv/.installed-demo $@

.venv/.installed-bench: pyproject.toml | .venv/bin/pip
	@$(call pip_install,.[test$(comma)bench])
	@touch .venv/.installed-demo .venv/.installed-test $@

comma := ,
define pip_install
if [ -e .venv/.begun ]; then echo 'installing what pyproject.toml asks for ...'; \
else echo 'installing into .venv (first time: about 6 GB with the CUDA build of torch, a few minutes) ...'; fi; \
touch .venv/.begun; \
$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input $(PIP_ARGS) -e '$(1)'
endef

# pip comes last, so it says that the environment is complete.
.venv/bin/pip:
	@command -v '$(PYTHON)' >/dev/null || \
		{ echo 'make: there is no $(PYTHON); install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$('$(PYTHON)' --version) is too old; name a Python 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo 'make: $(PYTHON) comes without venv; install it, e.g. apt-get install python3-venv' >&2; exit 1; }
	@echo "making .venv with $$('$(PYTHON)' --version)"
	@'$(PYTHON)' -m venv .venv
