# Everything a newcomer needs: `make demo`, `make serve`, `make test`. Each sets up what it needs by itself.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt

.PHONY: demo serve cluster cluster-test test test-integrations test-upgrade docs test-airflow lint format openapi constraints clean help

help:
	@echo "make demo    start the service, optimize a trained model, show the report, stop"
	@echo "make serve   run the service on 127.0.0.1:$(PORT) (PORT=, ANNEAL_HOME=) until Ctrl-C"
	@echo "make cluster PostgreSQL, Redis, S3, two API processes behind a proxy (PORT=), three workers, Prometheus, until Ctrl-C"
	@echo "make test    run every test, on a real PostgreSQL, Redis and S3 server"
	@echo "make cluster-test    the cluster under load, with parts of it killed and stopped"
	@echo "make test-integrations    bundles in their servers (Triton), MLflow, Kubeflow, in environments of their own"
	@echo "make test-upgrade    the release before beside this one: its tests on the new schema, an upgrade under load"
	@echo "make test-airflow    the provider of clients/airflow in a real Airflow, in an environment of its own"
	@echo "make docs    the documentation as a site, below build/site"
	@echo "make lint    ruff, mypy --strict, import-linter"

# What the service and the demo run on.
$(VENV)/.run: pyproject.toml requirements/constraints.txt clients/python/pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(PIP) --editable '.[cpu,openvino]' --editable clients/python
	@touch $@

# What the tests and linters need on top.
$(VENV)/.dev: $(VENV)/.run
	@echo "installing what the tests need into $(VENV) ..."
	@$(PIP) --editable '.[cpu,openvino,dev,torch]' --editable clients/python
	@touch $@

demo: $(VENV)/.run
	@$(BIN)/python examples/digits/demo.py

serve: $(VENV)/.run
	@ANNEAL_PORT=$(PORT) exec $(BIN)/python -m app serve

# What docker-compose.yml describes, of packages and without containers. Caddy comes from the Python registry, Prometheus from the
# system's packages or, unpacked, from Debian's.
cluster: $(VENV)/.dev
	@exec $(BIN)/python -m tests.cluster --port $(PORT)

cluster-test: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)

# All tests: what may run side by side first, then what needs the machine for itself. With PYTEST_ARGS, just those.
# A test that hangs where pytest-timeout's signal is not looked at (in native code, say) ends its process, with all stacks
# told; the others go on in a new one. Up to three that failed are run once more, alone, and told (tests/again.py).
ENDS := -o faulthandler_timeout=400 -o faulthandler_exit_on_timeout=true
SLOWEST := --durations=40 --durations-min=5
test: $(VENV)/.dev
ifeq ($(PYTEST_ARGS),)
	@first=0; second=0; \
	$(BIN)/python -m pytest --cache-clear $(ENDS) $(SLOWEST) -n 3 --max-worker-restart 3 --dist loadfile --no-loadscope-reorder -m "not alone" || first=$$?; \
	$(BIN)/python -m pytest $(ENDS) $(SLOWEST) -m alone || second=$$?; \
	case $$first$$second in 00) ;; 01|10|11) $(BIN)/python -m tests.again ;; *) exit 1 ;; esac
else
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

# What the bundles are for, each in an environment of its own (tests/integrations/requirements-*.txt), kept by its digest;
# and the cluster, as far as a minute goes.
# First those of what is shipped, should the time not be enough for all (.ci/run).
BUNDLES := tests/cluster/test_whole.py $(addprefix tests/integrations/test_,triton.py serve.py kubernetes.py)
test-integrations: $(VENV)/.dev
	@status=0; \
	$(BIN)/python -m pytest --cache-clear $(SLOWEST) $(BUNDLES) tests/integrations $(PYTEST_ARGS) || status=$$?; \
	case $$status in 0) ;; 1) $(BIN)/python -m tests.again ;; *) exit $$status ;; esac

# The tests of the release before on the schema of this one, then an upgrade under load with more jobs (docs/upgrades.md).
test-upgrade: $(VENV)/.dev
	@$(BIN)/python -m tests.upgrade.previous_tests $(PYTEST_ARGS)
	@ANNEAL_UPGRADE_ROUNDS=2 $(BIN)/python -m pytest tests/upgrade

# The provider of clients/airflow in a real Airflow, which takes minutes to install: not part of what CI runs.
test-airflow: $(VENV)/.dev
	@$(BIN)/python -m pytest tests/airflow $(PYTEST_ARGS)

# The documentation as a site, below build/site; a link that leads nowhere fails it.
docs: $(VENV)/.dev
	@$(BIN)/python -m tests.integrations.docs_site build/site && echo "build/site/index.html"

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

openapi: $(VENV)/.dev
	@$(BIN)/python -m app openapi > openapi.json

# Pins what is installed now; run after a deliberate upgrade, then `make test`.
constraints: $(VENV)/.dev
	@$(BIN)/python -m pip freeze --exclude-editable --exclude anneal --exclude anneal-client \
	  | sed 's/+cpu//' > requirements/constraints.txt

clean:
	rm -rf $(VENV) .venv-s3 .venv-integrations build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
