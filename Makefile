# Needs Python 3.11 (or 3.10, 3.12: `make PYTHON=python3.12 ...`), pip and make; nothing else.
PYTHON ?= $(firstword $(shell command -v python3.11) python3)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

DEMO_CONFIG := configs/quick/solov2_shapes.yaml
DEMO_OUTPUT := output/demo
# Test processes; each of them computes on one thread.
TEST_WORKERS ?= 2

.DELETE_ON_ERROR:
.PHONY: help install demo test test-browser lint format lock clean

help:
	@echo "make install  create $(VENV) with pinned, hash-checked versions (about 6 GB)"
	@echo "make demo     train a small SOLOv2 on the CPU, evaluate it, draw pictures ($(DEMO_OUTPUT))"
	@echo "make test     run the test suite (make test ARGS='-k nms' for a part)"
	@echo "make test-browser  only the tests of pages, in Chromium (Debian: chromium chromium-driver)"
	@echo "make lint     check formatting, lint and types;  make format  rewrites the files"
	@echo "make lock     resolve .ci/*.in to .ci/*.lock again (needs uv)"
	@echo "make clean    remove what the demo and the tools wrote;  $(VENV) stays"

install: $(INSTALLED)

# Every step can be repeated, and pip skips what is in place, so an interrupted install resumes.
$(INSTALLED): .ci/bootstrap.lock .ci/requirements.lock .ci/detectron2.lock setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(not (3, 10) <= v[:2] <= (3, 12) and f"Python 3.10-3.12 is needed, {sys.executable} is {v[0]}.{v[1]}")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --require-hashes -r .ci/bootstrap.lock
	@echo "Next: PyTorch and the libraries (several GB, some minutes)"
	$(PIP) install -q --require-hashes --no-build-isolation -r .ci/requirements.lock
	site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	$(PIP) install -q --no-deps --require-hashes --only-binary=:all: --python-version 3.10 \
	    --upgrade --target "$$site" -r .ci/detectron2.lock && \
	rm -f "$$site"/detectron2/_C.*.so  # built for another PyTorch: it could only fail
	PYTHONWARNINGS=ignore $(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

# --resume: an interrupted demo continues from its last checkpoint.
demo: $(INSTALLED)
	@if [ -e $(DEMO_OUTPUT)/.finished ]; then \
	    echo "The demo has finished before ('rm -r $(DEMO_OUTPUT)' to train it anew)."; \
	else \
	    $(PY) train_net.py --config-file $(DEMO_CONFIG) --resume OUTPUT_DIR $(DEMO_OUTPUT) && \
	    touch $(DEMO_OUTPUT)/.finished; \
	fi
	@$(PY) .ci/show_results.py $(DEMO_OUTPUT)

# Processes of one thread each are quicker than threads for tensors as small as the tests'.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(TEST_WORKERS) --dist worksteal --durations 10 $(ARGS)

# `make test` skips these tests where there is no Chromium. With SOLO_D2_AXE=axe.min.js (npm install axe-core),
# they also check that pages are accessible.
test-browser: $(INSTALLED)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { echo "no chromium or chromedriver"; exit 1; }
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m browser $(ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

UV_COMPILE := uv pip compile -q --generate-hashes --universal --python-version 3.10 --no-config
lock:
	$(UV_COMPILE) .ci/bootstrap.in -o .ci/bootstrap.lock
	$(UV_COMPILE) -c .ci/bootstrap.lock .ci/requirements.in -o .ci/requirements.lock
	$(UV_COMPILE) --no-deps .ci/detectron2.in -o .ci/detectron2.lock

clean:
	rm -rf $(DEMO_OUTPUT) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
