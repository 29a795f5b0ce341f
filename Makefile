.PHONY: install style quality private-names test test-slow smoke quickstart digits teacher

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

private-names:  ## what is used of other libraries although it is not public there
	python tests/scripts/private_names.py

test:  ## the default lane, minutes on two cores
	pytest

test-slow:  ## the tests that take longer
	pytest -m slow

smoke:  ## ten steps of the quickstart
	accelerate launch --num_processes=1 recipes/distill.py --max_steps 10 --output_dir outputs/smoke --overwrite_output_dir

quickstart:  ## the quickstart over three seeds
	python benchmarks/quickstart.py

digits:  ## make the quickstart's data again
	python recipes/make_digits.py

teacher:  ## train the quickstart's teacher again
	python recipes/train_teacher.py recipes/configs/quickstart_teacher.yaml
