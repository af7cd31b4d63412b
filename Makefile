# `make help` lists the targets and the variables.
#
# Runs go to runs/DATASET/PART/. An interrupted run continues where it stopped; a finished run (last.pt) is never retrained.
# Every target sets up $(VENV) where it is missing. Variables of the environment are not read.

DATASET = shapes##	shapes (embedded), folder (your own data), voc, voc-few or cityscapes
DATA =##	folder of the data set
PART = 1/8##	fraction of the training images that is labeled: 1/K, or 1 for all that have a mask
STUDENT = r18##	backbone of the students: r18, mbv2, or r34, r50, r101, wr34
SEEDS = 0##	every run is made once per seed, as SEEDS="0 1 2"
DEEP =##	backbone of the deep teacher (by DATASET)
WIDE =##	backbone of the wide teacher (by DATASET)
DEEP_CKPT =##	a checkpoint to use as the deep teacher
WIDE_CKPT =##	a checkpoint to use as the wide teacher
TEACHER_PART =##	teachers of another partition, as 1 for all labels (PART)
TEACHER_SEED =##	teachers of one seed for the students of all SEEDS
RUN =##	another folder for the students, as runs/mine/short
REPORT =##	what compare and matrix write, without .json and .png (in RUN)
REPORT_FILES = $(wildcard results/*.json)##	what tables reads
TABLES = 1##	of matrix: tables 1 2 3 4 5 5a 5b 6 of the paper, or heads
DRY =##	DRY=1: matrix prints its plan and the time it takes
NPROC = 1##	processes (GPUs) per training
ARGS =##	flags for every training, as ARGS="--lr 0.02 --steps 500"
TEACHER_ARGS =##	flags for the teachers
STUDENT_ARGS =##	flags for the students; those of one method:
MT_ARGS =##
CPS_ARGS =##
KD_ARGS =##
CWD_ARGS =##
MGD_ARGS =##
VENV = .venv##	virtual environment; VENV= uses PYTHON as it is
PYTHON = python3##	the interpreter
EXTRAS = voc test lint##	optional dependencies to install

# ---- guards, for the targets that use a variable ----

FLAGS := ARGS TEACHER_ARGS STUDENT_ARGS MT_ARGS CPS_ARGS KD_ARGS CWD_ARGS MGD_ARGS
NAMES := DATASET DATA PART STUDENT DEEP WIDE DEEP_CKPT WIDE_CKPT TEACHER_PART TEACHER_SEED RUN REPORT DRY NPROC
KNOWN := $(NAMES) $(FLAGS) SEEDS TABLES REPORT_FILES VENV PYTHON EXTRAS
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(v)))),$(v)))
$(if $(filter-out $(KNOWN),$(GIVEN)),$(error $(filter-out $(KNOWN),$(GIVEN)): no such variable; there are $(KNOWN)))

GOALS := $(or $(MAKECMDGOALS),help)
INSTALLS := $(filter-out help clean,$(GOALS))
TRAINS := $(filter-out install tables test test-fast lint ext bench,$(INSTALLS))
USED := $(if $(INSTALLS),VENV PYTHON EXTRAS) $(if $(TRAINS),$(NAMES) $(FLAGS) SEEDS TABLES)
USED += $(if $(filter tables,$(GOALS)),REPORT_FILES)
refuse = $(error $(1)=$(value $(1)): $(2))
META := ; & | < > ( ) { } [ ] * ? ! ~ ^ ' " ` % \ \# $$
$(foreach v,$(filter $(USED),$(GIVEN)),\
    $(foreach c,$(META),$(if $(findstring $(c),$(value $(v))),$(call refuse,$(v),leave $(c) out)))\
    $(eval override $(v) := $(strip $(value $(v)))))
$(foreach v,$(filter $(USED),$(NAMES) VENV PYTHON),\
    $(if $(word 2,$($(v))),$(call refuse,$(v),leave the spaces out (a path: give a link to it))))
$(foreach v,$(filter $(USED),DATASET PART STUDENT SEEDS TABLES NPROC PYTHON),\
    $(if $(strip $($(v))),,$(call refuse,$(v),is empty; leave it out)))
# $(call each_is,VARIABLE,REGEX,FIX) refuses words that do not match.
each_is = $(if $(filter $(1),$(USED)),\
    $(foreach w,$($(1)),$(if $(shell echo '$(w)' | grep -xE '$(2)'),,$(call refuse,$(1),take $(3)))))
BACKBONE := r18 (resnet18) r34 r50 r101 wr34 (wide_resnet34) or mbv2 (mobilenetv2)
$(call each_is,DATASET,shapes|folder|voc|voc-few|cityscapes,\
    shapes voc voc-few or cityscapes; your own data: DATASET=folder DATA=data/$(DATASET))
$(foreach v,STUDENT DEEP WIDE,$(call each_is,$(v),r18|r34|r50|r101|wr34|mbv2,$(BACKBONE)))
$(foreach v,PART TEACHER_PART,$(call each_is,$(v),1(/[1-9][0-9]*)?,1/K with a whole number K such as 1/8; or 1 for all))
$(foreach v,SEEDS TEACHER_SEED,$(call each_is,$(v),0|[1-9][0-9]*,whole numbers; several with spaces: SEEDS="0 1 2"))
$(call each_is,NPROC,[1-9][0-9]*,the number of processes; such as 4)
$(call each_is,TABLES,[1-6]|5[ab]|heads,some of 1 2 3 4 5 5a 5b 6 heads)
$(call each_is,DRY,1,DRY=1; or leave it out)
$(call each_is,EXTRAS,voc|test|lint,some of voc test lint)
, := ,
PY = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
INSTALLED := $(if $(INSTALLS),$(if $(VENV),$(VENV)/.installed$(subst $() ,,$(addprefix -,$(sort $(EXTRAS))))))

ifneq ($(TRAINS),)
$(foreach v,DEEP_CKPT WIDE_CKPT,$(if $(filter-out $(wildcard $($(v))),$($(v))),$(call refuse,$(v),no such file)))
$(if $(filter shapes,$(DATASET)),$(if $(DATA),$(call refuse,DATA,shapes is embedded; give DATASET=folder too for your own)))
$(if $(filter shapes,$(DATASET))$(DATA),,$(call refuse,DATASET,give its folder too: DATA=data/mine))

# ---- runs ----

NAME := $(if $(filter folder,$(DATASET)),$(notdir $(abspath $(DATA))),$(DATASET))
$(if $(NAME),,$(call refuse,DATA,give the folder of the data set))
TEACHERS := runs/$(NAME)/$(subst /,-,$(or $(TEACHER_PART),$(PART)))
STUDENTS := $(or $(RUN),runs/$(NAME)/$(subst /,-,$(PART)))
# Students of teachers other than those of their labels and seed say so in their folder's name.
named = $(patsubst runs/%,%,$(patsubst %/last.pt,%,$(1)))
OF := $(addprefix -of-,$(filter-out $(PART),$(TEACHER_PART))) $(addprefix -t,$(TEACHER_SEED))
OF += $(addprefix -deep-,$(call named,$(DEEP_CKPT))) $(addprefix -wide-,$(call named,$(WIDE_CKPT)))
OF := $(subst $() ,,$(subst /,-,$(OF)))

# $(call each,FOLDER,SEEDS): the checkpoints of a run, one per seed; $(seed) is that of the present target.
each = $(foreach s,$(2),$(1)$(if $(filter-out 0,$(s)),-s$(s))/last.pt)
seed = $(or $(patsubst -s%/,%,$(filter-out /,$*)),0)
SUP := $(call each,$(STUDENTS)/sup-$(STUDENT),$(SEEDS))
SUP_LONG := $(call each,$(STUDENTS)/sup-x3-$(STUDENT),$(SEEDS))
MGD := $(call each,$(STUDENTS)/mgd-$(STUDENT)$(OF),$(SEEDS))
T_D := $(call each,$(TEACHERS)/teacher-deep,$(or $(TEACHER_SEED),$(SEEDS)))
T_W := $(call each,$(TEACHERS)/teacher-wide,$(or $(TEACHER_SEED),$(SEEDS)))
# The teachers of a student, where % stands for its seed.
DEEP_OF := $(or $(DEEP_CKPT),$(if $(TEACHER_SEED),$(T_D),$(TEACHERS)/teacher-deep%last.pt))
WIDE_OF := $(or $(WIDE_CKPT),$(if $(TEACHER_SEED),$(T_W),$(TEACHERS)/teacher-wide%last.pt))
BOTH := $(or $(DEEP_CKPT),$(T_D)) $(or $(WIDE_CKPT),$(T_W))
COMPARED := $(or $(REPORT),$(STUDENTS)/compare-$(STUDENT))
FOUND := $(wildcard $(SUP) $(MGD) $(BOTH))
finished = $(foreach f,$(filter $(FOUND),$(1)),echo "$(f): finished, never retrained; delete it to repeat the run$(2)";)

LAUNCH = $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC))
DATA_FLAGS = --dataset $(DATASET) $(if $(DATA),--data $(DATA))
teacher = $(LAUNCH) train_teacher.py --out $(@D) --role teacher_$(1) $(addprefix --backbone ,$(2)) --seed $(seed) \
    $(DATA_FLAGS) --part $(or $(TEACHER_PART),$(PART)) --resume $(ARGS) $(TEACHER_ARGS)
student = $(LAUNCH) $(1) --seed $(seed) $(DATA_FLAGS) --part $(PART) --resume $(ARGS) $(STUDENT_ARGS)
sup = $(call student,train_teacher.py --out $(@D) --backbone $(STUDENT)) --method sup
# --teacher-args='...' for TEACHER_ARGS, and so on.
options = $(foreach v,$(1),$(if $($(v)),--$(shell echo $(v) | tr A-Z_ a-z-)='$($(v))'))

.PRECIOUS: $(T_D) $(T_W) $(SUP) $(SUP_LONG) $(MGD)
$(T_D): $(TEACHERS)/teacher-deep%last.pt: | $(INSTALLED)
	$(call teacher,deep,$(DEEP))
$(T_W): $(TEACHERS)/teacher-wide%last.pt: | $(INSTALLED)
	$(call teacher,wide,$(WIDE))
$(SUP): $(STUDENTS)/sup-$(STUDENT)%last.pt: | $(INSTALLED)
	$(sup)
$(SUP_LONG): $(STUDENTS)/sup-x3-$(STUDENT)%last.pt: | $(INSTALLED)
	$(sup) --steps-factor 3
$(MGD): $(STUDENTS)/mgd-$(STUDENT)$(OF)%last.pt: | $(DEEP_OF) $(WIDE_OF) $(INSTALLED)
	$(call student,distill.py --out $(@D) --student $(STUDENT) --deep $(subst %,$*,$(DEEP_OF)) \
    --wide $(subst %,$*,$(WIDE_OF))) $(MGD_ARGS)
endif

# ---- targets ----

.PHONY: help demo teachers distill sup compare matrix tables install test test-fast lint ext bench clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo; echo "Variables and their defaults:"
	@awk -F ' = ?|##\t?' '/^[A-Z_]+ =.*##/ {printf "%-24s  %s\n", $$1 "=" $$2, $$3}' $(firstword $(MAKEFILE_LIST))
demo: ## teachers, Sup and MGD on the embedded data set; table and picture (10 minutes on two cores)
	@$(MAKE) --no-print-directory -f $(firstword $(MAKEFILE_LIST)) compare DATASET=shapes DATA= PART=1/32
teachers: $(BOTH) ## both teachers
	@$(call finished,$(BOTH))
distill: $(MGD) ## the student (MGD); trains missing teachers first
	@$(call finished,$(MGD), or set RUN=DIR)
sup: $(SUP) ## the same network on the labeled images alone
	@$(call finished,$(SUP), or set RUN=DIR)
compare: $(SUP) $(SUP_LONG) $(BOTH) $(MGD) ## Sup at two lengths, MGD and the teachers: a table and a picture
	$(LAUNCH) evaluate.py --ckpt $(SUP) $(SUP_LONG) $(MGD) $(BOTH) \
	    --json $(COMPARED).json --panels $(COMPARED).png
matrix: | $(INSTALLED) ## all runs of the paper's TABLES, then one result file
	$(PY) -m paper.matrix --tables $(TABLES) --seeds $(SEEDS) $(call options,$(filter-out REPORT DRY,$(NAMES)) $(FLAGS)) \
	    $(if $(REPORT),--json $(REPORT).json) $(if $(DRY),--dry-run)
tables: | $(INSTALLED) ## result files as the paper's tables and figures, in results/tables
	$(PY) -m paper.report $(REPORT_FILES) --out results/tables
install: | $(INSTALLED) ## set up VENV
test: | $(INSTALLED) ## all tests
	$(PY) -m pytest -q tests
test-fast: | $(INSTALLED) ## the tests that take less than a minute together
	MGD_OPS=torch $(PY) -m pytest -q -m "not slow" tests
lint: | $(INSTALLED) ## ruff and a type checker
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyrefly check --python-interpreter-path "$$($(PY) -c 'import sys; print(sys.executable)')"
ext: | $(INSTALLED) ## build the native kernels ahead, and say what was built
	$(PY) kernels.py
bench: | $(INSTALLED) ## all benchmarks, into results/
	for name in region_loss upsample_loss loading step heads; do $(PY) benchmarks/bench_$$name.py || exit; done
clean: ## remove caches; runs/ and data/ stay
	rm -rf .pytest_cache .ruff_cache build *.egg-info __pycache__ */__pycache__

ifneq ($(INSTALLED),)
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt \
	    '.$(addprefix [,$(addsuffix ],$(subst $() ,$(,),$(EXTRAS))))'
	touch $@
endif
