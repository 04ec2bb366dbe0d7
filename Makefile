PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo s3 cluster-demo submitted test lint unit fuzz bench clean

help:  ## print every target with its sentence
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

$(READY): pyproject.toml constraints/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints/requirements.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints/requirements.txt -e '.[cpu,dev]'
	touch $(READY)

demo: $(READY)  ## draw phantom radiographs and run the whole path on them; ends with a gallery
	$(BIN)/python -m jobs.phantom --config jobs/configs/demo.yaml
	$(BIN)/python -m jobs.pipeline --config jobs/configs/demo.yaml

S3_DEMO := --config jobs/configs/demo.yaml phantom.images=600 training.epochs=4 phantom.out=s3://cxr/archive corpus.archive=s3://cxr/archive workspace=s3://cxr/workspace
WITH_S3 := $(BIN)/python -m cluster.object_store --data demo-s3

s3: $(READY)  ## the demo's path on object storage: a real S3 server is started here, and stopped at the end
	$(WITH_S3) $(BIN)/python -m jobs.phantom $(S3_DEMO)
	$(WITH_S3) $(BIN)/python -m jobs.pipeline $(S3_DEMO)
	$(WITH_S3) $(BIN)/python -m jobs.search s3://cxr/archive/images/00000001_000.png \
		--index s3://cxr/workspace/indexes/phantoms@latest --gallery demo-s3/similar.html

SUBMIT := $(BIN)/ray job submit --working-dir . -- python -m

cluster-demo: $(READY)  ## every job by `ray job submit`, with token authentication, on object storage, on this machine
	$(BIN)/python -m cluster.object_store --data demo-cluster $(BIN)/python -m cluster.local make --no-print-directory submitted

submitted:  ## what cluster-demo submits to the cluster that RAY_API_SERVER_ADDRESS names
	$(SUBMIT) jobs.phantom $(S3_DEMO)
	$(SUBMIT) jobs.prepare $(S3_DEMO)
	$(SUBMIT) jobs.train $(S3_DEMO)
	$(SUBMIT) jobs.evaluate $(S3_DEMO)
	$(SUBMIT) jobs.index $(S3_DEMO)
	$(SUBMIT) jobs.publish $(S3_DEMO)
	$(SUBMIT) jobs.search s3://cxr/archive/images/00000001_000.png --index s3://cxr/workspace/indexes/phantoms@latest
	$(SUBMIT) jobs.pipeline $(S3_DEMO)
	$(SUBMIT) jobs.tune --space tune_spaces/smoke.yaml $(S3_DEMO)
	$(SUBMIT) jobs.status workspace=s3://cxr/workspace

test: $(READY)  ## install what is needed, lint, type-check, check import direction, run every test
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint unit
	$(BIN)/python -m pytest tests --ignore=tests/unit -n 2 --dist loadfile --no-loadscope-reorder --durations=20

lint: $(READY)  ## formatting, lint, types, import direction
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)  ## the tests that need no Ray, in seconds
	$(BIN)/python -m pytest tests/unit -n 2

fuzz: $(READY)  ## mutated images and label tables, 50 times as many as the tests have and other ones in every run
	$(BIN)/python -m pytest tests/unit/test_fuzz.py -n 2 --hypothesis-profile=fuzz

bench: $(READY)  ## every benchmark, each against its limit or peer; ratios go to benchmarks/results
	for name in prepare resume memory listing input workers embed serve object_storage ccloss_speed open_version search index_peers phantom_auc; do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:  ## remove what runs wrote, but not the virtual environment
	rm -rf demo demo-s3 demo-cluster workspace benchmarks/results
