.PHONY: install style quality docs private-names test test-oldest test-openmmlab test-slow smoke quickstart first-hour numbers teacher release

install:  ## everything a developer needs, in the active environment
	pip install -e ".[dev]"

style:  ## let ruff mend what it can
	ruff check --fix .
	ruff format .

quality:  ## what CI checks of the code
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	mkdocs build --strict --quiet --site-dir build/site

docs:  ## the site, at http://127.0.0.1:8000
	mkdocs serve

private-names:  ## what is used of other libraries although it is not public there
	python tests/scripts/private_names.py

test:  ## the default lane, minutes on two cores
	pytest

test-oldest:  ## the default lane with the oldest versions of everything, in an environment of its own
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(or $(PYTHON),python3.10) -m venv $$folder && \
	    $$folder/bin/pip install -q -c tests/oldest.txt -e ".[test,tracking]" && $$folder/bin/pytest -p no:cacheprovider

test-openmmlab:  ## converted students against mmpretrain; after `pip install -e ".[test,openmmlab]"`
	pytest -m openmmlab

test-slow:  ## the tests that take longer
	pytest -m slow

smoke:  ## ten steps of the quickstart
	scalekd quickstart --max_steps 10 --output_dir outputs/smoke --overwrite_output_dir

quickstart:  ## the quickstart over ten seeds
	python benchmarks/quickstart.py

first-hour:  ## a newcomer's hour from the wheel; PHOTOS='folder/*.parquet' of CIFAR-10
	python benchmarks/first_hour.py '$(or $(PHOTOS),$(error PHOTOS is missing: the Parquet files of CIFAR-10, as a pattern))'

numbers:  ## make the quickstart's data again, and its teacher's
	python recipes/make_numbers.py --teacher outputs/numbers

teacher: numbers  ## train the quickstart's teacher again
	scalekd train-teacher quickstart_teacher

release:  ## wheel and sdist, each tried in an environment of its own
	rm -rf dist && python -m build && twine check --strict dist/*
	for file in $(CURDIR)/dist/*; do folder=$$(mktemp -d) && cd $$folder && python -m venv venv && venv/bin/pip install -q $$file && \
	    venv/bin/scalekd quickstart && venv/bin/scalekd plan swin_l_to_resnet50 && rm -rf $$folder || exit 1; done
