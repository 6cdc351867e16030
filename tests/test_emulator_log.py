"""What is counted of the log that Bochs writes."""

from kvmlab import emulator_log

LOG = b"""\
01251834729d[CPU0  ] page walk for address 0xffffffff8102ede0
01251835175d[CPU0  ] VMLAUNCH VMCS ptr: 0x00000000052f1000
01251835175d[CPU0  ] VMENTER to x86-64 guest
01251835176d[CPU0  ] page walk for address 0x0000000000104a90
01251835176d[CPU0  ] EPT walk for guest paddr 0x00000017b000
01251835176d[CPU0  ] EPT walk for guest paddr 0x000000104a90
01251835176d[CPU0  ] VMEXIT: I/O port 0x03f8
01251835176d[CPU0  ] VMEXIT reason = 30 (I/O Instruction) qualification=0x3f80030
01251835177d[CPU0  ] page walk for address 0xffffffffc03513ae
01251835177d[CPU0  ] page walk for address 0xffffc900005b7cd8
01251835366d[CPU0  ] inhibit interrupts mask = 1
01251835400d[CPU0  ] VMRESUME VMCS ptr: 0x00000000052f1000
01251835401d[CPU0  ] VMEXIT reason = 12 (HLT) qualification=0x0
01251835402d[CPU0  ] page walk for address 0xffffffffc03513ae
"""


def test_walks_are_counted_for_guest_and_host_between_the_first_entry_and_the_last_exit() -> None:
    counts = emulator_log.count(LOG.splitlines(keepends=True))
    assert counts == {"entries": 2, "exits": 2, "guest_walks": 1, "host_walks": 2, "ept_walks": 2}


def test_a_log_without_a_virtual_machine_counts_nothing() -> None:
    assert set(emulator_log.count(LOG.splitlines()[:1]).values()) == {0}
