"""A process that has imported kvmlab and pytest already, and becomes `python -m kvmlab` as often as it is asked to,
by forking: to import them takes longer than most runs of a lesson. It also keeps an emulated AMD machine for all of
them, where each would restore one for itself.

A request is a line of JSON with arguments, folder, environment, and the files that output and errors go to; the
answer is a line with the exit status."""

import contextlib
import importlib
import json
import os
import sys
import traceback
from typing import Any

from _pytest.config import default_plugins

from kvmlab import __main__ as kvmlab
from kvmlab import engine, judge, runner

IMPORTED = [judge, runner, *(importlib.import_module(f"_pytest.{plugin}") for plugin in default_plugins)]


def become_kvmlab(request: dict[str, Any]) -> int:
    """In the child: what a shell does before it starts a command, and then the command."""
    write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    opened = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], write), os.open(request["errors"], write)
    for number, file in enumerate(opened):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["kvmlab", *request["arguments"]]
    try:
        return kvmlab.main()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    with contextlib.ExitStack() as closing:
        for line in sys.stdin:
            request = json.loads(line)
            if "--engine=svm" in request["arguments"] and engine.SHARED_SVM not in os.environ:
                closing.enter_context(engine.one_svm())
            if shared := os.environ.get(engine.SHARED_SVM):
                request["environment"][engine.SHARED_SVM] = shared
            child = os.fork()
            if child == 0:
                os._exit(become_kvmlab(request))
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
