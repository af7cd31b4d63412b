# make demo                                     teachers, Sup, MGD, table and panels on the embedded data set
# make teachers                                 both teachers of DATASET and PART
# make distill PART=1/8 STUDENT=mbv2            the student; trains the teachers first where they are missing
# make compare                                  Sup at two schedules, MGD and the teachers side by side
# make install · make test · make lint · make ext · make bench · make clean
#
# Every target sets up $(VENV) where it is missing (VENV= uses $(PYTHON) as it is). Runs go to runs/DATASET/PART/; a run
# that was interrupted goes on where it stopped, and a run that has its last.pt is not made again: remove it to repeat it.

DATASET ?= shapes
DATA ?=
PART ?= 1/8
STUDENT ?= r18
# Every run is made once for each of these.
SEEDS ?= 0
# Backbones of the teachers; empty takes the data set's recipe.
DEEP ?=
WIDE ?=
# Processes that share each training's batch, one a GPU; more than one run under torchrun.
NPROC ?= 1
# Passed on: to every training, to the teachers' alone, to distill.py alone.
ARGS ?=
TEACHER_ARGS ?=
STUDENT_ARGS ?=
VENV ?= .venv
PYTHON ?= python3
# Where `make compare` writes: $(REPORT).json and $(REPORT).png.
REPORT ?= $(RUN)/compare-$(STUDENT)

ifeq ($(filter $(STUDENT),r18 r34 r50 r101 wr34 mbv2 resnet18 resnet34 resnet50 resnet101 wide_resnet34 mobilenetv2),)
$(error STUDENT=$(STUDENT): unknown backbone; take r18 or mbv2)
endif

RUN := runs/$(if $(filter folder,$(DATASET)),$(notdir $(patsubst %/,%,$(DATA))),$(DATASET))/$(subst /,-,$(PART))
# $(call checkpoints,NAME): the last.pt of the runs called NAME, one a seed.
seed_tag = $(if $(filter-out 0,$(1)),-s$(1))
checkpoints = $(foreach seed,$(SEEDS),$(RUN)/$(1)$(call seed_tag,$(seed))/last.pt)
T_D := $(call checkpoints,teacher-deep)
T_W := $(call checkpoints,teacher-wide)
SUP := $(call checkpoints,sup-$(STUDENT))
SUP_LONG := $(call checkpoints,sup-long-$(STUDENT))
MGD := $(call checkpoints,mgd-$(STUDENT))
COMMON = --dataset $(DATASET) $(if $(DATA),--data $(DATA)) --part $(PART) --resume $(ARGS)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

RUN_SCRIPT = $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC))

# A last.pt is whole from the moment it is there; make must not remove it when it is interrupted.
.PRECIOUS: runs/%/last.pt
.PHONY: install demo compare teachers distill sup test lint ext bench clean

install: | $(INSTALLED)

demo:
	@$(MAKE) --no-print-directory compare DATASET=shapes DATA= PART=1/32

compare: $(SUP) $(SUP_LONG) $(T_D) $(T_W) $(MGD)
	$(RUN_SCRIPT) evaluate.py --ckpt $(firstword $(SUP)) --compare $(wordlist 2,99,$(SUP)) $(SUP_LONG) $(MGD) $(T_D) $(T_W) \
	    --json $(REPORT).json --panels $(REPORT).png

teachers: $(T_D) $(T_W)

distill: $(MGD)

sup: $(SUP)

# The runs of one seed; $(1) is the seed, $(2) the suffix of its folders.
define RUNS
$(RUN)/teacher-deep$(2)/last.pt: | $(INSTALLED)
	$$(RUN_SCRIPT) train_teacher.py --out $$(@D) --role teacher_deep $(if $(DEEP),--backbone $(DEEP)) --seed $(1) $$(COMMON) $$(TEACHER_ARGS)

$(RUN)/teacher-wide$(2)/last.pt: | $(INSTALLED)
	$$(RUN_SCRIPT) train_teacher.py --out $$(@D) --role teacher_wide $(if $(WIDE),--backbone $(WIDE)) --seed $(1) $$(COMMON) $$(TEACHER_ARGS)

$(RUN)/sup-$(STUDENT)$(2)/last.pt: | $(INSTALLED)
	$$(RUN_SCRIPT) train_teacher.py --out $$(@D) --method sup --backbone $(STUDENT) --seed $(1) $$(COMMON)

$(RUN)/sup-long-$(STUDENT)$(2)/last.pt: | $(INSTALLED)
	$$(RUN_SCRIPT) train_teacher.py --out $$(@D) --method sup --backbone $(STUDENT) --schedule 3 --seed $(1) $$(COMMON)

$(RUN)/mgd-$(STUDENT)$(2)/last.pt: $(RUN)/teacher-deep$(2)/last.pt $(RUN)/teacher-wide$(2)/last.pt | $(INSTALLED)
	$$(RUN_SCRIPT) distill.py --out $$(@D) --student $(STUDENT) --deep $$(word 1,$$^) --wide $$(word 2,$$^) --seed $(1) $$(COMMON) $$(STUDENT_ARGS)
endef
$(foreach seed,$(SEEDS),$(eval $(call RUNS,$(seed),$(call seed_tag,$(seed)))))

test: | $(INSTALLED)
	$(PY) -m pytest -q tests

lint: | $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

ext: | $(INSTALLED)
	$(PY) mgd_ops.py

bench: | $(INSTALLED)
	$(PY) benchmarks/bench_region_loss.py
	$(PY) benchmarks/bench_upsample_loss.py
	$(PY) benchmarks/bench_loading.py
	$(PY) benchmarks/bench_step.py

clean:
	rm -rf runs

$(VENV)/.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@
