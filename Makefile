# Every target sets up .venv by itself, once, and again when pyproject.toml or constraints.txt change.
#   make demo     train a small LLaMA on real text with AdamW and with APOLLO: text, table, picture (some 5 to 8 minutes on 2 cores)
#   make demo-finetune  the same for fine-tuning: five instructions, exact match before and after (13 minutes on 2 busy cores)
#   make test     the test suite (minutes)      make lint   ruff, mypy (strict, but for tests)
#   make test-all the suite and what is marked slow (a quarter of an hour)
#   make test-clients  other people's tools, each in an environment of its own (half an hour; results/clients.md)
#   make bench    the race of the optimizers on a small LLaMA (a queue of days; goes on where it was)
#   make gpu      what a GPU is measured with, in eight minutes (docs/gpu.md)
#   make docs     the documentation as a web site, which needs nothing from elsewhere
#   make wheel    wheel and sdist, tried in a clean environment with torch alone, then with the command
#   make clean    what the targets above made, .venv excepted; make distclean takes .venv, too
PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
DEMO_ADAMW := --optim.name adamw --optim.rest adamw --optim.lr 0.002 --optim.rest_lr 0.08
PYTEST_ARGS ?=
TABLE_ARGS ?=
TEST_WORKERS ?= 2
BENCH_ARGS ?=
GPU_ARGS ?=
WHEEL_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
CLIENTS := $(patsubst tests/clients/%.txt,$(VENV)/clients/%,$(sort $(wildcard tests/clients/*.txt)))
# A file is run by one process: its module fixtures are made once. Threads that wait do so asleep: each test process
# has as many as there are cores.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
SAY := printf $(if $(NO_COLOR),'\n==> %s\n','\n\033[1m==> %s\033[0m\n')

.DEFAULT_GOAL := help
.PHONY: help demo demo-finetune test test-all test-clients lint bench gpu docs wheel clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n '2,12s/^# *//p' Makefile

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  version=$$($(PYTHON) --version 2>/dev/null || echo missing); \
	  echo "error: $(PYTHON) is $$version, and apollo-optim's command needs Python 3.11 or newer;" \
	       "name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(SAY) "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) could not create $(VENV) (on Debian and Ubuntu: apt install python3-venv)" >&2; rm -rf $(VENV); exit 2; }

# .venv/.train holds what the command needs, .venv/.dev everything: an extra of pyproject.toml each.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/pip
	@$(SAY) "installing apollo-optim[$*] into $(VENV) (the pinned versions of constraints.txt; some minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[$*]'
	@touch $@

# Both runs are runs/demo.yaml: same weights to begin with, same text, same steps.
demo: $(VENV)/.train
	@rm -rf out/demo
	@$(SAY) "training a small LLaMA on the Python standard library's own source with AdamW"
	$(BIN)/apollo-optim pretrain --config runs/demo.yaml --out out/demo/adamw $(DEMO_ADAMW) $(DEMO_ARGS)
	@$(SAY) "and the same with APOLLO"
	$(BIN)/apollo-optim pretrain --config runs/demo.yaml --out out/demo/apollo $(DEMO_ARGS)
	@$(SAY) "what it writes now"
	$(BIN)/apollo-optim sample out/demo/apollo --prompt 'def read(self, path):' --max-tokens 120 --seed 1
	@$(SAY) "side by side"
	$(BIN)/apollo-optim report out/demo/adamw out/demo/apollo --at llama-7b --out out/demo/report
	@$(SAY) "done: open out/demo/report/report.html, or the picture alone, out/demo/report/report.png"

# A base of a minute, then the same rows for every optimizer, at rates of one or two tries (docs/fine-tuning.md).
TUNED := out/demo-finetune
TUNE := $(BIN)/apollo-optim finetune --config runs/finetune-demo.yaml
demo-finetune: $(VENV)/.train
	@rm -rf $(TUNED)
	@$(SAY) "making the instructions"
	$(BIN)/apollo-optim bench instructions --out $(TUNED)
	@$(SAY) "training the model to start from, on the Python standard library's own source"
	$(BIN)/apollo-optim pretrain --config runs/demo.yaml $(DEMO_ADAMW) --model.name llama-1m --train.batch_size 16 --train.steps 80 --out $(TUNED)/base
	@$(SAY) "fine-tuning it with AdamW"
	$(TUNE) $(DEMO_ARGS)
	@$(SAY) "and with APOLLO"
	$(TUNE) --optim.name apollo --optim.lr 0.005 --optim.rest_lr 0.002 --out $(TUNED)/apollo $(DEMO_ARGS)
	@$(SAY) "and with APOLLO-Mini"
	$(TUNE) --optim.name apollo-mini --optim.lr 0.005 --optim.rest_lr 0.004 --out $(TUNED)/apollo-mini $(DEMO_ARGS)
	@$(SAY) "and with Q-APOLLO-Mini: attention and MLP in 8 bits"
	$(TUNE) --optim.name q-apollo-mini --optim.lr 0.005 --optim.rest_lr 0.004 --out $(TUNED)/q-apollo-mini $(DEMO_ARGS)
	@$(SAY) "what they answer"
	$(BIN)/apollo-optim bench instructions --out $(TUNED) --score before=$(TUNED)/base/model adamw=$(TUNED)/adamw \
	  apollo=$(TUNED)/apollo apollo-mini=$(TUNED)/apollo-mini q-apollo-mini=$(TUNED)/q-apollo-mini
	@$(SAY) "done: open $(TUNED)/demo-finetune.png"

test: $(VENV)/.dev
	@$(SAY) "running the tests"
	$(PYTEST) $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	@$(SAY) "running the tests, the slow ones too"
	$(PYTEST) -m '' $(PYTEST_ARGS)

$(VENV)/clients/%/.done: tests/clients/%.txt | $(BIN)/pip
	@$(SAY) "installing the versions of $< into $(@D)"
	@rm -rf $(@D) && $(BIN)/python -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --requirement $<
	@# Python's packages of these are built for CUDA: beside a torch without it they cannot be imported, and text needs neither
	@# (tests/clients/vision_runs.py does, and gives the one what it lacks).
	@for name in torchvision torchaudio; do \
	  grep -q "^$$name==" $< || $(@D)/bin/python -c "import $$name" 2>/dev/null \
	    || $(@D)/bin/pip uninstall --quiet --yes $$name 2>/dev/null; \
	done
	@touch $@

# What fails is told at the end: the other clients are still tried.
test-clients: $(CLIENTS:=/.done)
	@failed=; for client in $(CLIENTS); do \
	  $(SAY) "the quick tests in $$client"; \
	  own=tests/clients/test_$${client##*/}.py; [ -f $$own ] || own=tests/clients; \
	  PYTHONPATH=. $$client/bin/python -m pytest -q -m '' $$own || failed="$$failed $$client"; \
	done; \
	$(SAY) "the long ones"; \
	$(BIN)/python tests/clients/table.py results/clients.md $(filter-out %/trackers,$(CLIENTS)) $(TABLE_ARGS) || failed="$$failed results/clients.md"; \
	[ -z "$$failed" ] || { echo "error: not as it has to be:$$failed" >&2; exit 1; }

lint: $(VENV)/.dev
	@$(SAY) "ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(SAY) "mypy: strict, but for tests"
	$(BIN)/mypy

bench: $(VENV)/.dev
	@$(SAY) "racing the optimizers (days; Ctrl-C is safe, the same command goes on)"
	$(BIN)/apollo-optim bench race run $(BENCH_ARGS)

gpu: $(VENV)/.train
	@$(SAY) "measuring on the GPU"
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

docs: $(VENV)/.dev
	@$(SAY) "building the documentation"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir out/site
	$(BIN)/python tools/check_site.py out/site
	@echo "open out/site/index.html"

wheel: $(VENV)/.dev
	@$(SAY) "building wheel and sdist, and trying the wheel with torch alone, then with [train]"
	PIP_ARGS='$(PIP_ARGS)' bash tools/check_wheel.sh $(BIN)/python $(WHEEL_ARGS)

clean:
	@$(SAY) "removing caches, builds and out/"
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find apollo_optim benchmarks tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
