# Every command a user types; `make help` lists them. What needs more than a line is in tools/.

LESSONS ?= lessons
GUEST ?= guest
BUILD ?= build
PYTHON ?= /usr/bin/python3
CC = gcc
NASM = nasm

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.SUFFIXES:

KVMLAB = PYTHONPATH=tools PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m kvmlab --lessons=$(LESSONS) --build=$(BUILD)

HOW = $(if $(SEED),--seed='$(SEED)') $(if $(ENGINE),--engine='$(ENGINE)') $(if $(KVM_PARAMS),--kvm-params='$(KVM_PARAMS)') $(if $(KTRACE),--trace)

# ---- what users type ----

run: build-lesson ## LESSON=n [SEED=s] [ENGINE=e] [EVENTS=file] [KTRACE=1] [KVM_PARAMS=...]  build a lesson, run it once, judge what the machine did
	@$(KVMLAB) run $(LESSON) $(HOW) $(if $(EVENTS),--events='$(EVENTS)')

check: build-lesson ## LESSON=n [SEED=s] [ENGINE=e] [KVM_PARAMS=...]  the same checks over several seeds, with points
	@$(KVMLAB) check $(LESSON) $(HOW)

watch: setup-run ## LESSON=n [SEED=s] [ENGINE=e] [KVM_PARAMS=...]  make check at each save, until Ctrl-C
	@$(KVMLAB) watch $(LESSON)

compare: build-lesson ## LESSON=n [SEED=s] [ENGINE=e]  the lesson on several machines, and what differs, as a table
	@$(KVMLAB) compare $(LESSON) $(if $(SEED),--seed='$(SEED)') $(if $(ENGINE),--engine='$(ENGINE)')

debug: build-lesson setup-debug ## LESSON=n [SEED=s]  the lesson under gdb, stopped at guest_main
	@$(KVMLAB) debug $(LESSON) $(if $(SEED),--seed='$(SEED)') $(if $(ENGINE),--engine='$(ENGINE)')

list: setup-run ## the lessons: points of the last run or check, parts that are written
	@$(KVMLAB) list

hint: setup-run ## LESSON=n  a hint for the part that is to be written next; each time one more
	@$(KVMLAB) hint $(LESSON)

reset: setup-run ## LESSON=n  the stubs of a lesson again; what was there is kept
	@$(KVMLAB) reset $(LESSON)

handout: setup-run ## DEST=dir  write the student tree, a git repository: the lessons without their solutions
	@$(KVMLAB) handout '$(DEST)'

grade: setup-grade ## SUBMISSION=path [LESSON=n] [ENGINE=e] [SEEDS=s,...] [FORMAT=table|json|junit|tap|gradescope|classroom|autolab] [OUTPUT=file]  grade a folder, a tar or zip file or a git revision, in a sandbox
	@$(KVMLAB) grade --submission='$(SUBMISSION)' $(if $(LESSON),--lesson='$(LESSON)') $(if $(ENGINE),--engine='$(ENGINE)') $(if $(SEEDS),--seeds='$(SEEDS)') $(if $(FORMAT),--format='$(FORMAT)') $(if $(OUTPUT),--output='$(OUTPUT)')

grade-all: setup-grade ## SUBMISSIONS=dir [JOBS=n] [RESULTS=dir] [LESSON=n] [ENGINE=e] [SEEDS=s,...]  grade many submissions; go on after an interruption
	@$(KVMLAB) grade-all '$(SUBMISSIONS)' $(if $(JOBS),--jobs='$(JOBS)') $(if $(RESULTS),--results='$(RESULTS)') $(if $(LESSON),--lesson='$(LESSON)') $(if $(ENGINE),--engine='$(ENGINE)') $(if $(SEEDS),--seeds='$(SEEDS)')

gradescope: setup-svm ## [LESSON=n]  the autograder for Gradescope, as build/gradescope.zip
	@$(KVMLAB) gradescope $(if $(LESSON),--lesson='$(LESSON)')

test: setup-test setup-svm setup-vmx ## [ENGINE=kvm,svm,vmx]  everything that must hold before a change lands
	@$(MAKE) --no-print-directory -s -j2 build-all build-asan
	@$(PYTHON) -m pytest -n 2 --engines=$(if $(ENGINE),$(ENGINE),kvm,svm,vmx) $(PYTEST_ARGS)

cover: setup-cover ## line coverage of the VMM and of the guest runtime, as HTML in build/cover
	@tools/cover

doctor: ## which engines work on this machine, and what to type where one does not
	@PYTHONPATH=tools PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m kvmlab.doctor

lint: setup-lint ## [FIX=1]  formatting, static analysis and types of all sources
	@tools/lint

