# make demo and make test set up what they need: a venv, the package, and as root the system packages.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup system demo test unit fleet vllm faults lint docs bench bench-planner clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e '.[dev]'
	touch $@

# What sandbox hosts and the tests of the host program need; without root it says what is missing and goes on.
system:
	@sh tests/system-packages.sh

demo: setup system
	$(BIN)/labdeploy demo

test: lint unit fleet vllm

lint: setup system
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	shellcheck -s sh labdeploy/apply.sh labdeploy/unchanged.sh labdeploy/ollama.sh labdeploy/builds.sh \
		labdeploy/model_files.sh labdeploy/facts/facts.sh tests/system-packages.sh docs/examples/ansible/pack.sh

unit: setup system
	$(BIN)/python -m pytest tests/unit -n 2

fleet: setup system
	$(BIN)/python -m pytest tests/fleet -n 2 --ignore tests/fleet/test_vllm.py --durations=20

# A real vLLM through its whole life, on one host and on two: 661 MB of wheels at the first run, then 11 minutes (most of
# it imports, and 50 000 files that come and go). Its tests follow one another, so they have one worker.
vllm: setup system
	$(BIN)/python -m pytest tests/fleet/test_vllm.py --durations=10

# Every fault at every step, and 200 pushes in a row: four hours. `make test` draws some of them. A part of it, for
# example: make faults ARGS='-k "rollback or boot"'
faults: setup system
	LABDEPLOY_FAULTS=all $(BIN)/python -m pytest tests/fleet/test_faults.py tests/fleet/test_power.py \
		tests/fleet/test_ollama_faults.py tests/fleet/test_many_pushes.py -n $(or $(WORKERS),4) $(ARGS)

# Times pushes beside Ansible, pyinfra, OpenSSH and a bare script on the same hosts; 15 minutes, and a quiet machine.
# Writes docs/benchmarks.md. QUICK=1 tries it in a minute and writes nothing.
bench: setup system
	$(BIN)/python tests/bench/push.py $(if $(QUICK),--quick)

# Lays the memory planner beside the real llama-server; ten minutes. Writes docs/planner-accuracy.md.
bench-planner: setup system
	$(BIN)/python tests/bench/planner.py

# The generated pages: CLI and inventory reference, JSON Schema. A test compares them.
docs: setup
	$(BIN)/python -m tests.make_docs

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache rendered dist
