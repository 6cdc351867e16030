# The benchmark: make bench, make bench-check.

bench: build-bench ## what a start, an exit, an injection, a page cost, beside a floor and beside others
	@$(BENCH) show

bench-check: build-bench ## has anything become dearer? In instructions, on svm
	@$(BENCH) check

bench-baseline: build-bench ## take what things cost now as what they may cost
	@$(BENCH) baseline

BENCH = PYTHONPATH=tools PYTHONDONTWRITEBYTECODE=1 $(PYTHON) tests/bench/bench.py --build=$(BUILD)

.PHONY: bench bench-check bench-baseline build-bench

BENCH_GUESTS = line com1 unclaimed
BENCH_HALVES = inject.elf inject.vmm kick.elf page-in.elf page-in.vmm
$(BUILD)/bench/line.o: BENCH_GUEST = -DEXITS=0
$(BUILD)/bench/com1.o: BENCH_GUEST = -DEXITS=1000 -DPORT=0x3f8
$(BUILD)/bench/unclaimed.o: BENCH_GUEST = -DEXITS=1000 -DPORT=0x80
$(BUILD)/bench/floor: BENCH_FLOOR =
$(BUILD)/bench/floor-exits: BENCH_FLOOR = -DEXITS=1000
$(BUILD)/bench/floor-cpuid: BENCH_FLOOR = -DCPUID=1

BENCH_FLOORS = $(BUILD)/bench/floor $(BUILD)/bench/floor-exits $(BUILD)/bench/floor-cpuid
BENCH_FILES = $(BUILD)/bench/measure $(BENCH_FLOORS) $(BUILD)/bench/vmm $(BENCH_GUESTS:%=$(BUILD)/bench/%.elf)

build-bench: setup-bench
	@$(MAKE) --no-print-directory -s BUILD=$(BUILD) LESSONS=tests/bench/halves $(BENCH_FILES) $(BENCH_HALVES:%=$(BUILD)/bench/%)

$(BUILD)/bench/%.elf: $(BUILD)/lessons/%/image.elf
	@mkdir -p $(@D)
	strip -o $@ $<

$(BUILD)/bench/%.vmm: $(BUILD)/lessons/%/vmm
	@mkdir -p $(@D)
	strip -o $@ $<

$(BENCH_GUESTS:%=$(BUILD)/bench/%.o): tests/bench/guest.asm tests/bench/bench.mk
	@mkdir -p $(@D)
	$(NASM) -f elf64 $(BENCH_GUEST) $< -o $@

$(BENCH_GUESTS:%=$(BUILD)/bench/%.elf): %.elf: %.o $(GUEST)/image.ld
	$(CC) $(GUEST_LDFLAGS) $< -o $@

$(BENCH_FLOORS): tests/bench/floor.c tests/bench/bench.mk
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -O2 $(WARNINGS) $(BENCH_FLOOR) -ffreestanding -fno-stack-protector -fno-pie -no-pie -nostdlib -static $< -o $@

$(BUILD)/bench/measure: tests/bench/measure.c | $(LINUX_HEADERS)
	@mkdir -p $(@D)
	$(VMM_CC) -D_GNU_SOURCE -std=gnu11 -O2 $(WARNINGS) $< -static -o $@

$(BUILD)/bench/vmm: $(BUILD)/vmm/vmm
	@mkdir -p $(@D)
	strip -o $@ $<
