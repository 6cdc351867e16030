# The VMM's virtio console without a VMM: what `make test` needs, and commands.

list-clauses: setup-run ## what VIRTIO 1.2 says a device must do, and which test proves it
	@PYTHONPATH=tests:tools PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m virtio

SECONDS = 60
fuzz: setup-test build-fuzz ## [SECONDS=n]  look for input that the virtio console cannot stand
	@$(PYTHON) tests/virtio/fuzz.py $(FUZZER) $(SECONDS)

# What the fuzzer has found goes into the corpus, of which what is needed stays; files with names are made by hand.
fuzz-corpus: build-fuzz
	rm -rf $(BUILD)/fuzz/corpus && mkdir $(BUILD)/fuzz/corpus
	$(FUZZER) -merge=1 -use_counters=0 $(BUILD)/fuzz/corpus tests/virtio/corpus $(BUILD)/fuzz/found
	find tests/virtio/corpus -regextype egrep -regex '.*/[0-9a-f]{40}' -delete
	cp $(BUILD)/fuzz/corpus/* tests/virtio/corpus

.PHONY: list-clauses fuzz fuzz-corpus build-fuzz

VIRTIO = virtio_mmio virtqueue virtio_console
VIRTIO_HEADERS = tests/virtio/surroundings.h vmm/vmm.h $(HEADERS)
ASAN_PROGRAMS += build/asan/tests/virtio/device

$(BUILD)/tests/virtio/%.o: tests/virtio/%.c $(VIRTIO_HEADERS) Makefile
	@mkdir -p $(@D)
	$(CC) $(VMM_CFLAGS) -c $< -o $@

$(BUILD)/tests/virtio/device: $(patsubst %,$(BUILD)/tests/virtio/%.o,device surroundings) $(patsubst %,$(BUILD)/vmm/%.o,$(VIRTIO))
	$(CC) $(VMM_CFLAGS) $(VMM_LDFLAGS) $^ -o $@

# libFuzzer is clang's. PLANTED: a file of the VMM with a bug, to be taken instead of the one of this name.
FUZZER = $(BUILD)/fuzz/virtio
FUZZ_SOURCES = $(patsubst %,tests/virtio/%.c,fuzz surroundings) \
	$(filter-out vmm/$(notdir $(PLANTED)),$(patsubst %,vmm/%.c,$(VIRTIO))) $(PLANTED)

build-fuzz: $(FUZZER)

$(FUZZER): $(FUZZ_SOURCES) $(VIRTIO_HEADERS) Makefile
	@mkdir -p $(@D)
	clang $(VMM_CFLAGS) -Ivmm -no-pie -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $(FUZZ_SOURCES) -o $@
