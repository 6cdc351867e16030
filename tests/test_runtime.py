"""The runtime that every guest links: printf, parameters, random numbers, pages, traps, ring 3."""

import pytest
from support import Guest

from kvmlab import runner
from kvmlab.random import Random, stream
from kvmlab.runner import Run


def runtime(guest: Guest, case: str, *options: str, words: str = "", seed: int = 0) -> Run:
    return runner.run(guest("runtime"), [f"--append={words} case={case}", *options], seed=seed, time_limit=20)


def lines(run: Run) -> list[str]:
    assert (run.status, run.errors) == (0, "")
    return run.output.splitlines()


def test_printf_knows_every_conversion_of_its_header(guest: Guest) -> None:
    assert lines(runtime(guest, "print_all")) == [
        "0 42 -42 -2147483648",
        "1234567890123 -1 -9223372036854775808",
        "0 4294967295 18446744073709551615",
        "0 deadbeef 123456789abcdef",
        "[0000beef] [000000000000beef] [0007] [00042] [12345]",
        "[0x1000] [0x0]",
        "[text] [] [a\ufffd]",
        "100%",
    ]


def test_printf_survives_what_it_does_not_know(guest: Guest) -> None:
    assert lines(runtime(guest, "print_odd_formats")) == ["[q]", "[(null)]", "end "]


def test_a_parameter_is_the_text_behind_the_whole_word(guest: Guest) -> None:
    words = "ab=1 a=2 xb=9   b==3 empty= flag path=/a/b,c none_such=4 last=" + "5" * 70
    assert lines(runtime(guest, "print_parameters", words=words)) == [
        "a 1 [2]",
        "ab 1 [1]",
        "b 1 [=3]",
        "empty 1 []",
        "flag 0 []",
        "path 1 [/a/b,c]",
        f"last 1 [{'5' * 63}]",
        "none 0 []",
        " 0 []",
        "cut 1 [/a/]",
        "cut 1 []",
    ]


def test_the_first_of_two_equal_words_counts(guest: Guest) -> None:
    """So --append cannot change the seed that --seed has put in front."""
    run = runner.run(guest("hello"), ["--append=seed=99"], seed=7)
    assert run.output.startswith("hello from seed 7 ")


@pytest.mark.parametrize("seed", [0, 1, 7, 1 << 63, (1 << 64) - 1, 0x123456789ABCDEF0])
def test_guest_and_tests_make_the_same_random_numbers_of_a_seed(seed: int, guest: Guest) -> None:
    same, first, second = Random(seed), stream(seed, 0), stream(seed, (1 << 64) - 1)
    expected = []
    for _ in range(4):
        numbers = [f"{random.next():x}" for random in (same, first, second)]
        expected.append(" ".join([*numbers, str(first.below(1000003))]))
    assert lines(runtime(guest, "print_random", seed=seed)) == expected


def test_the_random_numbers_are_splitmix64() -> None:
    """Vigna's reference implementation, splitmix64.c, gives these for the state 1234567."""
    random = Random(1234567)
    assert [random.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_memory_functions_do_what_their_names_say(guest: Guest) -> None:
    assert lines(runtime(guest, "use_memory")) == ["memcpy 1 memcmp 1 1 0 strlen 0 4"]


def test_pages_are_whole_zeroed_and_apart(guest: Guest) -> None:
    assert lines(runtime(guest, "use_pages")) == ["aligned 0 apart 4096 zeroed 1"]


@pytest.mark.parametrize("memory", ["--memory=2", "--memory=16"])
def test_a_loop_that_allocates_ends_with_a_panic(memory: str, guest: Guest) -> None:
    run = runtime(guest, "use_all_pages", memory)
    assert run.status == 3
    assert "page_alloc: no page is left" in run.errors
    assert "(use_all_pages+0x" in run.errors


def test_a_new_address_space_holds_the_kernel_and_nothing_else(guest: Guest) -> None:
    assert lines(runtime(guest, "use_address_space")) == ["switched 1 others 0"]


# ---- traps ----


def test_trap_try_tells_what_it_caught_in_ring_0(guest: Guest) -> None:
    assert lines(runtime(guest, "try_in_ring_0")) == [
        "read: vector 14, error code 0, ring 0",
        "cr2 1",
        "nothing: nothing",
        "undefined: vector 6, error code 0, ring 0",
        "divide by 0: vector 0, error code 0, ring 0",
        "divide by 1: nothing",
    ]


def test_an_exception_after_trap_try_is_unhandled(guest: Guest) -> None:
    run = runtime(guest, "try_and_then_fail")
    assert (run.status, run.output) == (3, "tried\n")
    assert "unhandled exception #UD" in run.errors


def test_trap_try_leaves_interrupts_as_they_were(guest: Guest) -> None:
    assert lines(runtime(guest, "try_with_interrupts_on")) == ["interrupts 1", "interrupts 0"]


def test_ring_3_runs_returns_and_is_held_back(guest: Guest) -> None:
    assert lines(runtime(guest, "try_in_ring_3")) == [
        "double 2468acf12",
        "ring 3",
        "kernel page: vector 14, error code 5, ring 3",
        "own page: nothing",
        "hlt: vector 13, error code 0, ring 3",
        "double 2a",
    ]


def test_ring_3_returns_with_interrupts_as_they_were(guest: Guest) -> None:
    assert lines(runtime(guest, "return_from_ring_3")) == ["interrupts 0", "interrupts 1"]


def test_cpuid_says_who_runs_the_machine(guest: Guest) -> None:
    (line,) = lines(runtime(guest, "print_cpuid"))
    assert line == "hypervisor 1 name kvmlab last 40000000 apic id 0"


def test_a_handler_may_go_on_refuse_or_be_taken_away(guest: Guest) -> None:
    assert lines(runtime(guest, "handle_and_go_on")) == [
        "registers 1 2 3 4 5 6 8 9 77 11 12 13 14 15 DF 1",
        "refused: vector 6, error code 0, ring 0",
        "unhandled: vector 6, error code 0, ring 0",
    ]


@pytest.mark.parametrize("irqchip", ["split", "kernel"])
def test_an_nmi_runs_on_a_stack_of_its_own_and_returns(irqchip: str, guest: Guest) -> None:
    assert lines(runtime(guest, "take_nmi", f"--irqchip={irqchip}")) == ["vector 2 own stack 1", "and on"]


def test_an_nmi_runs_on_the_stack_that_the_guest_chooses(guest: Guest) -> None:
    assert lines(runtime(guest, "move_nmi_stack", "--irqchip=kernel")) == ["moved 1 says so 1 moved back 1"]


def test_trap_try_does_not_catch_an_nmi(guest: Guest) -> None:
    run = runtime(guest, "try_nmi", "--irqchip=kernel")
    assert (run.status, run.output) == (3, "")
    assert "NMI" in run.errors.partition("\n")[0]


def test_a_double_fault_runs_on_a_stack_of_its_own(guest: Guest) -> None:
    assert lines(runtime(guest, "take_double_fault")) == ["vector 8 own stack 1"]


def test_other_exceptions_run_on_the_current_stack(guest: Guest) -> None:
    assert lines(runtime(guest, "take_undefined")) == ["vector 6 own stack 0"]
