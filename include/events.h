/*
 * The event record: what `vmm --events FILE` writes, and the only thing that checks, grader and
 * timeline read. JSON Lines: one JSON object a line, each with
 *
 *   seq    number of the event, from 0, without gaps
 *   ns     nanoseconds since the VMM started, CLOCK_MONOTONIC
 *   kind   one of the kinds below, or a kind of the lesson's host half
 *
 * Addresses and values are strings "0x..." (JSON numbers end at 2^53); counts and flags (0, 1) are
 * numbers. A reader ignores fields it does not know; a field that changes its meaning changes
 * EVENTS_VERSION.
 *
 *   start     version, image, seed, memory_mib, irqchip
 *   exit      KVM_RUN returned. exit: its number, from 1; rip, symbol ("name+0x1a"; "" if the image
 *             has none there); reason: KVM_EXIT_* without the prefix ("?" if the VMM does not know
 *             it), reason_number; if_flag; guest_ns: time in KVM_RUN, vmm_ns: time that the VMM
 *             spent on the exit before this one; and by reason:
 *     IO      port, is_write, size, count, data (hex of size * count bytes, as seen by the guest
 *             after the access), device (absent if none claims it)
 *     MMIO    gpa, is_write, size, data, device
 *             Of both: the rip of a write may be that of the instruction or of the next one. What a read
 *             gave is known only when it has been served: events that a device adds while it serves
 *             a read stand before the exit, those of a write behind it.
 *     MEMORY_FAULT
 *             KVM_RUN has failed, since the host has no memory behind a slot. gpa (absent where KVM does
 *             not say)
 *   slot      the host half sets a memory slot: slot, gpa, size (0x0: it is removed), flags (KVM_MEM_*)
 *   route     the host half lets a GSI stand for a message (KVM_SET_GSI_ROUTING, KVM_IRQ_ROUTING_MSI):
 *             gsi, address, data
 *   inject    the host half puts an event into the guest: type ("interrupt", "nmi", "exception"), vector,
 *             error_code (absent if there is none); and of the last exit rip, symbol, if_flag, ready
 *             (kvm_run's ready_for_interrupt_injection, which says nothing of a local APIC in the kernel)
 *   entry     KVM_RUN is about to be called, on a machine whose host half has before_entry. entry: the
 *             number of the exit that will end it; of the last exit if_flag, ready; window: an interrupt
 *             window is requested; what the guest takes with it: the vectors exception, interrupt (absent
 *             if there is none), and nmi_injected, nmi_pending, nmi_masked as KVM_GET_VCPU_EVENTS has them
 *   virtio_status
 *             the driver has written the status register. device: its name; status: as it reads from now on
 *   virtio_queue
 *             a queue is ready: device, queue (its number), size, descriptor_gpa, driver_gpa, device_gpa
 *   virtio_notify
 *             the driver notifies: device, queue, by ("exit", "ioeventfd")
 *   virtio_chain
 *             the VMM's own virtio device has used a chain: device, queue, head, readable and writable (bytes
 *             that it has), written (bytes that the device says it has written)
 *   virtio_interrupt
 *             a virtio device interrupts: device, cause ("used", "config")
 *   virtio_misuse
 *             the driver has done what it must not: device, queue (absent if it is about none), what (in a
 *             line), is_broken: the device needs a reset now
 *   unknown   an access that no device claims: space ("port" or "gpa"), address, is_write, size
 *   panic     the guest gave up: reason ("exception", "message", "todo", "cannot", "?" if there is no
 *             panic where it says), message, location; of an exception vector, error_code, cr2, rip, symbol
 *   cannot    this machine lacks what the lesson needs, says the host half: message
 *   triple_fault
 *             rip, symbol; vector, error_code and cr2 of the first fault, and injected: the host half
 *             has put it there. What could not be found out is absent.
 *   emulation_failure
 *             rip, symbol, bytes: those at rip
 *   hang      rip, symbol
 *   statistics
 *             KVM's own counters. when: "end" for the one that stands at the end of each run, or what a host
 *             half calls the moment; and a number for each counter, by KVM's name for it (exits, io_exits,
 *             pf_taken, tlb_flush, invlpg, pages_4k, ...; arch/x86/include/asm/kvm_host.h, struct
 *             kvm_vcpu_stat and struct kvm_vm_stat). They count from the VM's creation on; those of 4 KiB
 *             pages and the like say what there is now. Without KVM_GET_STATS_FD there is only when.
 *   end       the last one: status (of the VMM), how ("exit", "halt", "panic", "todo", "cannot",
 *             "triple fault", "emulation failure", "unknown access", "unknown exit", "time limit",
 *             "signal", "host failure"), exits, guest_ns, vmm_ns
 *
 *   trace     a line of KVM's own trace, put in by kvmlab where KTRACE=1 or the lesson asks for it: point (name of
 *             the tracepoint), reason (where it has one), text (what it says). All that KVM did up to
 *             an exit stands before that exit; ns is reckoned back from it.
 *
 * A record without an `end` event is of a VMM that was killed. Of a record longer than 16 MiB kvmlab
 * keeps the beginning and the last 256 KiB.
 */
#pragma once

#define EVENTS_VERSION 1
