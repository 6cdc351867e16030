"""The VMM's virtio device under tests that are its driver, by hand."""
