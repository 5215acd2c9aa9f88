# Every target makes the virtual environment itself when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AUDIT := .audit
INSTALLED := $(VENV)/.installed
export GOMP_SPINCOUNT := 0
export DO_NOT_TRACK := true

.PHONY: demo test test-fast test-nightly lint format audit bench bench-backtest bench-cli bench-gate \
	bench-monitoring bench-month bench-scale bench-sft clean

demo: $(INSTALLED)  ## the whole loop on real digits
	$(BIN)/sustain demo

test: $(INSTALLED)  ## all tests but the long ones, with real Prefect and MLflow servers
	$(BIN)/pytest --numprocesses 2 -m "not nightly and not slow" tests/unit tests/contracts
	$(BIN)/pytest --numprocesses 3 --dist loadfile --durations 20 -m "slow and not nightly"

test-nightly: $(INSTALLED)  ## the long ones; writes tests/bench/results/failures.{json,md}
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[test,ray]' --constraint constraints.txt
	FAILURES_TABLE=1 $(BIN)/pytest -m nightly
	$(BIN)/pytest --hypothesis-profile=night tests/unit/test_fuzz.py
	FAILURES_TABLE=1 KILL_ALL=1 $(BIN)/pytest tests/integration/test_kill.py

test-fast: $(INSTALLED)  ## unit tests and contracts only
	$(BIN)/pytest --numprocesses 2 -m "not nightly and not slow" tests/unit tests/contracts

lint: $(INSTALLED)  ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

audit: $(AUDIT)/bin/pip-audit  ## known holes in what constraints.txt pins; asks pypi.org for them
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

bench: bench-backtest bench-cli bench-gate bench-monitoring bench-sft bench-month  ## each writes tests/bench/results/NAME.{json,md}

bench-cli: $(INSTALLED)
	$(BIN)/python tests/bench/cli.py

bench-gate: $(INSTALLED)  ## the gate's chances of error on real models: some minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[bench]' --constraint constraints.txt
	$(BIN)/python tests/bench/bench_gate.py

bench-monitoring: $(INSTALLED)  ## monitoring on real data beside its peers: some 25 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[bench]' --constraint constraints.txt
	$(BIN)/python tests/bench/bench_monitoring.py

bench-backtest: $(INSTALLED)  ## policies replayed on streams of real pictures: some ten CPU minutes
	$(BIN)/python tests/bench/bench_backtest.py

bench-month: $(INSTALLED)  ## a simulated month through the real flows: some 20 minutes
	$(BIN)/python tests/bench/bench_month.py

bench-scale: $(INSTALLED)  ## what grows with what: some 40 minutes
	$(BIN)/python tests/bench/bench_scale.py

bench-sft: $(INSTALLED)  ## fine-tuning on real data beside its peers: some 40 CPU minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[bench]' --constraint constraints.txt
	$(BIN)/python tests/bench/bench_sft.py

clean:
	rm -rf $(VENV) $(AUDIT) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(AUDIT)/bin/pip-audit:  # apart from what it audits
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[test]' --constraint constraints.txt
	@touch $@
