# `make help` lists the targets and the variables.
#
# Runs go to runs/DATASET/PART/. An interrupted run continues where it stopped; a finished run (last.pt) is never retrained.
# Every target sets up $(VENV) where it is missing. Variables of the environment are not read.

DATASET = shapes##	shapes (embedded), folder (your own data), voc, voc-few or cityscapes
DATA =##	folder of the data set
PART = 1/8##	fraction of the training images that is labeled: 1/K, or 1 for all that have a mask
RECIPE = paper##	light: networks, crops and steps for a small GPU or a patient CPU
STUDENT = r18##	backbone of the students: r18, mbv2, el0 (that of RECIPE=light), r34, r50, r101, wr34, el1, el2
METHOD = mgd##	of distill and compare: mgd, or mgd+ (docs/paper.md)
SEEDS = 0##	every run is made once per seed, as SEEDS="0 1 2"
DEEP =##	backbone of the deep teacher (by DATASET and RECIPE)
WIDE =##	backbone of the wide teacher (by DATASET and RECIPE)
DEEP_CKPT =##	a checkpoint to use as the deep teacher
WIDE_CKPT =##	a checkpoint to use as the wide teacher
TEACHER_PART = $(PART)##	partition of the teachers, as 1 for all labels
TEACHER_SEED =##	teachers of one seed for the students of all SEEDS
RUN =##	another folder for the students, as runs/mine/short
REPORT =##	what compare and matrix write, without .json and .png (in RUN)
TABLES = 1##	of matrix: tables 1 2 3 4 5 5a 5b 6 of the paper, or heads
DRY =##	DRY=1: matrix prints its plan and the time it takes
CKPT =##	of web: a checkpoint (the student of make distill)
NPROC = 1##	processes (GPUs) per training
ARGS =##	flags for every training, as ARGS="--lr 0.02 --steps 500"
TEACHER_ARGS =##	flags for the teachers
STUDENT_ARGS =##	flags for the students; for those of one method:
MGD_ARGS =##
MT_ARGS =##
CPS_ARGS =##
KD_ARGS =##
CWD_ARGS =##
VENV = .venv##	virtual environment; VENV= uses PYTHON as it is
PYTHON = python3##	the interpreter
EXTRAS = voc,export,tensorboard,web,test,lint##	optional dependencies to install; imagenet has weights of el0, el1, el2

# ---- guards: what the scripts, which check all else, would notice too late ----
NAMES := DATASET DATA PART RECIPE STUDENT DEEP WIDE DEEP_CKPT WIDE_CKPT TEACHER_PART TEACHER_SEED RUN NPROC
FLAGS := ARGS TEACHER_ARGS STUDENT_ARGS MT_ARGS CPS_ARGS KD_ARGS CWD_ARGS MGD_ARGS
KNOWN := $(NAMES) METHOD CKPT REPORT DRY VENV PYTHON EXTRAS $(FLAGS) SEEDS TABLES
GIVEN := $(foreach v,$(.VARIABLES),$(if $(findstring command,$(origin $(v))),$(v)))
$(if $(filter-out $(KNOWN),$(GIVEN)),$(error $(filter-out $(KNOWN),$(GIVEN)): no such variable; there are $(KNOWN)))

META := ; & | < > ( ) { } [ ] * ? ! ~ ^ ' " ` % \ \# $$
refuse = $(error $(1)=$(value $(1)): $(2))
$(foreach v,$(GIVEN),$(foreach c,$(META),$(if $(findstring $(c),$(value $(v))),$(call refuse,$(v),leave $(c) out))))
$(foreach v,$(GIVEN),$(eval override $(v) := $(strip $(value $(v)))))
$(foreach v,$(NAMES) CKPT REPORT VENV PYTHON EXTRAS,$(if $(word 2,$($(v))),$(call refuse,$(v),leave the spaces out)))
$(foreach v,DATASET PART RECIPE STUDENT METHOD SEEDS TEACHER_PART NPROC,\
    $(if $($(v)),,$(call refuse,$(v),is empty; leave it out)))
# $(call match,VARIABLES,REGEX,FIX) refuses words that do not match.
match = $(foreach v,$(filter $(1),$(GIVEN)),$(foreach w,$($(v)),\
    $(if $(shell echo $(w) | grep -xE '$(2)'),,$(call refuse,$(v),$(3)))))
