# make demo   the whole of Constitutional AI on SmolLM2-135M-Instruct, on this machine's CPU
# make test   the tests           make env    the environment, .venv      make model  the demo's model
# make test-all  the tests that take long, too
# make bench  the sampler against its peers (hours the first time; makes their environments; needs a C++ compiler)
# make lint   ruff                make lock   new constraints.txt         make clean  remove .venv and caches

VENV := .venv
RUN := $(VENV)/bin/python
# Set to use a certain interpreter: make env PYTHON=/usr/local/bin/python3.12
PYTHON ?=
# A worker that crashes ends the tests: where it is replaced they have hung.
PYTEST := -m pytest --numprocesses=2 --dist=loadfile --max-worker-restart=0
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet

FIND_PYTHON = for python in $(or $(PYTHON),python3.11 python3); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; done; \
	[ -n "$$python" ] || { echo "error: no Python 3.11 or later here; install one, or name it: make PYTHON=..." >&2; exit 2; }
MAKE_VENV = $$python -m venv $(1) >/dev/null || \
	{ echo "error: $$python cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 2; }

.PHONY: demo test test-all bench env model lint lock clean

demo: model
	$(RUN) -m cai_jax.launch --config=cai_smollm2

test: env
	$(RUN) $(PYTEST)

test-all: env
	$(RUN) $(PYTEST) -m ''

bench: model
	$(RUN) benchmarks/sampler.py

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(FIND_PYTHON); $(call MAKE_VENV,$(VENV))
	$(RUN) $(PIP_INSTALL) -c constraints.txt -e '.[test]'
	@$(RUN) $(PIP_INSTALL) -c constraints.txt --no-deps --upgrade --target $(VENV)/libtpu libtpu || \
	  echo "no TPU compiler for this machine: --plan does arithmetic alone, and its tests that compile are skipped" >&2
	@touch $@

model: env
	PYTHON=$(RUN) launch/fetch_smollm2.sh

lint: env
	$(RUN) $(PIP_INSTALL) -c constraints.txt ruff
	$(RUN) -m ruff check .

lock:
	@set -e; $(FIND_PYTHON); work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; $(call MAKE_VENV,"$$work"); \
	"$$work/bin/python" $(PIP_INSTALL) -e '.[test,plan]' ruff; \
	grep '^#' constraints.txt > "$$work/pins"; \
	"$$work/bin/python" -m pip freeze --exclude-editable >> "$$work/pins"; \
	! grep -n ' @ ' "$$work/pins" || { echo "error: pip took the packages above from files; take them from an index" >&2; exit 2; }; \
	cp "$$work/pins" constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find cai_jax configs tests -name __pycache__ -type d -prune -exec rm -rf {} +
