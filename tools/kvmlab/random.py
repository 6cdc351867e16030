"""The numbers that a seed becomes: the mirror of include/random.h."""

_MASK = (1 << 64) - 1


class Random:
    """SplitMix64, as in include/random.h."""

    def __init__(self, state: int) -> None:
        self.state = state

    def next(self) -> int:
        """A 64-bit number."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def below(self, bound: int) -> int:
        """A number from 0 to bound - 1."""
        return self.next() % bound


def stream(seed: int, number: int) -> Random:
    """The sequence that random_stream(seed, number) starts in C."""
    return Random(seed ^ Random(number).next())
