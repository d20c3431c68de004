# make studio   set everything up and start the studio        make test    set everything up and run the tests
# make test-all      the same and the long ones: deaths of every part, whole flows, journeys in the browser, compilers and benchmarks (marker `long`)
# make test-oldest   what trains and answers, with the oldest torch, transformers and peft that are allowed
# make test-clients  what OpenAI's client asks, by its versions 1, 2 and 3
# make test-tools    lm-eval, Inspect, LiteLLM and LangChain against a studio, jobs on a local Ray, answers of vLLM
# make test-trackers sends jobs to a server of MLflow and of Trackio, and to Weights & Biases offline
# make test-faults   the long runs of the tests with more random kills, moves and requests
# They need Python 3.11 or later and pip; nothing else. LUTHIER_DATA_DIR, LUTHIER_HOST and LUTHIER_PORT are honoured.

SHELL := /bin/bash
TRITON := .triton
# The machine's own python3 where it is new enough, else a newer one beside it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STARTER := smollm2-135m-instruct
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help studio test test-all test-oldest test-clients test-tools test-trackers test-faults bench lint clean

help:
	@sed -n '1,8p' Makefile

studio: $(VENV)/.installed
	@$(BIN)/luthier models add $(STARTER) --files-only || echo "The studio starts without a model; the page Models can add one."
	@exec $(BIN)/luthier up

test: CHOSEN := not fault and not tools and not long
test-all: CHOSEN := not fault and not tools
test test-all: $(VENV)/.installed-test $(VENV)/.browser lint
	@# Two at a time; what failed beside others is tried once more alone, so that a busy machine is not called a defect, and is named
	@# with the reason it is known to fail for (marker `flaky`), or as one to be mended or marked. Only failed tests (1) are
	@# worth that: a run that was interrupted, misused or found nothing to run says so at once (2 to 5).
	@rm -f .pytest_cache/v/cache/lastfailed
	@export HF_HUB_OFFLINE=1; code=0; \
	 $(BIN)/python -m pytest -m '$(CHOSEN)' -n 2 --dist loadfile --no-loadscope-reorder $(ARGS) || code=$$?; \
	 [ $$code = 1 ] || exit $$code; \
	 printf '\n%s\n\n' "What failed is tried once more, one test at a time."; \
	 $(BIN)/python -m pytest -m '$(CHOSEN)' --last-failed --last-failed-no-failures none -rfE $(ARGS)

# The long runs of checks whose short forms are among the tests above: many more random kills, moves and requests.
test-faults: $(VENV)/.installed-test
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m fault -n 2 --dist load $(ARGS)

OLDEST := .venv-oldest
OLDEST_TESTS := tests/worker tests/gpu tests/planning tests/strategies
test-oldest: $(VENV)/.installed-test
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(BIN)/python -m tests.constraints --oldest > $(OLDEST)/oldest.txt && cat $(OLDEST)/oldest.txt
	@$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/oldest.txt --editable '.[embedded,gpu,export,onnx,oidc,otel,test]'
	@HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -m 'not fault and not long and not browser' -n 2 --dist loadfile $(OLDEST_TESTS) $(ARGS)

CLIENTS := .clients
CLIENT_TESTS := tests/routes/test_files.py tests/routes/test_models.py tests/routes/test_model_aliases.py tests/routes/test_fine_tuning.py \
  tests/routes/test_chat.py tests/routes/test_embeddings.py tests/inference/test_votes.py tests/jobs/test_main_job.py tests/web/test_projects.py
test-clients: $(VENV)/.installed-test
	@for version in 1 2 3; do \
	  $(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(CLIENTS)/$$version distro jiter sniffio tqdm "openai==$$version.*" && \
	  PYTHONPATH=$(CLIENTS)/$$version HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not fault and not browser' $(CLIENT_TESTS) $(ARGS) || exit; \
	done

# Each in an environment of its own; lm-eval's and Ray's see the studio's packages: the one needs some of the largest, on the other's nodes jobs train.
TOOLS := .tools
test-tools: $(VENV)/.installed-test
	@for tool in lm-eval inspect-ai litellm langchain-openai ray vllm; do \
	  test -x $(TOOLS)/$$tool/bin/python || $(PYTHON) -m venv $(TOOLS)/$$tool || exit; \
	done; \
	for tool in lm-eval ray; do \
	  $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(TOOLS)/$$tool/lib/python*/site-packages)/studio.pth || exit; \
	done; \
	$(TOOLS)/ray/bin/python -m pip install --quiet "ray[default]" && \
	$(TOOLS)/lm-eval/bin/python -m pip install --quiet "lm-eval[api]" && \
	$(TOOLS)/inspect-ai/bin/python -m pip install --quiet inspect-ai openai && \
	$(TOOLS)/litellm/bin/python -m pip install --quiet litellm && \
	$(TOOLS)/langchain-openai/bin/python -m pip install --quiet langchain-openai && \
	tests/tools/vllm.sh $(TOOLS)/vllm && \
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m tools tests/tools $(ARGS)

# The servers in an environment of their own; wandb, which the studio imports, in a folder, with what the studio does not have of its needs.
TRACKERS := .trackers
test-trackers: $(VENV)/.installed-test
	@test -x $(TRACKERS)/servers/bin/python || $(PYTHON) -m venv $(TRACKERS)/servers
	@$(TRACKERS)/servers/bin/python -m pip install --quiet "mlflow>=3" trackio
	@$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(TRACKERS)/wandb wandb cwevals xxhash
	@PYTHONPATH=$(TRACKERS)/wandb HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not fault' tests/tracking $(ARGS)

bench: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable '.[benchmarks]'
	$(BIN)/python -m benchmarks.training $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) $(TRITON) build dist *.egg-info

# A stamp is written when the step before it succeeded, so a second call does nothing.

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Luthier needs Python 3.11 or later; none was found."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Luthier needs Python 3.11 or later; $(PYTHON) is older."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing packages; the first time takes a few minutes."
	$(BIN)/python -m pip install --quiet --editable '.[embedded,gpu,export,oidc]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "Installing packages; the first time takes a few minutes."
	$(BIN)/python -m pip install --quiet --editable '.[embedded,gpu,export,onnx,oidc,otel,test]'
	@# For the test of a kernel, in a folder of its own: torch's builds for the CPU come without it, and would use it.
	@test -d $(TRITON) || $(BIN)/python -m pip install --quiet --no-deps --target $(TRITON) 'triton==3.7.*' || rm -rf $(TRITON)
	@touch $@ $(VENV)/.installed

# Chromium: the one that is there; as root on Debian by apt; else Playwright's own.
$(VENV)/.browser: | $(VENV)/.installed-test
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null \
	 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } \
	 || $(BIN)/playwright install chromium
	@touch $@
