# make demo                                     teachers, Sup, MGD, table and panels on the embedded data set
# make teachers                                 both teachers of DATASET and PART
# make distill PART=1/8 STUDENT=mbv2            the student; trains the teachers first where they are missing
# make compare                                  Sup at two schedules, MGD and the teachers side by side
# make matrix TABLE="1 4 5 6"                   every run of those tables of the paper, then a result file; DRY=1 prints the plan
# make tables                                   results/*.json as the paper's tables and figures, in results/tables
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
# Students may learn from the teachers of another partition (1: of all labels), or all from those of one seed.
TEACHER_PART ?= $(PART)
TEACHER_SEED ?=
# Of `make matrix`: tables of the paper (1 is also that of Tables 2 and 3, on other data sets), or heads.
TABLE ?= 1
DRY ?=
# Processes that share each training's batch, one a GPU; more than one run under torchrun.
NPROC ?= 1
# Passed on: to every training, to the teachers' alone, to that of all methods' students, to one method's.
ARGS ?=
TEACHER_ARGS ?=
STUDENT_ARGS ?=
MT_ARGS ?=
CPS_ARGS ?=
KD_ARGS ?=
CWD_ARGS ?=
MGD_ARGS ?=
VENV ?= .venv
PYTHON ?= python3
# Where `make compare` writes, $(REPORT).json and $(REPORT).png, and `make matrix`, $(REPORT).json.
REPORT ?= $(RUN)/$(if $(filter matrix,$(MAKECMDGOALS)),matrix-$(subst $() ,-,$(TABLE)),compare)-$(STUDENT)
# What `make tables` reads.
REPORT_FILES ?= $(wildcard results/*.json)

ifeq ($(filter $(STUDENT),r18 r34 r50 r101 wr34 mbv2 resnet18 resnet34 resnet50 resnet101 wide_resnet34 mobilenetv2),)
$(error STUDENT=$(STUDENT): unknown backbone; take r18 or mbv2)
endif

ifneq ($(word 2,$(DATA)),)
$(error DATA=$(DATA): make cannot handle paths with spaces; give a link to that folder)
endif
ifeq ($(DATASET)$(DATA),folder)
$(error DATASET=folder: give its folder, DATA=data/mine)
endif

DATASET_RUNS := runs/$(if $(filter folder,$(DATASET)),$(notdir $(patsubst %/,%,$(DATA))),$(DATASET))
# Of the students; give another to train some by other settings, RUN=runs/mine/short.
RUN := $(DATASET_RUNS)/$(subst /,-,$(PART))
TEACHER_RUN := $(DATASET_RUNS)/$(subst /,-,$(TEACHER_PART))
# What students of another partition's teachers, or of one seed's, have in their folder's name.
OF_PART := $(if $(filter-out $(PART),$(TEACHER_PART)),-of-$(subst /,-,$(TEACHER_PART)))$(addprefix -t,$(TEACHER_SEED))

# The runs of the paper's tables, by the name of their folder.
TRAINED := sup sup-x2 sup-x3 mt cps
ROWS_1 := $(TRAINED) kd cwd mgd
ROWS_4 := one-deep one-wide two-deep two-wide mgd
ROWS_5 := sup pixel pixel-image pixel-region both-levels labeled unlabeled mgd
ROWS_6 := regions-3 regions-5 mgd regions-9 regions-11
ROWS_heads := head-256 head-128 head-64 separable-256 separable-128 separable-64

# $(call checkpoints,NAME): the last.pt of the runs called NAME, one a seed; $(call teacher,deep,SEED): that of a teacher.
seed_tag = $(if $(filter-out 0,$(1)),-s$(1))
of_part = $(if $(filter-out $(TRAINED),$(1)),$(OF_PART))
checkpoints = $(foreach seed,$(SEEDS),$(RUN)/$(1)-$(STUDENT)$(call of_part,$(1))$(call seed_tag,$(seed))/last.pt)
teacher = $(TEACHER_RUN)/teacher-$(1)$(call seed_tag,$(2))/last.pt
# Two teachers of one kind (Table 4) are those of seed 0 and of seed 10, of seed 1 and of seed 11, and so on.
TEACHER_SEEDS := $(or $(TEACHER_SEED),$(SEEDS))
T_D := $(foreach seed,$(TEACHER_SEEDS),$(call teacher,deep,$(seed)))
T_W := $(foreach seed,$(TEACHER_SEEDS),$(call teacher,wide,$(seed)))
SUP := $(call checkpoints,sup)
SUP_LONG := $(call checkpoints,sup-x3)
MGD := $(call checkpoints,mgd)
$(foreach table,$(TABLE),$(if $(ROWS_$(table)),,$(error TABLE=$(table): unknown; take some of 1 4 5 6 heads)))
MATRIX := $(foreach row,$(foreach table,$(TABLE),$(ROWS_$(table))),$(call checkpoints,$(row)))
DATA_FLAGS = --dataset $(DATASET) $(if $(DATA),--data $(DATA))
COMMON = $(DATA_FLAGS) --part $(PART) --resume $(ARGS)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

RUN_SCRIPT = $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC))

.PHONY: install demo compare matrix teachers distill sup tables test lint ext bench clean

install: | $(INSTALLED)

demo:
	@$(MAKE) --no-print-directory compare DATASET=shapes DATA= PART=1/32

compare: $(SUP) $(SUP_LONG) $(T_D) $(T_W) $(MGD)
	$(RUN_SCRIPT) evaluate.py --ckpt $(firstword $(SUP)) --compare $(wordlist 2,99,$(SUP)) $(SUP_LONG) $(MGD) $(T_D) $(T_W) \
	    --json $(REPORT).json --panels $(REPORT).png

teachers: $(T_D) $(T_W)

distill: $(MGD)

sup: $(SUP)

# By another name, since a line with $(MAKE) itself is run by `make -n` too.
COMMANDS_OF = $(MAKE) --no-print-directory -n

# What is finished is evaluated also where runs failed (exit code 1), but not after wrong flags or an interruption.
matrix: | $(INSTALLED)
	@commands=$$($(COMMANDS_OF) $(MATRIX)) || exit; printf '%s\n' "$$commands" | $(PY) matrix.py $(if $(DRY),--dry-run); failed=$$?; \
	[ $$failed -le 1 ] || exit $$failed; set -- $(if $(DRY),,$$(ls $(sort $(MATRIX) $(T_D) $(T_W)) 2> /dev/null)); first=$$1; \
	if [ "$$first" ]; then shift; $(RUN_SCRIPT) evaluate.py --ckpt $$first $${1+--compare "$$@"} --json $(REPORT).json || exit; fi; exit $$failed

# The teachers of one seed; $(1) is the seed, $(2) the suffix of the folders. A last.pt is whole from the moment it is there, so
# make must not remove it when it is interrupted.
define TEACHERS
.PRECIOUS: $(TEACHER_RUN)/teacher-deep$(2)/last.pt $(TEACHER_RUN)/teacher-wide$(2)/last.pt
$(TEACHER_RUN)/teacher-deep$(2)/last.pt: | $(INSTALLED)
	$$(RUN_SCRIPT) train_teacher.py --out $$(@D) --role teacher_deep $(if $(DEEP),--backbone $(DEEP)) --seed $(1) $$(DATA_FLAGS) --part $(TEACHER_PART) --resume $$(ARGS) $$(TEACHER_ARGS)

$(TEACHER_RUN)/teacher-wide$(2)/last.pt: | $(INSTALLED)
	$$(RUN_SCRIPT) train_teacher.py --out $$(@D) --role teacher_wide $(if $(WIDE),--backbone $(WIDE)) --seed $(1) $$(DATA_FLAGS) --part $(TEACHER_PART) --resume $$(ARGS) $$(TEACHER_ARGS)
endef

# A student trained without teachers: $(1) the row, $(2) its flags, $(3) the seed.
define TRAIN
.PRECIOUS: $(RUN)/$(1)-$(STUDENT)$(call seed_tag,$(3))/last.pt
$(RUN)/$(1)-$(STUDENT)$(call seed_tag,$(3))/last.pt: | $(INSTALLED)
	$$(RUN_SCRIPT) train_teacher.py --out $$(@D) --backbone $(STUDENT) --seed $(3) $$(COMMON) $$(STUDENT_ARGS) $(2)
endef

# A distilled student: $(1) the row, $(2) its flags, $(3) the seed, $(4) and $(5) the first and the second teacher's checkpoint.
define DISTILL
.PRECIOUS: $(RUN)/$(1)-$(STUDENT)$(OF_PART)$(call seed_tag,$(3))/last.pt
$(RUN)/$(1)-$(STUDENT)$(OF_PART)$(call seed_tag,$(3))/last.pt: | $(4) $(5) $(INSTALLED)
	$$(RUN_SCRIPT) distill.py --out $$(@D) --student $(STUDENT) $(if $(4),--deep $(4)) $(if $(5),--wide $(5)) --seed $(3) $$(COMMON) $$(STUDENT_ARGS) $(2)
endef

# All students of one seed; $(1) is the seed, $(2) and $(3) are the deep and the wide teacher, $(4) and $(5) others of their kind.
define STUDENTS
$(call TRAIN,sup,--method sup,$(1))
$(call TRAIN,sup-x2,--method sup --schedule 2,$(1))
$(call TRAIN,sup-x3,--method sup --schedule 3,$(1))
$(call TRAIN,mt,--method mt $(MT_ARGS),$(1))
$(call TRAIN,cps,--method cps $(CPS_ARGS),$(1))
$(call DISTILL,kd,--method kd $(KD_ARGS),$(1),$(2),$(3))
$(call DISTILL,cwd,--method cwd $(CWD_ARGS),$(1),$(2),$(3))
$(call DISTILL,mgd,$(MGD_ARGS),$(1),$(2),$(3))
$(call DISTILL,one-deep,$(MGD_ARGS),$(1),$(2),)
$(call DISTILL,one-wide,$(MGD_ARGS),$(1),,$(3))
$(call DISTILL,two-deep,$(MGD_ARGS),$(1),$(2),$(4))
$(call DISTILL,two-wide,$(MGD_ARGS),$(1),$(3),$(5))
$(call DISTILL,pixel,$(MGD_ARGS) --losses sup pixel,$(1),$(2),$(3))
$(call DISTILL,pixel-image,$(MGD_ARGS) --losses sup pixel image:T_D,$(1),$(2),$(3))
$(call DISTILL,pixel-region,$(MGD_ARGS) --losses sup pixel region:T_W,$(1),$(2),$(3))
$(call DISTILL,both-levels,$(MGD_ARGS) --losses sup pixel image:T_D image:T_W region:T_D region:T_W,$(1),$(2),$(3))
$(call DISTILL,labeled,$(MGD_ARGS) --losses sup pixel:labeled,$(1),$(2),$(3))
$(call DISTILL,unlabeled,$(MGD_ARGS) --losses sup pixel:unlabeled image:T_D region:T_W,$(1),$(2),$(3))
$(foreach regions,3 5 9 11,
$(call DISTILL,regions-$(regions),$(MGD_ARGS) --regions $(regions),$(1),$(2),$(3)))
$(foreach width,256 128 64,
$(call DISTILL,head-$(width),$(MGD_ARGS) --head-width $(width),$(1),$(2),$(3))
$(call DISTILL,separable-$(width),$(MGD_ARGS) --head-width $(width) --separable-head,$(1),$(2),$(3)))
endef

$(foreach seed,$(sort $(TEACHER_SEEDS) $(addprefix 1,$(TEACHER_SEEDS))),$(eval $(call TEACHERS,$(seed),$(call seed_tag,$(seed)))))
$(foreach seed,$(SEEDS),$(foreach t,$(or $(TEACHER_SEED),$(seed)),$(eval $(call STUDENTS,$(seed),$(call teacher,deep,$(t)),$(call teacher,wide,$(t)),$(call teacher,deep,1$(t)),$(call teacher,wide,1$(t))))))

tables: | $(INSTALLED)
	$(PY) report.py $(REPORT_FILES) --out results/tables

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
	$(PY) benchmarks/bench_heads.py

# What is made again by itself; runs/ and data/ stay.
clean:
	rm -rf .pytest_cache .ruff_cache __pycache__ */__pycache__

$(VENV)/.installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@
