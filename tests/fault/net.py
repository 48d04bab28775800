"""A network of two hosts and a coordinator, in network namespaces that end with this program.

::

    host "a" ---- 10.77.0.1 -- data, questions -- 10.77.0.2 ---- host "b"
       |                                                            |
    10.77.1.2 ------- 10.77.1.1  coordinator "c"  10.77.2.1 ----- 10.77.2.2

A namespace lives as long as a process in it: a holder that ends with its standard input, so that nothing is left even
where this program is killed.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Self

CONTROL_PORT = 7001
QUESTION_PORT = 7002
DATA_ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}
CONTROL_ADDRESS = {"a": "10.77.1.2", "b": "10.77.2.2"}
NOBODYS_ADDRESS = "10.77.0.9"

_LINKS = (
    ("a", "data", "10.77.0.1/24", "b", "data", "10.77.0.2/24"),
    ("c", "to-a", "10.77.1.1/24", "a", "control", "10.77.1.2/24"),
    ("c", "to-b", "10.77.2.1/24", "b", "control", "10.77.2.2/24"),
)
_VERDICTS = {
    "silent": "-j DROP",
    # A reset that is itself reset would never arrive.
    "reset": "-p tcp ! --tcp-flags RST RST -j REJECT --reject-with tcp-reset",
}
_STEP_S = 20.0


def missing() -> str | None:
    """What this machine lacks for the network, or None."""
    for program in ("ip", "iptables-restore", "nsenter", "unshare"):
        if shutil.which(program) is None:
            return f"the program {program}"
    tried = subprocess.run(
        ["unshare", "--net", "iptables-restore"],
        input="*filter\n-A INPUT " + _VERDICTS["reset"] + "\nCOMMIT\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=_STEP_S,
    )
    return None if tried.returncode == 0 else f"the right to make network namespaces ({tried.stderr.strip()})"


class Network:
    """The three namespaces, for the length of a ``with`` block."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._holders = {place: stack.enter_context(_Holder()) for place in "abc"}
            self._lay()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def inside(self, place: str, argv: list[str]) -> list[str]:
        """The command line that runs a program in one of the three places."""
        return ["nsenter", f"--net=/proc/{self._holders[place].process.pid}/ns/net", "--", *argv]

    def _lay(self) -> None:
        for one, name, address, other, other_name, other_address in _LINKS:
            pids = [str(self._holders[place].process.pid) for place in (one, other)]
            _run(
                [
                    *("ip", "link", "add", name, "netns", pids[0], "type", "veth"),
                    *("peer", "name", other_name, "netns", pids[1]),
                ]
            )
            for place, link, at in ((one, name, address), (other, other_name, other_address)):
                _run(
                    self.inside(place, ["ip", "-batch", "-"]),
                    f"addr add {at} dev {link}\nlink set {link} up\nlink set lo up\n",
                )

    def cut(self, connection: str, how: str) -> None:
        """Cut a connection at both ends.

        :param connection: ``data`` is the migration stream; ``coordinator`` is what the coordinator and the hosts say
            to each other; ``control`` is that, and the questions that the hosts have for each other.
        :param how: ``silent`` or ``reset``.
        """
        verdict = _VERDICTS[how]
        questions = [f"-A INPUT -i data -p tcp --{port} {QUESTION_PORT}" for port in ("sport", "dport")]
        if connection == "data":
            rules = [f"{question} -j ACCEPT" for question in questions] + [f"-A INPUT -i data {verdict}"]
        else:
            rules = [f"-A INPUT -i control {verdict}"]
            if connection == "control":
                rules += [f"{question} {verdict.removeprefix('-p tcp ')}" for question in questions]
            self._filter("c", [f"-A INPUT -i to+ {verdict}"])
        for place in "ab":
            self._filter(place, rules)

    def heal(self) -> None:
        """Take every cut back."""
        for place in "abc":
            self._filter(place, [])

    def _filter(self, place: str, rules: list[str]) -> None:
        _run(self.inside(place, ["iptables-restore"]), "\n".join(["*filter", *rules, "COMMIT", ""]))


class _Holder:
    """A process in a new network namespace, for the length of a ``with`` block."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            if not _pipe(self.process.stdout).readline():
                raise OSError("no network namespace could be made")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _pipe(self.process.stdin).close()
        self.process.wait()
        _pipe(self.process.stdout).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _run(argv: list[str], told: str = "") -> None:
    done = subprocess.run(argv, input=told, capture_output=True, text=True, check=False, timeout=_STEP_S)
    if done.returncode:
        raise OSError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
