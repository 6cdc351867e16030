"""How far a long command is: a bar on a terminal, a line for each step elsewhere."""

import shutil
import sys

BAR = 30


class Progress:
    """Of so many steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._terminal = sys.stdout.isatty()

    def step(self, said: str) -> None:
        self._done += 1
        if not self._terminal:
            print(f"[{self._done}/{self._steps}] {said}", flush=True)
            return
        filled = BAR * self._done // self._steps
        line = f"[{'#' * filled}{' ' * (BAR - filled)}] {self._done}/{self._steps} {said}"
        print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def close(self) -> None:
        if self._terminal and self._done:
            print(flush=True)
