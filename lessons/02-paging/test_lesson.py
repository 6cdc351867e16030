"""The checks of lesson 2: what the page tables say, to KVM and to a walk, at addresses that the host
half chose, and what the guest saw through them."""

import pytest

from kvmlab.events import Event
from kvmlab.expect import expect, fail, require
from kvmlab.random import stream
from kvmlab.runner import Run

PAGE = 4096
LARGE_PAGE = 512 * PAGE
LAZY_PAGES = 64
POOL_END = 8 << 20  # PAGE_POOL_END of guest.h

# enum checkpoint and enum report of plan.h
SMALL, LARGE, SPLIT, REPLACED, PROTECTED, LAZY, CLEAN, REMAPPED, SPACE_A, SPACE_B = CHECKPOINTS = range(1, 11)
AFTER_WHICH = (
    "the small pages are mapped and read",
    "the large page is mapped and read",
    "the large page is split and read again",
    "a page of the split one has a frame of its own",
    "pages have permissions of their own",
    "lazy pages have been written",
    "the accessed and dirty bits are harvested twice",
    "a page has moved to another frame",
    "the first address space has been used",
    "the second address space has been used",
)
(
    SMALL_WORD,
    LARGE_WORD,
    SPLIT_WORD,
    FAULT_ADDRESS,
    FAULT_CODE,
    FAULT_DECODED,
    ATTEMPT,
    STRAY,
    ACCESSED,
    DIRTY,
    BEFORE_REMAP,
    AFTER_REMAP,
    SPACE_A_WORD,
    SPACE_B_WORD,
) = range(1, 15)

PRESENT, WRITE, USER, FETCH = 1, 2, 4, 16  # SDM 3A "Page-Fault Error Code"


@pytest.fixture
def plan(run: Run) -> Event:
    """What the seed asks for (plan.h), as the host half recorded it."""
    return require(run, "the plan of this seed", "plan")


def many(plan: Event, name: str) -> list[int]:
    return [value for field, value in plan.fields.items() if field.rpartition("_")[0] == name]


def word(run: Run, gpa: int) -> int:
    """The word that the host half has put at the start of a frame."""
    return stream(run.seed ^ gpa, 2).next()


def reports(run: Run, what: int) -> list[int]:
    return [event.value for event in run.all("report", what=what)]


def probes(run: Run, checkpoint: int) -> list[Event]:
    what = f"the guest reaches checkpoint {checkpoint}: {AFTER_WHICH[CHECKPOINTS.index(checkpoint)]}"
    require(run, what, "probe", checkpoint=checkpoint)
    return run.all("probe", checkpoint=checkpoint)


def probes_in(run: Run, checkpoint: int, gva: int, size: int = PAGE) -> list[Event]:
    """The host half's looks at [gva, gva + size)."""
    return [probe for probe in probes(run, checkpoint) if gva <= probe.gva < gva + size]


def expect_mapped(run: Run, probe: Event, page_gva: int, page_gpa: int) -> None:
    """The probed address lies in the frame at page_gpa, for KVM and for the walk alike."""
    __tracebackhide__ = True
    expected = page_gpa + probe.gva - page_gva
    what = f"gva {probe.gva:#x} translates to gpa"
    expect(run, what, expected=expected, seen=probe.gpa if probe.mapped else None, near=probe)
    seen = probe.kvm_gpa if probe.kvm_valid else None
    expect(run, what + ", says KVM_TRANSLATE", expected=expected, seen=seen, near=probe)


def expect_permissions(run: Run, probe: Event, what: str, **permissions: int) -> None:
    """What the whole path of entries permits: writable, user, executable."""
    __tracebackhide__ = True
    for name, value in permissions.items():
        expect(run, f"{what} is {name}", expected=bool(value), seen=bool(probe.fields[name]), near=probe)


