"""A driver for the device in tests/virtio/device.c: registers by command, rings and buffers in memory that both have
mapped. It does what it is told, also what no driver may do."""

import contextlib
import json
import mmap
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest
from virtio.names import AVAIL, DESC, MMIO, F, S

ACKNOWLEDGED = S.ACKNOWLEDGE | S.DRIVER
NEGOTIATED = ACKNOWLEDGED | S.FEATURES_OK
LIVE = NEGOTIATED | S.DRIVER_OK
BROKEN = LIVE | S.NEEDS_RESET

ALL = F.VERSION_1 | F.SIZE | F.EMERG_WRITE | F.INDIRECT_DESC | F.EVENT_IDX
PLAIN = F.VERSION_1

RECEIVE, TRANSMIT = 0, 1
SIZE_MAX = 256

PAGE = 4096
MEMORY_SIZE = 1 << 20
# Each part of a queue has pages of its own, which can be guarded; buffers lie above.
QUEUE_GPA, QUEUE_SPACE = 0x10000, 0x10000
DRIVER_AREA, DEVICE_AREA = 0x4000, 0x8000
BUFFERS_GPA = 0x40000

NO_ACCESS, READ_ONLY, READ_WRITE = 0, 1, 3  # PROT_*

TOO_LONG = 60.0  # for one device, in seconds: most need some milliseconds

Event = dict[str, Any]


class Died(AssertionError):
    """The device's process has ended: it has touched what it must not, or a sanitizer has found something."""


class Buffer(NamedTuple):
    """What one descriptor describes."""

    gpa: int
    size: int
    is_writable: bool


class Used(NamedTuple):
    """An entry of the used ring."""

    id: int
    length: int