setup: ## install every package that any of these commands needs
	@tools/setup run debug test svm vmx grade bench cover lint

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (([A-Z[].*)  )?(.*)/make \1 \3\n    \4/; s/ \n/\n/p' $(MAKEFILE_LIST)

clean: ## remove everything that was built
	rm -rf build

setup-%:
	@tools/setup $*

.PHONY: run check watch compare debug list hint reset handout grade grade-all gradescope test cover doctor lint setup help clean build-lesson build-all build-asan

# ---- how it is built ----

WARNINGS = -Wall -Wextra -Werror -Wshadow -Wvla -Wstrict-prototypes -Wmissing-prototypes
# Small is quick here: a page that is touched for the first time costs as much as five system calls. No sibling calls:
# a crash in a function of the C library leads back to the line that called it.
VMM_CFLAGS = -std=gnu11 -Os -g -fno-pie -fno-optimize-sibling-calls -D_GNU_SOURCE $(WARNINGS) -Iinclude \
	-ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables
# The same binary runs here and in an emulated machine, where there is no other file than it. musl makes it small and
# quick to start; of Linux's own headers it has none.
VMM_CC = musl-gcc -isystem $(BUILD)/linux-headers
VMM_LDFLAGS = -static -no-pie -Wl,--gc-sections,-z,noseparate-code
LINUX_HEADERS = $(BUILD)/linux-headers/made
# No SSE or x87 in the guest (nobody saves their registers in a trap), no red zone (a trap would
# overwrite it), frame pointers for the VMM's backtraces.
GUEST_CFLAGS = -std=gnu11 -O2 -g $(WARNINGS) -Iinclude -I$(GUEST) -ffreestanding -fno-pic -fno-pie \
	-fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables \
	-mgeneral-regs-only -mno-red-zone -fno-omit-frame-pointer -mno-omit-leaf-frame-pointer
GUEST_LDFLAGS = -nostdlib -static -no-pie -Wl,-z,noexecstack,-z,max-page-size=4096,--build-id=none \
	-Wl,--no-warn-rwx-segments -T $(GUEST)/image.ld

# The libraries of these are for glibc.
ifneq ($(SANITIZE)$(COVERAGE),)
VMM_CC = $(CC)
LINUX_HEADERS =
endif
ifdef SANITIZE
VMM_CFLAGS += -fsanitize=address,undefined -fno-sanitize-recover=all
VMM_LDFLAGS = -no-pie -pthread
endif
ifdef COVERAGE
VMM_CFLAGS += --coverage -fprofile-abs-path
# libgcov's fork() calls this, and has only a weak reference to it: a static program would call nothing.
VMM_LDFLAGS += -Wl,-u,pthread_mutex_init
GUEST_COVERAGE = -fprofile-arcs -ftest-coverage -fprofile-info-section -fprofile-abs-path -DKVMLAB_COVERAGE
GUEST_LIBS = -lgcov
RUNTIME_EXTRA = coverage
endif

HEADERS = $(wildcard include/*.h)
GUEST_HEADERS = $(HEADERS) $(wildcard $(GUEST)/*.h)
RUNTIME_OBJECTS = $(patsubst %,$(BUILD)/guest/%.o,boot console edu paging pic string trap virtio virtio_console $(RUNTIME_EXTRA))
# What an image does not call is not in it.
RUNTIME = $(BUILD)/guest/boot_entry.o $(BUILD)/guest/runtime.a

$(BUILD)/guest/runtime.a: $(RUNTIME_OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/guest/boot_entry.o: $(GUEST)/boot.asm
	@mkdir -p $(@D)
	$(NASM) -f elf64 -g -F dwarf $< -o $@

# The counters must not count themselves: coverage.c is built without.
$(BUILD)/guest/coverage.o: $(GUEST)/coverage.c $(GUEST_HEADERS) Makefile
	@mkdir -p $(@D)
	$(CC) $(GUEST_CFLAGS) -DKVMLAB_COVERAGE -c $< -o $@

$(BUILD)/guest/%.o: $(GUEST)/%.c $(GUEST_HEADERS) Makefile
	@mkdir -p $(@D)
	$(CC) $(GUEST_CFLAGS) $(GUEST_COVERAGE) -c $< -o $@

$(BUILD)/linux-headers/made:
	@mkdir -p $(@D)
	ln -sfn $(wildcard /usr/include/linux /usr/include/asm-generic /usr/include/asm /usr/include/$(shell $(CC) -print-multiarch)/asm) $(@D)
	@touch $@

VMM_OBJECTS = $(patsubst %,$(BUILD)/vmm/%.o,vmm events walk image statistics io gdb pic virtio_mmio virtqueue virtio_console)

$(VMM_OBJECTS): $(BUILD)/vmm/%.o: vmm/%.c vmm/vmm.h $(HEADERS) Makefile | $(LINUX_HEADERS)
	@mkdir -p $(@D)
	$(VMM_CC) $(VMM_CFLAGS) -c $< -o $@

# A device of lessons that is not one of the machine's: linked where a host half calls it.
EDU_OBJECTS = $(patsubst %,$(BUILD)/vmm/edu/%.o,client messages model process shared_memory trace vfio_pci)

$(EDU_OBJECTS): $(BUILD)/vmm/edu/%.o: vmm/edu/%.c $(HEADERS) Makefile | $(LINUX_HEADERS)
	@mkdir -p $(@D)
	$(VMM_CC) $(VMM_CFLAGS) -c $< -o $@

$(BUILD)/vmm/edu.a: $(EDU_OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/vmm/vmm: $(VMM_OBJECTS)
	$(VMM_CC) $(VMM_CFLAGS) $(VMM_LDFLAGS) $^ -o $@

# What a submission runs in where the machine is emulated.
$(BUILD)/confine: tools/sandbox/confine.c Makefile
	@mkdir -p $(@D)
	$(CC) $(VMM_CFLAGS) $(VMM_LDFLAGS) $< -o $@

# A lesson: image.elf from guest.c, and a VMM of its own where it has a host.c.
$(BUILD)/lessons/%/guest.o: $(LESSONS)/%/guest.c $(GUEST_HEADERS) Makefile
	@mkdir -p $(@D)
	$(CC) $(GUEST_CFLAGS) -c $< -o $@

$(BUILD)/lessons/%/image.elf: $(BUILD)/lessons/%/guest.o $(RUNTIME) $(GUEST)/image.ld
	$(CC) $(GUEST_LDFLAGS) $(filter %.o %.a,$^) $(GUEST_LIBS) -o $@

# -Og: what is said of a crash, or by gdb, is to be about the line that the student wrote.
$(BUILD)/lessons/%/host.o: $(LESSONS)/%/host.c $(HEADERS) Makefile | $(LINUX_HEADERS)
	@mkdir -p $(@D)
	$(VMM_CC) $(VMM_CFLAGS) -Og -c $< -o $@

$(BUILD)/lessons/%/vmm: $(BUILD)/lessons/%/host.o $(VMM_OBJECTS) $(BUILD)/vmm/edu.a
	$(VMM_CC) $(VMM_CFLAGS) $(VMM_LDFLAGS) $^ -o $@

# The guests of the tests: one file each.
$(BUILD)/tests/%.elf: tests/guests/%.c $(RUNTIME) $(GUEST_HEADERS) $(GUEST)/image.ld Makefile
	@mkdir -p $(@D)
	$(CC) $(GUEST_CFLAGS) $(GUEST_LDFLAGS) $< $(RUNTIME) $(GUEST_LIBS) -o $@

# Tests come between the VMM and the C library, by a library of their own: what is linked statically lets nobody.
$(BUILD)/tests/shims/vmm: $(VMM_OBJECTS)
	@mkdir -p $(@D)
	$(VMM_CC) $(VMM_CFLAGS) -no-pie $^ -o $@

$(BUILD)/tests/shims/kvm.so: tests/shims/kvm.c | $(LINUX_HEADERS)
	@mkdir -p $(@D)
	$(VMM_CC) -D_GNU_SOURCE $(WARNINGS) -shared -fPIC $< -o $@

ALL_LESSONS = $(notdir $(patsubst %/,%,$(dir $(wildcard $(LESSONS)/*/lesson.toml))))
HOST_LESSONS = $(notdir $(patsubst %/,%,$(dir $(wildcard $(LESSONS)/*/host.c))))
# LESSON is 1, 01 or 01-vm-exit.
THE_LESSON = $(firstword $(filter $(LESSON) $(LESSON)-% 0$(LESSON)-%,$(ALL_LESSONS)))
lesson_files = $(BUILD)/lessons/$(1)/image.elf $(if $(filter $(1),$(HOST_LESSONS)),$(BUILD)/lessons/$(1)/vmm,$(BUILD)/vmm/vmm)

# What a lesson includes from its own folder; the halves of the tests include what is a lesson's.
LESSON_HEADERS = $(wildcard $(LESSONS)/$(lesson)/*.h $(if $(filter %tests/hosts,$(LESSONS)),lessons/*/*.h))
$(foreach lesson,$(notdir $(wildcard $(LESSONS)/*)),$(eval $(BUILD)/lessons/$(lesson)/guest.o $(BUILD)/lessons/$(lesson)/host.o: $(LESSON_HEADERS)))

build-lesson: setup-run
	@$(if $(LESSON),,echo "kvmlab: which lesson? say LESSON=n, as in: make $(firstword $(MAKECMDGOALS)) LESSON=1" >&2; exit 2)
	@$(if $(THE_LESSON),,echo "kvmlab: there is no lesson $(LESSON): make list shows those there are" >&2; exit 2)
	@$(MAKE) --no-print-directory -s BUILD=$(BUILD) LESSONS=$(LESSONS) GUEST=$(GUEST) $(call lesson_files,$(THE_LESSON))

TEST_GUESTS = $(patsubst tests/guests/%.c,$(BUILD)/tests/%.elf,$(wildcard tests/guests/*.c))

build-all: $(BUILD)/vmm/vmm $(foreach lesson,$(ALL_LESSONS),$(call lesson_files,$(lesson))) $(TEST_GUESTS)

# The VMM under AddressSanitizer and UndefinedBehaviorSanitizer, for the tests.
ASAN_PROGRAMS = build/asan/vmm/vmm
build-asan:
	@$(MAKE) --no-print-directory -s SANITIZE=1 BUILD=build/asan $(ASAN_PROGRAMS)

# What only the tests of the virtio console need; a student's tree has none of it.
include $(wildcard tests/virtio/*.mk tests/bench/*.mk)

.SECONDARY:
