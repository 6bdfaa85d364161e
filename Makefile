# Where did the network look?  `make` lists what there is.
#   Variables: DATA= (an archive or a folder)  ARCH= EPOCHS= DEVICE= SEED= RUNS= FIGURES= BOXES=
#   of finetune: WEIGHTS= SIZE= LOOKS=   of bench-accuracy: RUN= (a training that has ended)
#   PYTHON=python uses an environment that is there already instead of making .venv

override ARCH := $(or $(strip $(ARCH)),resnet18)
$(if $(word 2,$(ARCH)),$(error ARCH= names one network beside the cnn, not "$(ARCH)"))

# A shell that leaves ~ in NAME=~/folder as it is (zsh, dash) would have it made here, as a folder
# called ~.
home = $(if $(filter ~/%,$(firstword $(1))),$(subst ~/,$(HOME)/,$(1)),$(1))
override RUNS := $(or $(call home,$(RUNS)),runs)
override FIGURES := $(or $(call home,$(FIGURES)),figures)
override WEIGHTS := $(call home,$(WEIGHTS))

ifdef PYTHON
override PYTHON := $(call home,$(PYTHON))
ENV := python
DEV := python-dev
else
override PYTHON := .venv/bin/python
ENV := .venv/.runs
DEV := .venv/.tests
endif

# Every value of a user's stands in quotes: names may hold spaces, and `rm` must never see two names
# where one was meant. A prerequisite cannot hold a space, so whether a training has ended is asked
# in the recipe (`trained`), not by a rule.
SOURCE  := $(if $(DATA),--data "$(DATA)")
ON      := $(if $(DEVICE),--device "$(DEVICE)")
TRAIN   := $(SOURCE) --runs "$(RUNS)" $(if $(EPOCHS),--epochs "$(EPOCHS)") $(ON) \
           $(if $(SEED),--seed "$(SEED)")
TUNE    := $(if $(WEIGHTS),--weights "$(WEIGHTS)") $(if $(SIZE),--size "$(SIZE)") \
           $(if $(LOOKS),--looks "$(LOOKS)")
NETWORKS := $(if $(filter cnn,$(ARCH)),,"$(RUNS)/$(ARCH)/best.pt") "$(RUNS)/cnn/best.pt"
# result.json is the last file that a training writes: where it is missing, train, or go on. Where
# settings are given, of both or of this one alone (the third argument), train.py is asked: it
# refuses others than those of the run that is there, and does nothing if they are the same.
trained = $(if $(EPOCHS)$(SEED)$(3),false,[ -e "$(RUNS)/$(1)/result.json" ]) || \
          $(MAKE) --no-print-directory $(2)

.PHONY: help demo shortcut data train-cnn finetune networks figure score test test-long bench \
        bench-accuracy results lint clean clean-runs python python-dev
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@sed -nE 's/^#   (.*)/  \1/p' $(MAKEFILE_LIST)

# The drawn photos are no ImageNet photos, and there is no network to get weights from: here the
# ResNet learns from scratch.
DEMO    := --data data/demo $(ON)
DEMORUN := $(DEMO) --runs "$(RUNS)/demo" $(if $(SEED),--seed "$(SEED)")
DEMOED  := "$(RUNS)/demo/resnet18/best.pt" "$(RUNS)/demo/cnn/best.pt"
demo: $(ENV)  ## everything, offline, on photos drawn here: two networks, the figure, the scores
	"$(PYTHON)" tests/demo.py data/demo
	"$(PYTHON)" train.py cnn $(DEMORUN) --epochs 6
	"$(PYTHON)" train.py resnet18 $(DEMORUN) --epochs 9 --weights none --unfreeze --lr 0.01 \
	    --batch-size 32 --crop 96 --size 128 --looks 128,192
	"$(PYTHON)" score.py $(DEMOED) $(DEMO) --out "$(FIGURES)/demo-scores" > /dev/null
	"$(PYTHON)" cam.py figure $(DEMO) --models $(DEMOED) --out "$(FIGURES)/demo.png" > /dev/null
	@"$(PYTHON)" tests/reading.py "$(FIGURES)/demo-scores.csv" "$(FIGURES)/demo.png"

shortcut: $(ENV)  ## a mark planted in photos, networks that learn it: do their maps show it? offline, or DATA=
	"$(PYTHON)" shortcut.py $(SOURCE) $(ON) $(if $(EPOCHS),--epochs "$(EPOCHS)") \
	    $(if $(SEED),--seed "$(SEED)") --out "$(FIGURES)/shortcut"

data: $(ENV)  ## ImageNette-160: downloaded, or from DATA=; checked and decoded
	"$(PYTHON)" data.py $(if $(DATA),"$(DATA)")

train-cnn: data  ## the CNN from scratch: 64 x 64 crops, 100 epochs, best kept
	"$(PYTHON)" train.py cnn $(TRAIN)

finetune: data  ## ARCH (resnet18), ImageNet weights, all frozen but the last layer, 5 epochs
	"$(PYTHON)" train.py "$(ARCH)" $(TRAIN) $(TUNE)

# +: make does not see by itself that these lines call it, and would warn under -j and leave them
# out under -n.
networks: data
	+@$(if $(filter cnn,$(ARCH)),,$(call trained,$(ARCH),finetune,$(WEIGHTS)$(SIZE)$(LOOKS)))
	+@$(call trained,cnn,train-cnn)

figure: networks  ## ten photos and the maps of both networks
	"$(PYTHON)" cam.py figure $(SOURCE) $(ON) --models $(NETWORKS) --out "$(FIGURES)/figure.png"

score: networks  ## accuracy, faithfulness, localisation, as tables
	"$(PYTHON)" score.py $(NETWORKS) $(SOURCE) $(ON) $(if $(BOXES),--boxes "$(BOXES)") \
	    --out "$(FIGURES)/scores"

# One process for each core, up to 8, as each takes memory for torch; one that is done takes tests
# of the others.
PYTEST  := "$(PYTHON)" -m pytest -n auto --maxprocesses 8 --dist worksteal
test: $(DEV)  ## the tests, offline, a few minutes
	$(PYTEST)

test-long: $(DEV)  ## longer proofs, some minutes more
	$(PYTEST) -m long

bench: data .peers  ## speed and memory against the usual way, side by side, an hour or two
	"$(PYTHON)" tests/bench.py $(SOURCE) $(ON) --peers .peers --out "$(FIGURES)/bench.json"

bench-accuracy: data  ## seconds until 85 % of val, against the usual ways, hours without a GPU
	"$(PYTHON)" tests/bench_accuracy.py $(SOURCE) $(ON) $(if $(RUN),--run "$(RUN)") \
	    --out "$(FIGURES)/bench-accuracy.json"

results: $(ENV)  ## RESULTS.md from what trainings, scores and benchmarks left, kept in results/
	"$(PYTHON)" tests/results.py --runs "$(RUNS)" --figures "$(FIGURES)"

lint: $(DEV)  ## ruff
	"$(PYTHON)" -m ruff check .

clean:  ## remove figures/; a FIGURES= of your own, trainings and data stay
	rm -rf -- figures

clean-runs:  ## remove the trainings in RUNS, hours of work perhaps
	rm -rf -- "$(RUNS)"

# What a newcomer may lack ends in one sentence: a Python, its venv module, network, packages.
INSTALL := "$(PYTHON)" -m pip install --quiet
FAILED  := { echo "make: pip could not install the packages: with a network (behind a proxy:" \
           "HTTPS_PROXY=) and 6 GB of free disk the same command goes on; where pip wants a" \
           "compiler, there are no packages ready for this Python: take another, or one that has" \
           "them, with PYTHON=" >&2; exit 2; }

.venv/.runs: requirements.txt
	@found=; for python in python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	        found=$$python; break; fi; \
	done; \
	[ "$$found" ] || { echo "make: this needs Python 3.11 or newer: install it, or name one that" \
	    "has the packages of $< with PYTHON=" >&2; exit 2; }; \
	$$found -m venv .venv || { rm -rf .venv; echo "make: $$found cannot make an environment (on" \
	    "Debian and Ubuntu: apt install python3-venv), or name one that is there with PYTHON=" >&2; \
	    exit 2; }
	@$(INSTALL) -r $< || $(FAILED)
	@touch $@

.venv/.tests: requirements-dev.txt .venv/.runs
	@$(INSTALL) -r $< || $(FAILED)
	@touch $@

PACKAGES = torch torchvision PIL numpy
python-dev: PACKAGES += pytest xdist hypothesis ruff
python python-dev:
	@"$(PYTHON)" -c 'import sys, importlib.util as util; \
	    sys.exit(sys.version_info < (3, 11) or None in map(util.find_spec, sys.argv[1:]))' \
	    $(PACKAGES) 2> /dev/null || \
	    { echo "make: PYTHON=$(PYTHON) is no Python 3.11 or newer that has $(PACKAGES): install" \
	    "$(subst python,requirements,$@).txt there, or leave PYTHON= out" >&2; exit 2; }

# What the benchmark alone needs. Without its dependencies first: torch is here already, in the
# version that is measured.
.peers: | $(ENV)
	rm -rf .peers.part
	@$(INSTALL) --target .peers.part --no-deps torchcam==0.5.0 grad-cam==1.5.7 ttach==0.0.3 \
	    || $(FAILED)
	@$(INSTALL) --target .peers.part --upgrade opencv-python-headless matplotlib scikit-learn tqdm \
	    || $(FAILED)
	mv .peers.part .peers
