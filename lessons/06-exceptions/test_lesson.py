"""The checks of lesson 6: what was injected, what the CPU pushed, and where the guest went on."""

import re

from kvmlab.events import Event
from kvmlab.expect import expect, fail, require
from kvmlab.runner import Run

# SDM 3A "Exception and Interrupt Reference". 2, 9 and 15 are no exceptions, or not any more; 18 tells
# of a broken machine.
NAMES = {
    0: "#DE",
    1: "#DB",
    3: "#BP",
    4: "#OF",
    5: "#BR",
    6: "#UD",
    7: "#NM",
    8: "#DF",
    10: "#TS",
    11: "#NP",
    12: "#SS",
    13: "#GP",
    14: "#PF",
    16: "#MF",
    17: "#AC",
    19: "#XM",
}
DB, DF, PF = 1, 8, 14
SOFTWARE = {3, 4}
WITH_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17}
CONTRIBUTORY = {0, 10, 11, 12, 13}
DR6_SINGLE_STEP = 1 << 14
DR6_CLEAR = 0xFFFF0FF0

SINGLE, IN_NMI, PAIR, BROKEN, LAST = range(5)  # enum stage of lab.h
RETRY, EMULATE = range(2)  # enum remedy


def name(vector: int) -> str:
    return NAMES.get(vector, f"vector {vector}")


def information(vector: int) -> int:
    """SDM 3C "VM-Entry Controls for Event Injection"."""
    return vector | (6 if vector in SOFTWARE else 3) << 8 | (vector in WITH_ERROR_CODE) << 11 | 1 << 31


def combined(first: int, second: int) -> str:
    """SDM 3A "Interrupt 8—Double Fault Exception (#DF)"."""
    serious = CONTRIBUTORY | {PF}
    if first == DF:
        return "triple fault" if second in serious else "second"
    if (first in CONTRIBUTORY and second in CONTRIBUTORY) or (first == PF and second in serious):
        return "double fault"
    return "second"


def plans(run: Run, *stages: int) -> list[Event]:
    """What the seed asks for in the rounds of these stages."""
    return [plan for plan in run.all("plan") if plan.stage in stages]


def expected_order(plan: Event) -> tuple[int, int | None, int]:
    """What must be injected in a round: vector, error code if it has one, payload."""
    vector, code, payload = plan.vector, plan.error_code, plan.payload
    if plan.stage == PAIR and combined(plan.vector, plan.second) == "double fault":
        vector, code, payload = DF, 0, 0
    elif plan.stage == PAIR:
        vector, code, payload = plan.second, plan.second_error_code, plan.second_payload
    return vector, code if vector in WITH_ERROR_CODE else None, payload


def about(plan: Event) -> str:
    return f"round {plan.round}, {name(expected_order(plan)[0])}"


def order(run: Run, plan: Event) -> Event:
    return require(run, f"{about(plan)}: the guest halts for it", "order", round=plan.round)


def injection(run: Run, plan: Event) -> Event:
    """The one exception that was injected in this round, and that no CPU would refuse."""
    __tracebackhide__ = True
    begin = order(run, plan)
    injected = []
    for event in run.events[run.events.index(begin) :]:
        if event.kind == "entry":
            break
        if event.kind == "inject" and event.type == "exception":
            injected.append(event)
    what = f"{about(plan)}: how many exceptions were injected between the halt and the next entry"
    expect(run, what, expected="1", seen=str(len(injected)), near=begin)
    refused = run.one("refused", round=plan.round)
    if refused:
        what = f"{about(plan)}: an Intel CPU refuses to enter with what KVM was told: {refused.why}"
        fail(run, what, "so it was taken back", near=refused)
    return injected[0]


def entry(run: Run, plan: Event) -> Event:
    """The entry that takes this round's exception into the guest."""
    __tracebackhide__ = True
    injected = injection(run, plan)
    found = next((event for event in run.events[run.events.index(injected) :] if event.kind == "entry"), None)
    if not found:
        fail(run, f"{about(plan)}: the guest is entered with it", "expected an entry", "seen     none", near=injected)
    if found.get("exception") is None:
        what = f"{about(plan)}: the ioctl was called, but KVM has no exception to deliver at the entry behind it"
        fail(run, what, "KVM takes exception.injected; pending alone does nothing here", near=found)
    return found


def frame(run: Run, plan: Event) -> Event:
    """What this round's exception has left in the guest's memory, before its handler went on."""
    __tracebackhide__ = True
    entered = entry(run, plan)
    frames = run.all("frame", round=plan.round)
    what = f"{about(plan)}: how many exceptions reached a handler of the guest"
    expect(run, what, expected="1", seen=str(len(frames)), near=frames[-1] if frames else entered)
    return frames[0]


def told(word: int) -> str:
    """A word and its fields."""
    fields = f"vector {word & 0xFF}, type {word >> 8 & 7}"
    fields += ", error code" * (word >> 11 & 1) + ", valid" * (word >> 31 & 1)
    fields += f", reserved bits {word & 0x7FFFF000:#x}" * bool(word & 0x7FFFF000)
    return f"{word:#010x} ({fields})"