$(call match,DATASET,shapes|folder|voc|voc-few|cityscapes,your own data: DATASET=folder DATA=data/$(DATASET))
$(call match,RECIPE,paper|light,give paper or light)
$(call match,PART TEACHER_PART,1(/[1-9][0-9]*)?,give 1/K with a whole number K such as 1/8; or 1 for all)
$(call match,SEEDS TEACHER_SEED,0|[1-9][0-9]*,give whole numbers; several with spaces: SEEDS="0 1 2")
$(call match,STUDENT DEEP WIDE,r18|r34|r50|r101|wr34|mbv2|el[012],give r18 r34 r50 r101 wr34 (wide_resnet34) mbv2 el0 el1 or el2)
$(call match,METHOD,mgd[+]?,give mgd or mgd+)
$(call match,NPROC,[1-9][0-9]*,give the number of processes such as 4)
$(if $(filter /,$(RUN)),$(call refuse,RUN,give a folder such as runs/mine/short))
$(foreach v,DEEP_CKPT WIDE_CKPT,$(if $(filter-out $(wildcard $($(v))),$($(v))),$(call refuse,$(v),no such file)))

ifeq ($(RECIPE)$(filter STUDENT,$(GIVEN)),light)
STUDENT := el0
endif

# ---- runs: their checkpoints, once per seed; in a rule, % is / for seed 0 and -s1/ for seed 1 ----
NAME := $(if $(filter folder,$(DATASET)),$(or $(notdir $(abspath $(DATA))),$(call refuse,DATA,give its folder)),$(DATASET))
# The name comes from the current folder where DATA is . or .., and no guard above has seen it.
$(foreach c,$(META) :,$(if $(findstring $(c),$(NAME)),$(call refuse,DATA,leads to a folder with $(c) in its name; rename it)))
$(if $(word 2,$(NAME)),$(call refuse,DATA,leads to a folder with a space in its name; rename it))
TEACHERS := runs/$(NAME)/$(subst /,-,$(TEACHER_PART))
STUDENTS := $(or $(RUN:%/=%),runs/$(NAME)/$(subst /,-,$(PART)))
# Students of teachers other than those of their labels and seed say so in their folder's name.
named = $(addprefix -$(1)-,$(patsubst runs/%,%,$(patsubst %/last.pt,%,$(2))))
OF := $(call named,of,$(filter-out $(PART),$(TEACHER_PART)))$(addprefix -t,$(TEACHER_SEED))
OF := $(subst /,-,$(OF)$(call named,deep,$(DEEP_CKPT))$(call named,wide,$(WIDE_CKPT)))

tags = $(foreach s,$(1),$(if $(filter-out 0,$(s)),-s$(s))/)
TAGS := $(call tags,$(SEEDS))
T_TAGS := $(or $(call tags,$(TEACHER_SEED)),$(TAGS))
T_D := $(T_TAGS:%=$(TEACHERS)/teacher-deep%last.pt)
T_W := $(T_TAGS:%=$(TEACHERS)/teacher-wide%last.pt)
BOTH := $(or $(DEEP_CKPT),$(T_D)) $(or $(WIDE_CKPT),$(T_W))
SUP := $(TAGS:%=$(STUDENTS)/sup-$(STUDENT)%last.pt)
SUP_X3 := $(TAGS:%=$(STUDENTS)/sup-x3-$(STUDENT)%last.pt)
MGD_NAME := $(subst +,-plus,$(METHOD))-$(STUDENT)$(OF)
MGD := $(TAGS:%=$(STUDENTS)/$(MGD_NAME)%last.pt)
.PRECIOUS: $(T_D) $(T_W) $(SUP) $(SUP_X3) $(MGD)

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
INSTALLED := $(if $(VENV),$(VENV)/.installed-$(EXTRAS))
# One thread per process, and a file of tests to each: twice as many threads as cores would be many times slower.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile
SIGNALS := SIGHUP,SIGTERM,SIGINT,SIGUSR1
LAUNCH := $(PY)$(if $(filter-out 1,$(NPROC)), -m torch.distributed.run --standalone --nproc-per-node $(NPROC) \
    --signals-to-handle $(SIGNALS))
# $(call train,SCRIPT,PARTITION); $(call teacher,deep) is the teacher of the same seed as the student, or of TEACHER_SEED.
train = $(LAUNCH) $(1) --out $(@D) --seed $(or $(patsubst -s%/,%,$(filter-out /,$*)),0) \
    --dataset $(DATASET) $(addprefix --data ,$(DATA)) --part $(2) $(addprefix --recipe ,$(filter-out paper,$(RECIPE))) --resume
teacher = $(TEACHERS)/teacher-$(1)$(or $(call tags,$(TEACHER_SEED)),$*)last.pt

$(T_D): $(TEACHERS)/teacher-deep%last.pt: | $(INSTALLED)
	$(call train,train_teacher.py,$(TEACHER_PART)) --role teacher_deep $(addprefix --backbone ,$(DEEP)) $(ARGS) $(TEACHER_ARGS)
$(T_W): $(TEACHERS)/teacher-wide%last.pt: | $(INSTALLED)
	$(call train,train_teacher.py,$(TEACHER_PART)) --role teacher_wide $(addprefix --backbone ,$(WIDE)) $(ARGS) $(TEACHER_ARGS)