def expect_unmapped(run: Run, probe: Event) -> None:
    __tracebackhide__ = True
    expect(run, f"gva {probe.gva:#x} is mapped", expected=False, seen=bool(probe.mapped), near=probe)
    expect(run, f"gva {probe.gva:#x} is mapped for KVM", expected=False, seen=bool(probe.kvm_valid), near=probe)


def expect_small_pages(run: Run, plan: Event) -> None:
    """The small pages are there. Where nothing is mapped, what the guest says it saw is worth nothing."""
    __tracebackhide__ = True
    for gva, gpa in zip(many(plan, "small_gva"), many(plan, "small_gpa"), strict=True):
        expect_mapped(run, probes_in(run, SMALL, gva)[0], gva, gpa)


def test_small_pages_translate_to_their_frames(run: Run, plan: Event) -> None:
    for gva, gpa in zip(many(plan, "small_gva"), many(plan, "small_gpa"), strict=True):
        (probe,) = probes_in(run, SMALL, gva)
        expect_mapped(run, probe, gva, gpa)
        expect(run, "the size of the page", expected=PAGE, seen=probe.page_size, near=probe)
        expect_permissions(run, probe, "the page", writable=1, user=0, executable=1)


def test_pages_beside_mapped_ones_stay_unmapped(run: Run, plan: Event) -> None:
    mapped = [gva // PAGE for gva in many(plan, "small_gva")]
    expect_small_pages(run, plan)
    for probe in probes(run, SMALL):
        if probe.gva // PAGE not in mapped:
            expect_unmapped(run, probe)


def test_guest_reads_its_frames_through_the_small_pages(run: Run, plan: Event) -> None:
    expect_small_pages(run, plan)
    expected = [word(run, gpa) for gpa in many(plan, "small_gpa")]
    expect(run, "the first word of each page", expected=expected, seen=reports(run, SMALL_WORD))


def test_large_page_is_one_entry_of_2_mib(run: Run, plan: Event) -> None:
    for probe in probes_in(run, LARGE, plan.large_gva, LARGE_PAGE):
        expect_mapped(run, probe, plan.large_gva, plan.large_gpa)
        expect(run, "the size of the page", expected=LARGE_PAGE, seen=probe.page_size, near=probe)
    for probe in probes_in(run, LARGE, plan.large_gva + LARGE_PAGE):
        expect_unmapped(run, probe)
    expected = [word(run, plan.large_gpa + plan.replaced_page * PAGE)]
    expect(run, "a word inside the large page", expected=expected, seen=reports(run, LARGE_WORD))


def test_split_keeps_every_translation(run: Run, plan: Event) -> None:
    for probe in probes_in(run, SPLIT, plan.large_gva, LARGE_PAGE):
        expect_mapped(run, probe, plan.large_gva, plan.large_gpa)
        expect(run, "the size of the page", expected=PAGE, seen=probe.page_size, near=probe)
        expect_permissions(run, probe, "the page", writable=1, user=0, executable=1)
        what = "bit 7 of its entry, which is PAT at this level and no longer PTE_LARGE"
        expect(run, what, expected=0, seen=probe.entry >> 7 & 1, near=probe)
    expected = word(run, plan.large_gpa + plan.replaced_page * PAGE)
    expect(run, "a word inside, after the split", expected=expected, seen=next(iter(reports(run, SPLIT_WORD)), None))


def test_split_page_gets_a_frame_of_its_own(run: Run, plan: Event) -> None:
    replaced_gva = plan.large_gva + plan.replaced_page * PAGE
    for probe in probes_in(run, REPLACED, plan.large_gva, LARGE_PAGE):
        if probe.gva // PAGE == replaced_gva // PAGE:
            expect_mapped(run, probe, replaced_gva, plan.replaced_gpa)
            expect_permissions(run, probe, "the page with a new frame", writable=1, user=0, executable=1)
        else:
            expect_mapped(run, probe, plan.large_gva, plan.large_gpa)
    expected = [word(run, plan.large_gpa + plan.replaced_page * PAGE), word(run, plan.replaced_gpa)]
    expect(run, "a word inside, before and after", expected=expected, seen=reports(run, SPLIT_WORD))


def attempts(run: Run) -> list[str]:
    """For each access of the permissions stage: did it fault, with which error code?"""
    result = []
    codes: list[int] = []
    for event in run.all("report"):
        if event.what == FAULT_CODE:
            codes.append(event.value)
        elif event.what == ATTEMPT:
            faults = ", ".join(f"page fault {code:#x}" for code in codes) or "no page fault"
            if bool(event.value) != bool(codes):
                faults += ", but another exception" if event.value else ", but then the access was done"
            result.append(faults)
            codes = []
    return result


# The accesses of stage_permissions() in guest.c, in order, and the error code each must give.
ATTEMPTS = [
    ("the kernel reads the read-only page", None),
    ("the kernel writes the read-only page", PRESENT | WRITE),
    ("the kernel reads the no-execute page", None),
    ("the kernel executes the no-execute page", PRESENT | FETCH),
    ("ring 3 reads the user page", None),
    ("ring 3 writes the user page", None),
    ("ring 3 reads the kernel page", PRESENT | USER),
    ("ring 3 writes the kernel page", PRESENT | USER | WRITE),
    ("the kernel reads the page behind, which is not mapped", 0),
    ("ring 3 writes that page", USER | WRITE),
]


def expect_attempts(run: Run, plan: Event, page: str, numbers: range, **permissions: int) -> None:
    """These accesses ended as they must, and the page's entry permits just this."""
    __tracebackhide__ = True
    (probe,) = probes_in(run, PROTECTED, plan.fields[page + "_gva"])
    expect_mapped(run, probe, plan.fields[page + "_gva"], plan.fields[page + "_gpa"])
    expect_permissions(run, probe, f"the {page} page", **permissions)
    seen = attempts(run)
    for number in numbers:
        what, code = ATTEMPTS[number]
        expected = "no page fault" if code is None else f"page fault {code:#x}"
        outcome = seen[number] if number < len(seen) else "the run ended before this access was over"
        expect(run, what, expected=expected, seen=outcome)


def test_read_only_page_refuses_writes(run: Run, plan: Event) -> None:
    expect_attempts(run, plan, "read_only", range(2), writable=0, user=0, executable=1)


def test_no_execute_page_refuses_fetches(run: Run, plan: Event) -> None:
    expect_attempts(run, plan, "no_execute", range(2, 4), writable=1, user=0, executable=0)


def test_ring_3_reaches_user_pages_and_no_others(run: Run, plan: Event) -> None:
    expect_attempts(run, plan, "user", range(4, 6), writable=1, user=1)
    expect_attempts(run, plan, "kernel", range(6, 8), writable=1, user=0)


def test_page_fault_error_codes_are_decoded(run: Run, plan: Event) -> None:
    """All faults of the run, those of the permissions stage among them."""
    expect_small_pages(run, plan)
    codes = reports(run, FAULT_CODE)
    for bit, meaning in {PRESENT: "present", WRITE: "write", USER: "user", FETCH: "fetch"}.items():
        if {code & bit for code in codes} != {0, bit}:
            seen = ", ".join(hex(code) for code in codes) or "no page fault"
            what = f"the error codes of all page faults, for the bit {meaning}"
            fail(run, what, "expected some with and some without", f"seen     {seen}")
    for code, decoded in zip(codes, reports(run, FAULT_DECODED), strict=False):
        expected = code & (PRESENT | WRITE | USER) | (8 if code & FETCH else 0)
        what = f"error code {code:#x} as present 1, write 2, user 4, fetch 8"
        expect(run, what, expected=expected, seen=decoded)


def lazy_faults(run: Run, plan: Event) -> list[int]:
    """The pages of the lazy region that faulted because they were not there, in order, by number."""
    end = plan.lazy_gva + LAZY_PAGES * PAGE
    faults = zip(reports(run, FAULT_ADDRESS), reports(run, FAULT_CODE), strict=False)
    missing = [gva for gva, code in faults if not code & PRESENT]
    return [(gva - plan.lazy_gva) // PAGE for gva in missing if plan.lazy_gva <= gva < end]


def test_lazy_pages_appear_on_their_first_touch(run: Run, plan: Event) -> None:
    touched = list(dict.fromkeys(many(plan, "lazy_touch")))
    expect(run, "the pages that faulted, in order", expected=touched, seen=lazy_faults(run, plan))
    for probe in probes(run, LAZY):
        page = (probe.gva - plan.lazy_gva) // PAGE
        if page not in touched:
            expect_unmapped(run, probe)
        else:
            expect(run, f"lazy page {page} is mapped", expected=True, seen=bool(probe.mapped), near=probe)
            expect_permissions(run, probe, f"lazy page {page}", writable=1, user=0)
            what = f"the frame of lazy page {page} comes from page_alloc()"
            expect(run, what, expected=True, seen=probe.gpa < POOL_END, near=probe)
    frames = [probe.gpa // PAGE for probe in probes(run, LAZY) if probe.mapped]
    what = "the number of different frames behind the lazy pages"
    expect(run, what, expected=str(len(frames)), seen=str(len(set(frames))))


def test_faults_outside_the_lazy_region_are_not_swallowed(run: Run, plan: Event) -> None:
    expect_small_pages(run, plan)
    caught = ["faulted" if report else "was served" for report in reports(run, STRAY)]
    what = "a read behind the region, a read before it, a read by ring 3 of a page in it"
    expect(run, what, expected=["faulted", "faulted", "faulted"], seen=caught)
    outside = [plan.lazy_gva + LAZY_PAGES * PAGE, plan.lazy_gva - 8]
    faulted = [gva for gva in reports(run, FAULT_ADDRESS) if gva in outside]
    expect(run, "the addresses that faulted outside the region", expected=outside, seen=faulted)


def expect_harvest(run: Run, plan: Event, number: int) -> None:
    __tracebackhide__ = True
    expect_small_pages(run, plan)
    reads, writes = many(plan, "read_set")[number], many(plan, "write_set")[number]
    seen = [*reports(run, ACCESSED)[number : number + 1], *reports(run, DIRTY)[number : number + 1]]
    what = f"harvest {number + 1}: pages accessed, pages dirty (bit i: page i)"
    expect(run, what, expected=[reads | writes, writes], seen=seen)


def test_harvest_finds_what_was_read_and_written(run: Run, plan: Event) -> None:
    expect_harvest(run, plan, 0)


def test_second_harvest_finds_only_what_is_new(run: Run, plan: Event) -> None:
    expect_harvest(run, plan, 1)
    for probe in probes(run, CLEAN):
        seen = (probe.accessed, probe.dirty)
        expect(run, "accessed and dirty after a harvest", expected=(0, 0), seen=seen, near=probe)


def test_remapped_page_shows_its_new_frame(run: Run, plan: Event) -> None:
    frames = many(plan, "remap_gpa")
    (probe,) = probes(run, REMAPPED)
    expect_mapped(run, probe, plan.remap_gva, frames[1])
    expect_permissions(run, probe, "the page with a new frame", writable=1, user=0, executable=1)
    expected = [word(run, frame) for frame in frames]
    seen = reports(run, BEFORE_REMAP) + reports(run, AFTER_REMAP)
    expect(run, "the first word of the page, before and after", expected=expected, seen=seen)


def test_one_gva_means_two_gpas_in_two_address_spaces(run: Run, plan: Event) -> None:
    frames = many(plan, "shared_gpa")
    for checkpoint, frame in zip((SPACE_A, SPACE_B), frames, strict=True):
        (probe,) = probes(run, checkpoint)
        expect_mapped(run, probe, plan.shared_gva, frame)
    expected = [word(run, frame) for frame in frames]
    seen = reports(run, SPACE_A_WORD) + reports(run, SPACE_B_WORD)
    expect(run, "the word at one gva, in one space and the other", expected=expected, seen=seen)