def test_information_word_has_vector_type_and_error_code_bit(run: Run) -> None:
    for vector in NAMES:
        word = require(run, f"the word for {name(vector)}", "word", vector=vector)
        what = f"the interruption information for {name(vector)}, vector {vector}"
        expect(run, what, expected=told(information(vector)), seen=told(word.information), near=word)


def test_each_order_is_injected_once(run: Run) -> None:
    for plan in plans(run, SINGLE, IN_NMI):
        injected = injection(run, plan)
        expect(run, f"{about(plan)}: the vector injected", expected=plan.vector, seen=injected.vector, near=injected)
        entry(run, plan)


def test_error_codes_are_delivered_where_the_vector_has_one(run: Run) -> None:
    for plan in plans(run, SINGLE, IN_NMI):
        injected = injection(run, plan)
        seen = injected.get("error_code")
        what = f"{about(plan)}: the error code injected (None: none is pushed)"
        expect(run, what, expected=expected_order(plan)[1], seen=seen, near=injected)


def test_handlers_find_vector_and_error_code_on_the_stack(run: Run) -> None:
    for plan in plans(run, SINGLE, IN_NMI):
        caught = frame(run, plan)
        vector, code, _ = expected_order(plan)
        expect(run, f"{about(plan)}: the vector that arrived", expected=vector, seen=caught.vector, near=caught)
        expect(run, f"{about(plan)}: the error code there", expected=code or 0, seen=caught.error_code, near=caught)


def test_page_faults_come_with_their_address_in_cr2(run: Run) -> None:
    for plan in plans(run, SINGLE):
        if plan.vector == PF:
            caught = frame(run, plan)
            expect(run, f"{about(plan)}: CR2 in the handler", expected=plan.payload, seen=caught.cr2, near=caught)


def test_other_exceptions_leave_cr2_alone(run: Run) -> None:
    cr2 = 0
    for plan in plans(run, SINGLE):
        caught = frame(run, plan)
        cr2 = plan.payload if plan.vector == PF else cr2
        what = f"{about(plan)}: CR2 in the handler, as the last page fault left it"
        expect(run, what, expected=cr2, seen=caught.cr2, near=caught)


def test_debug_exceptions_say_in_dr6_why_they_came(run: Run) -> None:
    for plan in plans(run, SINGLE):
        caught = frame(run, plan)
        expected = DR6_CLEAR | (DR6_SINGLE_STEP if plan.vector == DB else 0)
        what = f"{about(plan)}: DR6 in the handler, where a single step is bit 14"
        expect(run, what, expected=expected, seen=caught.dr6, near=caught)


def test_pushed_rip_is_that_of_the_entry(run: Run) -> None:
    for plan in plans(run, SINGLE, IN_NMI):
        caught = frame(run, plan)
        injected = injection(run, plan)
        expect(run, f"{about(plan)}: the rsp pushed", expected=plan.stack, seen=caught.rsp, near=caught)
        what = f"{about(plan)}: the rip pushed, where the guest had stopped"
        expect(run, what, expected=injected.rip, seen=caught.rip, near=caught)


def expect_one_effect(run: Run, plan: Event, why: str) -> None:
    """The instruction after the halt has added its number to its cell once, whoever did it."""
    __tracebackhide__ = True
    caught = frame(run, plan)
    done = require(run, f"{about(plan)}: the guest goes on after its handler", "done", round=plan.round)
    times, rest = divmod(done.cell, plan.addend)
    seen = f"{times} times" if not rest else f"{done.cell:#x}, which is no multiple"
    what = f"{about(plan)}: how often {plan.addend:#x} was added to its cell: {why}"
    expect(run, what, expected="1 times", seen=seen, near=caught)


def test_instruction_is_executed_again_when_the_cause_is_gone(run: Run) -> None:
    for plan in plans(run, SINGLE, IN_NMI):
        if plan.vector != DB and plan.remedy == RETRY:
            expect_one_effect(run, plan, "by the CPU, on the second try")


def test_emulated_instruction_is_not_executed_again(run: Run) -> None:
    for plan in plans(run, SINGLE):
        if plan.vector != DB and plan.remedy == EMULATE:
            expect_one_effect(run, plan, "by the handler, so that the CPU must not")


def test_instruction_behind_a_trap_is_executed(run: Run) -> None:
    for plan in plans(run, SINGLE):
        if plan.vector == DB:
            expect_one_effect(run, plan, "by the CPU, which had not got there when the trap came")


def test_injection_leaves_the_state_of_nmis_alone(run: Run) -> None:
    for plan in plans(run, IN_NMI):
        before = [event for event in run.events[: run.events.index(order(run, plan))] if event.kind == "entry"][-1]
        what = "NMIs are masked before the injection: the guest is in the handler of one"
        expect(run, what, expected=1, seen=before.nmi_masked, near=before)
        after = entry(run, plan)
        what = f"{about(plan)}: NMIs are still masked at the entry that brings it"
        expect(run, what, expected=1, seen=after.nmi_masked, near=after)


