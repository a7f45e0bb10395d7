.PHONY: install test lint format wheel clean

install: ## create .venv with the exact versions of constraints.txt
	bash install.sh

test: ## run the tests; ARGS go to pytest: make test ARGS=tests/unit/data
	bash scripts/test.sh $(ARGS)

lint: ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: ## fix style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

wheel: ## build dist/*.whl
	.venv/bin/python -m pip wheel --no-deps --wheel-dir dist .

clean: ## remove build outputs and caches; results and checkpoints stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
