"""What a student tree needs of git: one commit, made by `make handout`, to go back to."""

import os
import subprocess
from pathlib import Path


class GitError(Exception):
    """Git is not there, or does not do it: one line."""


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Git in this folder's own repository, with these variables of git's."""
    # A hook that calls us has set some, too, and they name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # Otherwise a tree of somebody else's is refused (that of root in a container, one on a volume of a cluster). Who
    # asks has run this program from it.
    command = ["git", "-C", str(folder), "-c", f"safe.directory={folder.resolve()}", *arguments]
    try:
        return subprocess.run(command, capture_output=True, env=environment | variables, check=False)
    except FileNotFoundError:
        raise GitError("there is no git on this machine (Debian: apt-get install git)") from None


def git(folder: Path, *arguments: str) -> str:
    """What git says, in this folder's own repository."""
    done = run(folder, *arguments)
    output, errors = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    if done.returncode:
        said = (errors.strip() or output.strip()).splitlines()
        raise GitError(f"git {arguments[0]}: {said[0] if said else f'status {done.returncode}'}")
    return output


def commit_all(folder: Path, subject: str) -> None:
    """Make this folder a repository, with all its files in one commit; whatever the user's git is set up to do."""
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "-c", "core.autocrlf=false", "add", "--all", "--force")
    who = ["-c", "user.name=kvmlab", "-c", "user.email=kvmlab@localhost"]
    settings = ["-c", "commit.gpgSign=false", "-c", "core.hooksPath=/dev/null"]
    git(folder, *who, *settings, "commit", "--quiet", f"--message={subject}")


def first_version(folder: Path, path: Path) -> str:
    """The text of a file as git has got it first; "" if git has never had it."""
    commits = git(folder, "log", "--diff-filter=A", "--format=%H", "--", str(path)).split()
    return git(folder, "show", f"{commits[-1]}:./{path}") if commits else ""
