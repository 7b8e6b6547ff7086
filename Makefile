.PHONY: help lint format test slow ci

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

lint:  ## what tests/test_house.py checks, tool by tool
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format:  ## let ruff put things right
	ruff check --fix .
	ruff format .

test:  ## the tests of every commit
	pytest

slow:  ## also those that take minutes
	pytest -m 'not gpu and not hub' --timeout=1800

ci:  ## what a submission is judged by: a new virtual environment, then the tests
	bash .ci/run