def words_in_trace(run: Run, plan: Event) -> list[tuple[int, int | None]]:
    """What the CPU was delivering when this round's delivery was cut short, in the CPU's own words: IDT-vectoring
    information (Intel), EXITINTINFO with its error code (AMD)."""
    __tracebackhide__ = True
    entered = entry(run, plan)
    words: list[tuple[int, int | None]] = []
    for event in run.events[run.events.index(entered) :]:
        if event.kind == "exit":
            break
        if event.kind != "trace" or event.point != "kvm_exit":
            continue
        if intel := re.search(r"reason EPT_VIOLATION .* info2 0x([0-9a-f]+)", event.text):
            words.append((int(intel[1], 16), None))
        elif amd := re.search(r"reason npf .* intr_info 0x([0-9a-f]+) error_code 0x([0-9a-f]+)", event.text):
            words.append((int(amd[1], 16), int(amd[2], 16)))
    return [word for word in words if word[0] >> 31]


def test_cpu_was_given_the_same_word(run: Run) -> None:
    for plan in plans(run, SINGLE, IN_NMI):
        ordered, injected = order(run, plan), injection(run, plan)
        what = f"{about(plan)}: the interruption information for it"
        expect(run, what, expected=told(information(injected.vector)), seen=told(ordered.information), near=ordered)
        entry(run, plan)
        if not run.all("trace"):  # this engine has no tracepoints
            continue
        words = words_in_trace(run, plan)
        if not words:
            fail(run, f"{about(plan)}: KVM's trace shows no delivery that was cut short", near=injected)
        what = f"{about(plan)}: the word that the CPU gave back when the push met no memory"
        expect(run, what, expected=told(words[0][0]), seen=told(ordered.information), near=ordered)
        if words[0][1] is not None:
            what = f"{about(plan)}: the error code that stands above it in EXITINTINFO"
            expect(run, what, expected=injected.get("error_code", 0), seen=words[0][1], near=injected)


def test_two_exceptions_become_what_the_manual_says(run: Run) -> None:
    outcomes = {"s": "second", "d": "double fault", "t": "triple fault"}
    for first in NAMES:
        row = require(run, f"what a second exception makes of {name(first)}", "table", first=first)
        for second in NAMES.keys() - {DF}:
            what = f"{name(second)} during the delivery of {name(first)} becomes"
            seen = outcomes.get(row.row[second])
            expect(run, what, expected=combined(first, second), seen=seen, near=row)


def test_pair_is_injected_as_one_exception(run: Run) -> None:
    for plan in plans(run, PAIR):
        pair = require(run, f"round {plan.round}: the guest halts for a pair", "pair", round=plan.round)
        what = f"round {plan.round}: {name(plan.second)} during the delivery of {name(plan.vector)} becomes"
        expect(run, what, expected=combined(plan.vector, plan.second), seen=pair.becomes, near=pair)
        injected, caught = injection(run, plan), frame(run, plan)
        vector, code, payload = expected_order(plan)
        seen = (injected.vector, injected.get("error_code"))
        what = f"round {plan.round}: vector and error code injected"
        expect(run, what, expected=(vector, code), seen=seen, near=injected)
        seen = (caught.vector, caught.error_code)
        expect(run, f"round {plan.round}: what arrived", expected=(vector, code or 0), seen=seen, near=caught)
        if vector == PF:
            expect(run, f"{about(plan)}: CR2 in the handler", expected=payload, seen=caught.cr2, near=caught)


def test_cpu_makes_the_same_of_two_exceptions(run: Run) -> None:
    """Exact on vmx only; the others are in tests/deviations.toml (fault-while-injecting-...)."""
    for plan in plans(run, BROKEN):
        pair = require(run, f"round {plan.round}: the guest halts for it", "pair", round=plan.round)
        outcome = combined(plan.vector, plan.second)
        what = f"round {plan.round}: {name(plan.second)} during the delivery of {name(plan.vector)} becomes"
        expect(run, what, expected=outcome, seen=pair.becomes, near=pair)
        caught = frame(run, plan)
        injected = injection(run, plan)
        expect(run, f"{about(plan)}: the vector injected", expected=plan.vector, seen=injected.vector, near=injected)
        if run.engine == "vmx":
            vector = DF if outcome == "double fault" else plan.second
            expect(run, f"{what} in the CPU", expected=name(vector), seen=name(caught.vector), near=caught)


def test_last_exception_shuts_the_cpu_down(run: Run) -> None:
    (plan,) = plans(run, LAST)
    entered = entry(run, plan)
    injected = injection(run, plan)
    vector, code, _ = expected_order(plan)
    seen = (injected.vector, injected.get("error_code"))
    expect(run, "vector and error code of the last injection", expected=(vector, code), seen=seen, near=injected)
    last = run.all("exit")[-1]
    expect(run, "the exit behind the last injection", expected="SHUTDOWN", seen=last.reason, near=last)
    expect(run, "its number", expected=entered.entry, seen=last.exit, near=last)
    fault = require(run, "the post-mortem of a triple fault", "triple_fault")
    if fault.get("vector") is not None:  # a CPU that is reset at shutdown has forgotten it
        expect(run, "what it began with", expected=vector, seen=fault.vector, near=fault)
