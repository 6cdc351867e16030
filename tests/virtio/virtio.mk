# The VMM's virtio console without a VMM: what `make test` needs, and a command.

list-clauses: setup-run ## what VIRTIO 1.2 says a device must do, and which test proves it
	@PYTHONPATH=tests:tools PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m virtio

.PHONY: list-clauses

VIRTIO = virtio_mmio virtqueue virtio_console
VIRTIO_HEADERS = tests/virtio/surroundings.h vmm/vmm.h $(HEADERS)
ASAN_PROGRAMS += build/asan/tests/virtio/device

$(BUILD)/tests/virtio/%.o: tests/virtio/%.c $(VIRTIO_HEADERS) Makefile
	@mkdir -p $(@D)
	$(CC) $(VMM_CFLAGS) -c $< -o $@

$(BUILD)/tests/virtio/device: $(patsubst %,$(BUILD)/tests/virtio/%.o,device surroundings) $(patsubst %,$(BUILD)/vmm/%.o,$(VIRTIO))
	$(CC) $(VMM_CFLAGS) $(VMM_LDFLAGS) $^ -o $@
