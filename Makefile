# make demo                                     teachers, Sup, MGD, table and panels on the embedded data set
# make teachers                                 both teachers of DATASET and PART
# make distill PART=1/8 STUDENT=mbv2            the student; trains the teachers first where they are missing
# make compare                                  Sup at two schedules, MGD and the teachers side by side
# make test · make lint · make clean
#
# Every target sets up $(VENV) where it is missing (VENV= uses $(PYTHON) as it is). Runs go to runs/DATASET/PART/; a run
# that was interrupted goes on where it stopped, and a run that has its last.pt is not made again: remove it to repeat it.

DATASET ?= shapes
DATA ?=
PART ?= 1/8
STUDENT ?= r18
SEED ?= 0
# Backbones of the teachers; empty takes the data set's recipe.
DEEP ?=
WIDE ?=
# Passed on: to every training, to the teachers' alone, to distill.py alone.
ARGS ?=
TEACHER_ARGS ?=
STUDENT_ARGS ?=
VENV ?= .venv
PYTHON ?= python3

NAME := $(if $(DATA),$(notdir $(patsubst %/,%,$(DATA))),$(DATASET))
RUN := runs/$(NAME)/$(subst /,-,$(PART))
S := $(if $(filter-out 0,$(SEED)),-s$(SEED))
T_D := $(RUN)/teacher-deep$(S)/last.pt
T_W := $(RUN)/teacher-wide$(S)/last.pt
SUP := $(RUN)/sup-$(STUDENT)$(S)/last.pt
SUP_LONG := $(RUN)/sup-long-$(STUDENT)$(S)/last.pt
MGD := $(RUN)/mgd-$(STUDENT)$(S)/last.pt
COMMON = --dataset $(DATASET) $(if $(DATA),--data $(DATA)) --part $(PART) --seed $(SEED) --resume $(ARGS)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

.PHONY: demo compare teachers distill sup test lint clean

demo:
	@$(MAKE) --no-print-directory compare DATASET=shapes DATA= PART=1/32

compare: $(SUP) $(SUP_LONG) $(T_D) $(T_W) $(MGD)
	$(PY) evaluate.py --ckpt $(SUP) --compare $(SUP_LONG) $(MGD) $(T_D) $(T_W) \
	    --json $(RUN)/compare-$(STUDENT)$(S).json --panels $(RUN)/compare-$(STUDENT)$(S).png

teachers: $(T_D) $(T_W)

distill: $(MGD)

sup: $(SUP)

$(T_D): | $(INSTALLED)
	$(PY) train_teacher.py --out $(@D) --role teacher_deep $(if $(DEEP),--backbone $(DEEP)) $(COMMON) $(TEACHER_ARGS)

$(T_W): | $(INSTALLED)
	$(PY) train_teacher.py --out $(@D) --role teacher_wide $(if $(WIDE),--backbone $(WIDE)) $(COMMON) $(TEACHER_ARGS)

$(SUP): | $(INSTALLED)
	$(PY) train_teacher.py --out $(@D) --method sup --backbone $(STUDENT) $(COMMON)

$(SUP_LONG): | $(INSTALLED)
	$(PY) train_teacher.py --out $(@D) --method sup --backbone $(STUDENT) --schedule 3 $(COMMON)

$(MGD): $(T_D) $(T_W) | $(INSTALLED)
	$(PY) distill.py --out $(@D) --student $(STUDENT) --deep $(T_D) --wide $(T_W) $(COMMON) $(STUDENT_ARGS)

test: | $(INSTALLED)
	$(PY) -m pytest -q tests

lint: | $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf runs

$(VENV)/.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@
