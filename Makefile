# Where did the network look?  `make` lists what there is.
#   Variables: DATA= (an archive or a folder)  ARCH= WEIGHTS= EPOCHS= SIZE= LOOKS= DEVICE= SEED= RUNS= FIGURES= BOXES=
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

# Every value of a user's stands in quotes: names may hold spaces, and `rm` must never see two names where one was meant.
# A prerequisite cannot hold a space, so whether a training has ended is asked in the recipe (`trained`), not by a rule.
SOURCE  := $(if $(DATA),--data "$(DATA)")
TRAIN   := $(SOURCE) --runs "$(RUNS)" $(if $(EPOCHS),--epochs "$(EPOCHS)") $(if $(DEVICE),--device "$(DEVICE)") \
           $(if $(SEED),--seed "$(SEED)")
TUNE    := $(if $(WEIGHTS),--weights "$(WEIGHTS)") $(if $(SIZE),--size "$(SIZE)") $(if $(LOOKS),--looks "$(LOOKS)")
NETWORKS := $(if $(filter cnn,$(ARCH)),,"$(RUNS)/$(ARCH)/best.pt") "$(RUNS)/cnn/best.pt"
# result.json is the last file that a training writes: where it is missing, train, or go on training.
trained = [ -e "$(RUNS)/$(1)/result.json" ] || $(MAKE) --no-print-directory $(2)

.PHONY: help demo data train-cnn finetune networks figure score test test-long bench lint clean clean-runs
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | awk -F'\t' '{printf "  make %-12s%s\n", $$1, $$2}'
	@sed -nE 's/^#   (.*)/  \1/p' $(MAKEFILE_LIST)

# The drawn photos are no ImageNet photos, and there is no network to get weights from: here the ResNet learns from scratch.
DEMO    := --data data/demo --runs "$(RUNS)/demo" $(if $(DEVICE),--device "$(DEVICE)")
DEMOED  := "$(RUNS)/demo/resnet18/best.pt" "$(RUNS)/demo/cnn/best.pt"
demo: $(ENV)  ## everything, offline, on photos that are drawn here: two networks, the figure, the scores
	$(PYTHON) tests/demo.py data/demo
	$(PYTHON) train.py cnn $(DEMO) --epochs 10
	$(PYTHON) train.py resnet18 $(DEMO) --epochs 7 --weights none --unfreeze --lr 0.01 --batch-size 32 --crop 96 --size 128 --looks 128
	$(PYTHON) score.py $(DEMOED) --data data/demo --deletion 0 --out "$(FIGURES)/demo-scores"
	$(PYTHON) cam.py figure --data data/demo --models $(DEMOED) --out "$(FIGURES)/demo.png"

data: $(ENV)  ## ImageNette-160: downloaded, or from DATA=; checked and decoded
	$(PYTHON) data.py $(if $(DATA),"$(DATA)")

train-cnn: data  ## the CNN from scratch: 64 x 64 crops, 100 epochs, best kept
	$(PYTHON) train.py cnn $(TRAIN)

finetune: data  ## ARCH (resnet18), ImageNet weights, all frozen but the last layer, 5 epochs
	$(PYTHON) train.py "$(ARCH)" $(TRAIN) $(TUNE)

networks: data
	@$(if $(filter cnn,$(ARCH)),,$(call trained,$(ARCH),finetune))
	@$(call trained,cnn,train-cnn)

figure: networks  ## ten photos and the maps of both networks
	$(PYTHON) cam.py figure $(SOURCE) --models $(NETWORKS) --out "$(FIGURES)/figure.png"

score: networks  ## accuracy, faithfulness, localisation, as tables
	$(PYTHON) score.py $(NETWORKS) $(SOURCE) $(if $(BOXES),--boxes "$(BOXES)") --out "$(FIGURES)/scores"

test: $(DEV)  ## the tests, offline, a few minutes
	$(PYTHON) -m pytest

test-long: $(DEV)  ## longer proofs, some minutes more
	$(PYTHON) -m pytest -m long

bench: data .peers  ## speed and memory against the usual way, side by side, a quarter of an hour
	$(PYTHON) tests/bench.py $(SOURCE) $(if $(DEVICE),--device "$(DEVICE)") --peers .peers

lint: $(DEV)  ## ruff
	$(PYTHON) -m ruff check .

clean:  ## remove figures and tables; trainings and data stay
	rm -rf -- "$(FIGURES)"

clean-runs:  ## remove the trainings in RUNS, hours of work perhaps
	rm -rf -- "$(RUNS)"

.venv/.runs: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: this needs Python 3.11 or newer as python3, or PYTHON=path/to/one with the packages in it" >&2; exit 2; }
	@python3 -m venv .venv || { rm -rf .venv; echo "make: python3 cannot make an environment (on Debian and Ubuntu:" \
	    "apt install python3-venv), or name one that is there with PYTHON=" >&2; exit 2; }
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
