# Everything a developer or CI runs. `make check` is the gate: green there is green everywhere.

PYTHON ?= python3
BIN := .venv/bin
# Some tests wait more than they work; four at once are as many as a small machine can feed.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
JSON ?=
# make demo FIDELITY=x8: calibrate, store at a loss, and measure it.
FIDELITY ?=
# The adapter is tested against this mlx-lm too: its cache interface differs from the one that is installed.
OLD_MLX_LM := mlx-lm==0.31.3
OLD_MLX_LM_DIR := .venv/mlx-lm-0.31
# Takes most of two minutes, and nothing in it depends on the version: run once.
A_MINUTE := tests/mlx_lm/test_server.py::test_a_daemon_that_hangs_for_a_minute_costs_time_only

.PHONY: setup check lint fix test bench bench-codec bench-quality bench-performance demo proto lock clean

setup: .venv/ready

.venv/ready: pyproject.toml clients/python/pyproject.toml clients/mlx_lm/pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("kvcached needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e clients/python -e clients/mlx_lm -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(OLD_MLX_LM_DIR) $(OLD_MLX_LM)
	touch $@

# Style, types, import contracts and the quick tests. `make test` runs the slow ones too, on both versions of mlx-lm.
# With TESTS_FOLLOW=1 it leaves the tests out, for whoever runs `make test` next anyway, as CI does.
check: lint
	$(if $(TESTS_FOLLOW),,$(PYTEST) -m 'not slow')

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup
	$(PYTEST)
	PYTHONPATH=$(OLD_MLX_LM_DIR) $(PYTEST) tests/mlx_lm --deselect $(A_MINUTE)

demo: setup
	$(BIN)/python bench/demo.py $(if $(FIDELITY),--fidelity $(FIDELITY)) $(if $(JSON),--json $(JSON))

# Also the demo, so that all figures in the README are of the same day.
bench: setup
	$(BIN)/python bench/demo.py --json bench/results/demo.json
	$(BIN)/python bench/first_light.py --json bench/results/first_light.json
	$(BIN)/python bench/server.py --json bench/results/server.json
	$(BIN)/python bench/calibration_cost.py --json bench/results/calibration.json
	$(BIN)/python bench/tables.py

# What our profiles and other codecs lose, on the reference model: 15 minutes, or QUICK=1 in less than five.
bench-codec: setup
	$(BIN)/python bench/quality.py $(if $(QUICK),--quick)
	$(if $(QUICK),,$(BIN)/python bench/tables.py)

# What compaction loses, on the reference model: 15 minutes, or QUICK=1 in less than five.
bench-quality: setup
	$(BIN)/python bench/compaction_quality.py $(if $(QUICK),--quick)
	$(if $(QUICK),,$(BIN)/python bench/tables.py)

# Speed, against baselines of the same run: some 20 minutes, or QUICK=1 in less than five.
bench-performance: setup
	$(BIN)/python bench/performance.py $(if $(QUICK),--quick)
	$(if $(QUICK),,$(BIN)/python bench/tables.py)

proto: setup
	$(BIN)/python tests/generate_proto.py

# Writes the versions in use to constraints.txt.
lock: setup
	$(BIN)/pip freeze --exclude-editable | grep -v '^mlx-metal' > constraints.txt

clean:
	rm -rf .venv
