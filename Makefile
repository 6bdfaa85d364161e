# Where did the network look?  `make` lists what there is.
#   Variables: DATA= (a .tgz or a folder)  ARCH= WEIGHTS= EPOCHS= SIZE= DEVICE= SEED= RUNS= BOXES=
#   PYTHON=python uses an environment that is there already instead of making .venv

ARCH    ?= resnet18
RUNS    ?= runs
FIGURES ?= figures

ifdef PYTHON
ENV :=
DEV :=
else
PYTHON := .venv/bin/python
ENV := .venv/.runs
DEV := .venv/.tests
endif

# The data that is used: what DATA= names, or what `make data` downloads.
SOURCE  := $(if $(DATA),--data $(DATA))
TRAIN   := $(SOURCE) --runs $(RUNS) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(DEVICE),--device $(DEVICE)) \
           $(if $(SEED),--seed $(SEED))
TUNE    := $(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(SIZE),--size $(SIZE))
NETWORKS := $(RUNS)/$(ARCH)/best.pt $(RUNS)/cnn/best.pt

.PHONY: help demo data train-cnn finetune figure score test test-long bench lint clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | awk -F'\t' '{printf "  make %-12s%s\n", $$1, $$2}'
	@sed -nE 's/^#   (.*)/  \1/p' $(MAKEFILE_LIST)

# The drawn photos are no ImageNet photos, and there is no network to get weights from: here the ResNet learns from scratch.
DEMO    := --data data/demo --runs $(RUNS)/demo $(if $(DEVICE),--device $(DEVICE))
DEMOED  := $(RUNS)/demo/resnet18/best.pt $(RUNS)/demo/cnn/best.pt
demo: $(ENV)  ## everything, offline, on photos that are drawn here: two networks, the figure, the scores
	$(PYTHON) tests/demo.py data/demo
	$(PYTHON) train.py cnn $(DEMO) --epochs 10
	$(PYTHON) train.py resnet18 $(DEMO) --epochs 7 --weights none --unfreeze --lr 0.01 --batch-size 32 --crop 96 --size 128
	$(PYTHON) cam.py figure --data data/demo --models $(DEMOED) --out $(FIGURES)/demo.png
	$(PYTHON) score.py $(DEMOED) --data data/demo --deletion 0 --out $(FIGURES)/demo-scores

data: $(ENV)  ## ImageNette-160: downloaded, or from DATA=; checked and decoded
	$(PYTHON) data.py $(DATA)

train-cnn: data  ## the CNN from scratch: 64 x 64 crops, 100 epochs, best kept
	$(PYTHON) train.py cnn $(TRAIN)

finetune: data  ## ARCH (resnet18), ImageNet weights, all frozen but the last layer, 5 epochs
	$(PYTHON) train.py $(ARCH) $(TRAIN) $(TUNE)

figure: $(RUNS)/$(ARCH)/result.json $(RUNS)/cnn/result.json  ## ten photos and the maps of both networks
	$(PYTHON) cam.py figure $(SOURCE) --models $(NETWORKS) --out $(FIGURES)/figure.png

score: $(RUNS)/$(ARCH)/result.json $(RUNS)/cnn/result.json  ## accuracy, faithfulness, localisation, as one table
	$(PYTHON) score.py $(NETWORKS) $(SOURCE) $(if $(BOXES),--boxes $(BOXES)) --out $(FIGURES)/scores

# result.json is the last file that a training writes: where it is missing, train, or go on training.
$(RUNS)/cnn/result.json:
	@$(MAKE) --no-print-directory train-cnn

$(RUNS)/$(ARCH)/result.json:
	@$(MAKE) --no-print-directory finetune

test: $(DEV)  ## the tests, offline, a few minutes
	$(PYTHON) -m pytest

test-long: $(DEV)  ## longer proofs, some minutes more
	$(PYTHON) -m pytest -m long

bench: data .peers  ## speed and memory against the usual way, side by side, a quarter of an hour
	$(PYTHON) tests/bench.py $(SOURCE) $(if $(DEVICE),--device $(DEVICE)) --peers .peers

lint: $(DEV)  ## ruff
	$(PYTHON) -m ruff check .

clean:  ## remove results (runs, figures), not the data
	rm -rf $(RUNS) $(FIGURES)

.venv/.runs: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/.tests: requirements-dev.txt .venv/.runs
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# What the benchmark alone needs. Without its dependencies first: torch is here already, in the version that is measured.
.peers: | $(ENV)
	rm -rf .peers.part
	$(PYTHON) -m pip install --quiet --target .peers.part --no-deps torchcam==0.5.0 grad-cam==1.5.7 ttach==0.0.3
	$(PYTHON) -m pip install --quiet --target .peers.part --upgrade opencv-python-headless matplotlib scikit-learn tqdm
	mv .peers.part .peers