$(SUP): $(STUDENTS)/sup-$(STUDENT)%last.pt: | $(INSTALLED)
	$(call train,train_teacher.py,$(PART)) --backbone $(STUDENT) $(ARGS) $(STUDENT_ARGS) --method sup
$(SUP_X3): $(STUDENTS)/sup-x3-$(STUDENT)%last.pt: | $(INSTALLED)
	$(call train,train_teacher.py,$(PART)) --backbone $(STUDENT) $(ARGS) $(STUDENT_ARGS) --method sup --steps-factor 3
$(MGD): $(STUDENTS)/$(MGD_NAME)%last.pt: | $(BOTH) $(INSTALLED)
	$(call train,distill.py,$(PART)) --student $(STUDENT) --deep $(or $(DEEP_CKPT),$(call teacher,deep)) \
	    --wide $(or $(WIDE_CKPT),$(call teacher,wide)) $(ARGS) $(STUDENT_ARGS) \
	    $(if $(filter-out mgd,$(METHOD)),--method $(METHOD)) $(MGD_ARGS)

# ---- targets ----
.PHONY: help demo teachers distill sup compare matrix tables web install test test-fast lint ext bench soak clean
.DEFAULT_GOAL := help
COMPARED := $(or $(REPORT),$(STUDENTS)/compare-$(STUDENT)$(if $(filter-out mgd,$(METHOD)),-mgd-plus))
finished = @$(foreach f,$(wildcard $^),echo "$(f): finished, never retrained; delete it to repeat the run$(1)";)
# --teacher-args='...' for TEACHER_ARGS, and so on.
options = $(foreach v,$(NAMES) $(FLAGS),$(if $($(v)),--$(shell echo $(v) | tr A-Z_ a-z-)='$($(v))'))

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; echo "Variables and their defaults:"
	@awk -F ' = ?|##\t?' '/^[A-Z_]+ =.*##/ {printf "%-24s  %s\n", $$1 "=" $$2, $$3}' $(MAKEFILE_LIST)
demo: ## teachers, Sup and MGD on the embedded data set; table and picture (10 minutes on two cores)
	@$(MAKE) --no-print-directory compare DATASET=shapes DATA= PART=1/32
teachers: $(BOTH) ## both teachers
	$(finished)
distill: $(MGD) ## the student (METHOD); trains missing teachers first
	$(call finished, or set RUN=DIR)
sup: $(SUP) ## the same network on the labeled images alone
	$(call finished, or set RUN=DIR)
compare: $(SUP) $(SUP_X3) $(MGD) $(BOTH) ## Sup at two lengths, METHOD and the teachers: a table and a picture
	$(LAUNCH) evaluate.py --ckpt $^ --json $(COMPARED).json --panels $(COMPARED).png
matrix: | $(INSTALLED) ## all runs of the paper's TABLES, then one result file
	$(PY) -m paper.matrix --tables $(TABLES) --seeds $(SEEDS) $(options) \
	    $(if $(REPORT),--json $(REPORT).json) $(if $(DRY),--dry-run)
tables: | $(INSTALLED) ## results/*.json as the paper's tables and figures, in results/tables
	$(PY) -m paper.report $(filter-out %-imagenet.json,$(wildcard results/*.json)) --out results/tables
	$(PY) -m paper.report results/camvid-imagenet.json --out results/tables/imagenet
web: | $(if $(CKPT),,$(firstword $(MGD))) $(INSTALLED) ## a page in the browser for a checkpoint, beside it in web/
	$(PY) -m web.build --ckpt $(or $(CKPT),$(firstword $(MGD)))
install: | $(INSTALLED) ## set up VENV
test: | $(INSTALLED) ## all tests
	$(PYTEST) tests
test-fast: | $(INSTALLED) ## the tests that take less than a minute together
	MGD_OPS=torch $(PYTEST) -m "not slow" tests
lint: | $(INSTALLED) ## ruff and a type checker
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyrefly check --python-interpreter-path "$$(command -v $(PY))"
ext: | $(INSTALLED) ## build the native kernels ahead, and say what was built
	$(PY) kernels.py
bench: | $(INSTALLED) ## all benchmarks, into results/
	for file in benchmarks/bench_*.py; do $(PY) $$file || exit; done
soak: | $(INSTALLED) ## kill, break and watch trainings, and feed them damaged files, into results/
	$(PY) -m soak
clean: ## remove caches; runs/ and data/ stay
	rm -rf .pytest_cache .ruff_cache __pycache__ */__pycache__

ifneq ($(VENV),)
$(INSTALLED): pyproject.toml constraints.txt # installed from a copy, for pip leaves build/ and *.egg-info beside what it builds
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(VENV)/project && cp pyproject.toml README.md $(VENV)/project
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt '$(VENV)/project$(if $(EXTRAS),[$(EXTRAS)])'
	touch $@
endif