class Driver:
    """The guest's side: it knows where everything is."""

    def __init__(self, program: Path, memory_size: int = MEMORY_SIZE) -> None:
        file = os.memfd_create("guest memory")
        os.truncate(file, memory_size)
        self.memory = mmap.mmap(file, memory_size)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [program, str(file), str(memory_size)], stdin=pipe, stdout=pipe, stderr=pipe, text=True, pass_fds=[file]
        )
        os.close(file)
        self._watchdog = threading.Timer(TOO_LONG, self._process.kill)
        self._watchdog.start()
        self._expected_to_die = False
        self._free_gpa = BUFFERS_GPA
        self.events: list[Event] = []
        self.output = b""
        self.line = False
        self.queues = [Queue(self, RECEIVE), Queue(self, TRANSMIT)]
        self._answer()

    # ---- commands ----

    def read(self, offset: int, size: int = 4) -> int:
        value = self._command(f"read {int(offset)} {size}")
        assert value is not None, f"nobody claims the {size} bytes at {offset:#x}"
        return value

    def write(self, offset: int, value: int, size: int = 4) -> None:
        assert self._command(f"write {int(offset)} {size} {int(value)}") is not None, (
            f"nobody claims {size} bytes at {offset:#x}"
        )

    def is_claimed(self, offset: int, size: int) -> bool:
        return self._command(f"read {int(offset)} {size}") is not None

    def ring_doorbell(self, value: int) -> bool:
        """What the driver's write to QueueNotify does where it is an ioeventfd's; False: there is none."""
        return self._command(f"doorbell {value}") is not None

    def guard(self, gpa: int, size: int, permitted: int) -> None:
        """From now on only such accesses of the device to these pages do not end it."""
        self._command(f"protect {gpa} {size} {permitted}")

    def change(self, gpa: int, data: bytes, accesses: int) -> None:
        """When the device has accessed this page so many times, these 8 bytes stand there, as if another CPU of the
        guest had written them at that moment."""
        self._command(f"change {gpa} {int.from_bytes(data, 'little')} {accesses}")

    def change_nothing(self) -> None:
        self._command("change 0 0 0")

    def type(self, keys: bytes) -> bool:
        """On standard input; False: some of it is still there, since the device does not want it now."""
        return bool(self._command(f"input {keys.hex()}"))

    def type_end(self) -> None:
        self._command("input_ends")

    def resize(self, columns: int, rows: int) -> None:
        self._command(f"resize {columns} {rows}")

    def _command(self, line: str) -> int | None:
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self._answer()

    def _answer(self) -> int | None:
        assert self._process.stdout
        for line in self._process.stdout:
            event: Event = json.loads(line)
            if event["kind"] == "answer":
                value: int | None = event["value"]
                return value
            self._happened(event)
        hung = "the device does not answer: it is in a loop\n" if self._process.wait() == -signal.SIGKILL else ""
        raise Died(hung + self._read(self._process.stderr))

    def _happened(self, event: Event) -> None:
        self.events.append(event)
        if event["kind"] == "output":
            self.output += bytes.fromhex(event["bytes"])
        elif event["kind"] == "line":
            self.line = bool(event["is_high"])

    @staticmethod
    def _read(stream: IO[str] | None) -> str:
        assert stream
        return stream.read()

    def close(self) -> None:
        """End the device, which must have nothing to complain about."""
        if not self._expected_to_die:
            output, errors = self._process.communicate(timeout=60)
            assert (self._process.returncode, output, errors) == (0, "", "")

    def kill(self) -> None:
        self._watchdog.cancel()
        self._process.kill()
        self._process.communicate()
        self.memory.close()

    @contextlib.contextmanager
    def dies_at(self, first_gpa: int, last_gpa: int | None = None) -> Iterator[None]:
        """What is done here makes the device touch a guarded byte between these two, for the first time: it ends with
        that, and memory stays as it was then."""
        self._expected_to_die = True
        with pytest.raises(Died) as died:
            yield
        touched = re.search(r"^guarded: gpa (0x[0-9a-f]+)$", str(died.value), re.MULTILINE)
        assert touched, str(died.value)
        assert first_gpa <= int(touched[1], 16) <= (first_gpa if last_gpa is None else last_gpa), touched[0]

    # ---- what has happened ----

    def happened(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def misuse(self) -> list[str]:
        """What the device has said of this driver."""
        return [event["what"] for event in self.happened("virtio_misuse")]

    @property
    def interrupts(self) -> list[str]:
        """Their causes: "used", "config"."""
        return [event["cause"] for event in self.happened("virtio_interrupt")]

    def forget(self) -> None:
        self.events.clear()
        self.output = b""

    # ---- memory ----

    def poke(self, gpa: int, data: bytes) -> None:
        self.memory[gpa : gpa + len(data)] = data

    def peek(self, gpa: int, size: int) -> bytes:
        return self.memory[gpa : gpa + size]

    def poke16(self, gpa: int, value: int) -> None:
        self.poke(gpa, value.to_bytes(2, "little"))

    def peek16(self, gpa: int) -> int:
        return int.from_bytes(self.peek(gpa, 2), "little")

    def room(self, size: int, *, align: int = 16) -> int:
        """Memory that nobody uses yet."""
        gpa = -(-self._free_gpa // align) * align
        self._free_gpa = gpa + size
        assert self._free_gpa <= len(self.memory)
        return gpa

    def readable(self, data: bytes) -> Buffer:
        buffer = Buffer(self.room(len(data)), len(data), False)
        self.poke(buffer.gpa, data)
        return buffer

    def writable(self, size: int, fill: bytes = b"\xee") -> Buffer:
        buffer = Buffer(self.room(size), size, True)
        self.poke(buffer.gpa, fill * size)
        return buffer

    def content(self, *buffers: Buffer) -> bytes:
        return b"".join(self.peek(buffer.gpa, buffer.size) for buffer in buffers)

    # ---- VIRTIO 1.2 "Device Initialization", step by step ----

    def reset(self) -> None:
        self.write(MMIO.STATUS, 0)
        for queue in self.queues:
            queue.forget()

    @property
    def status(self) -> int:
        return self.read(MMIO.STATUS)

    @property
    def interrupt_status(self) -> int:
        return self.read(MMIO.INTERRUPT_STATUS)

    def acknowledge_interrupt(self) -> None:
        self.write(MMIO.INTERRUPT_ACK, self.interrupt_status)

    def features_offered(self) -> int:
        halves = []
        for half in range(2):
            self.write(MMIO.DEVICE_FEATURES_SEL, half)
            halves.append(self.read(MMIO.DEVICE_FEATURES))
        return halves[0] | halves[1] << 32

    def accept(self, features: int) -> None:
        for half in range(2):
            self.write(MMIO.DRIVER_FEATURES_SEL, half)
            self.write(MMIO.DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)

    def negotiate(self, features: int = PLAIN) -> None:
        self.reset()
        self.write(MMIO.STATUS, S.ACKNOWLEDGE)
        self.write(MMIO.STATUS, ACKNOWLEDGED)
        self.accept(features)
        self.write(MMIO.STATUS, NEGOTIATED)
        assert self.status == NEGOTIATED

    def set_up(self, features: int = PLAIN, size: int = 8) -> None:
        """All but DRIVER_OK."""
        self.negotiate(features)
        for queue in self.queues:
            queue.create(size)

    def go_live(self, features: int = PLAIN, size: int = 8) -> None:
        self.set_up(features, size)
        self.write(MMIO.STATUS, LIVE)
        assert self.status == LIVE

    def queue(self, index: int) -> "Queue":
        return self.queues[index]

    def works(self) -> None:
        """What was before does not matter: after a reset, a message goes out and one comes in."""
        self.go_live()
        receive, transmit = self.queue(RECEIVE), self.queue(TRANSMIT)
        room = self.writable(PAGE)
        head = receive.send(room)
        while receive.used():  # input that is left from before
            head = receive.send(room)
        self.acknowledge_interrupt()
        self.forget()
        transmit.send(self.readable(b"out"))
        self.type(b"in")
        assert (self.output, self.content(room)[:2]) == (b"out", b"in")
        assert (transmit.used(), receive.used()) == ([Used(0, 0)], [Used(head, 2)])
        assert (self.misuse, self.interrupts, self.line, self.status) == ([], ["used", "used"], True, LIVE)


class Queue:
    """A queue of the device, in memory; what the driver has made available, and what it has seen used."""

    def __init__(self, driver: Driver, index: int) -> None:
        self.driver = driver
        self.index = index
        self.size = 0
        self.forget()
        self.place(QUEUE_GPA + index * QUEUE_SPACE)

    def forget(self) -> None:
        self.next_descriptor = self.available = self.seen = 0

    def place(self, descriptor_gpa: int, driver_gpa: int | None = None, device_gpa: int | None = None) -> None:
        """Where its parts will be, from the next create() on."""
        self.descriptor_gpa = descriptor_gpa
        self.driver_gpa = descriptor_gpa + DRIVER_AREA if driver_gpa is None else driver_gpa
        self.device_gpa = descriptor_gpa + DEVICE_AREA if device_gpa is None else device_gpa

    # ---- registers ----

    def configure(self, size: int) -> None:
        """All but QueueReady."""
        write = self.driver.write
        write(MMIO.QUEUE_SEL, self.index)
        write(MMIO.QUEUE_NUM, size)
        for register, gpa in (
            (MMIO.QUEUE_DESC_LOW, self.descriptor_gpa),
            (MMIO.QUEUE_AVAIL_LOW, self.driver_gpa),
            (MMIO.QUEUE_USED_LOW, self.device_gpa),
        ):
            write(register, gpa & 0xFFFFFFFF)
            write(register + 4, gpa >> 32)

    def create(self, size: int) -> None:
        """An empty ring, of which the device knows."""
        self.forget()
        self.size = size
        for gpa, length in (
            (self.descriptor_gpa, 16 * size),
            (self.driver_gpa, 6 + 2 * size),
            (self.device_gpa, 6 + 8 * size),
        ):
            self.driver.poke(gpa, bytes(length))
        self.configure(size)
        self.ready = True
        assert self.ready

    @property
    def ready(self) -> bool:
        self.driver.write(MMIO.QUEUE_SEL, self.index)
        return bool(self.driver.read(MMIO.QUEUE_READY))

    @ready.setter
    def ready(self, value: bool) -> None:
        self.driver.write(MMIO.QUEUE_SEL, self.index)
        self.driver.write(MMIO.QUEUE_READY, value)

    def notify(self) -> None:
        self.driver.write(MMIO.QUEUE_NOTIFY, self.index)

    # ---- the descriptor table and the available ring ----

    def describe(self, index: int, gpa: int, size: int, flags: int = 0, following: int = 0) -> None:
        """An entry of the descriptor table."""
        self.driver.poke(self.descriptor_gpa + 16 * index, descriptor(gpa, size, flags, following))

    def chain(self, *buffers: Buffer) -> int:
        """A chain of them, in the next entries of the table; its head."""
        indices = [(self.next_descriptor + i) % self.size for i in range(len(buffers))]
        self.next_descriptor += len(buffers)
        for index, following, buffer in zip(indices, [*indices[1:], None], buffers, strict=True):
            flags = (DESC.WRITE if buffer.is_writable else 0) | (0 if following is None else DESC.NEXT)
            self.describe(index, buffer.gpa, buffer.size, flags, following or 0)
        return indices[0]

    def offer(self, *heads: int) -> None:
        """Put chains into the available ring."""
        for head in heads:
            self.driver.poke16(self.driver_gpa + 4 + 2 * (self.available % self.size), head)
            self.available = (self.available + 1) % 0x10000
        self.driver.poke16(self.driver_gpa + 2, self.available)

    def send(self, *buffers: Buffer) -> int:
        """One chain of all these buffers, offered and notified; its head."""
        head = self.chain(*buffers)
        self.offer(head)
        self.notify()
        return head

    def wants_no_interrupt(self, value: bool) -> None:
        """Without VIRTIO_F_EVENT_IDX."""
        self.driver.poke16(self.driver_gpa, AVAIL.NO_INTERRUPT if value else 0)

    def set_used_event(self, value: int) -> None:
        self.driver.poke16(self.driver_gpa + 4 + 2 * self.size, value)

    # ---- the used ring ----

    @property
    def used_index(self) -> int:
        return self.driver.peek16(self.device_gpa + 2)

    @property
    def used_flags(self) -> int:
        return self.driver.peek16(self.device_gpa)

    @property
    def avail_event(self) -> int:
        return self.driver.peek16(self.device_gpa + 4 + 8 * self.size)

    def used(self) -> list[Used]:
        """What the device has used since this was last asked."""
        entries = []
        while self.seen != self.used_index:
            entry = self.driver.peek(self.device_gpa + 4 + 8 * (self.seen % self.size), 8)
            entries.append(Used(int.from_bytes(entry[:4], "little"), int.from_bytes(entry[4:], "little")))
            self.seen = (self.seen + 1) % 0x10000
        return entries


def descriptor(gpa: int, size: int, flags: int = 0, following: int = 0) -> bytes:
    """struct vring_desc."""
    numbers = ((gpa, 8), (size, 4), (flags, 2), (following, 2))
    return b"".join(number.to_bytes(width, "little") for number, width in numbers)
