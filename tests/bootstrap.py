"""Set up what a target of the Makefile needs, on a fresh Debian or Ubuntu machine with python3, git and make.

::

    python3 tests/bootstrap.py demo | test | bench | check | docs      set up one stage
    python3 tests/bootstrap.py pins                                    rewrite tests/constraints.txt (needs uv)

Rules
=====
1. Nothing runs when all is there: a second call costs the start of Python and a few reads.
2. Nothing half done is believed: ``.venv/ferryman-setup.json`` is removed before ``.venv`` is touched and
   written when it is complete; a ``.venv`` without it is replaced.  The kernel appears by one rename.
3. As root, missing system packages are installed; as anybody else, the one command that does so is printed.

What goes where: ``.venv`` holds the Python packages, pinned by tests/constraints.txt, and the distributions of
this tree, editable; ``.cache/kernel/`` the guests' kernel and its modules.  Both folders may be removed at any time.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "bootstrap: Ferryman needs Python 3.11 or newer, and {} is {}.{}.{}: name another one, as in\n"
        "bootstrap:     make PYTHON=python3.12 demo".format(sys.executable, *sys.version_info[:3])
    )

import argparse
import fcntl
import hashlib
import importlib.util
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {
    "core": "ferryman",
    "plugins/qemu": "ferryman_qemu",
    "plugins/xen": "ferryman_xen",
    "plugins/remote": "ferryman_remote",
}
"""Folders and import names of the distributions, each after those that it requires."""

_STEP_TIMEOUT_S = 1800.0
_SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
_MODULES = (
    "acpi/button",
    "input/evdev",
    "virtio/virtio",
    "virtio/virtio_ring",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "virtio/virtio_balloon",
    "char/virtio_console",
)
"""Drivers of the power button, the balloon and the agent's channel, by their place in the kernel's folder of drivers;
the guests can do without."""

_KERNELS = ("linux-image-cloud-amd64", "linux-image-virtual")
"""Packages whose first dependency is the newest kernel for virtual machines, on Debian and on Ubuntu."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program of the operating system.

    :param package: of Debian and Ubuntu.
    :param name: of the executable by which it is found.
    :param shared_name: another package brings an executable of that name too, so the package itself is looked up.
    """

    package: str
    name: str
    shared_name: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What one target needs.

    :param groups: of ``[dependency-groups]`` in pyproject.toml, besides what the distributions require.
    :param optional_programs: the target does less without the programs, so lacking them is no failure.
    :param kernel: the guest kernel is needed.
    """

    groups: tuple[str, ...]
    programs: tuple[Program, ...] = ()
    optional_programs: bool = False
    kernel: bool = False


_QEMU = Program(package="qemu-system-x86", name="qemu-system-x86_64")
_TEST_PROGRAMS = (
    _QEMU,
    Program(package="qemu-utils", name="qemu-img"),
    Program(package="busybox-static", name="busybox", shared_name=True),
    Program(package="nasm", name="nasm"),
    Program(package="iproute2", name="ip"),
    Program(package="iptables", name="iptables-restore"),
    Program(package="swtpm", name="swtpm"),
    # Firmware has no executable: what runs it stands for it, and the package itself is looked up.
    Program(package="ovmf", name="qemu-system-x86_64", shared_name=True),
    # It brings osinfo-db, what it knows of operating systems, too.
    Program(package="virtinst", name="virt-install"),
    # It brings libvirt's schema of domain definitions too.
    Program(package="libvirt-clients", name="virsh"),
    Program(package="qemu-guest-agent", name="qemu-ga"),
    # libvirt's binding is for the system's own Python.
    Program(package="python3-libvirt", name="python3", shared_name=True),
)
_BENCH_PROGRAMS = (
    *_TEST_PROGRAMS,
    Program(package="libvirt-daemon-system", name="libvirtd"),
)
STAGES = {
    "demo": Stage(groups=("build",), programs=(_QEMU,), optional_programs=True),
    "test": Stage(groups=("test",), programs=_TEST_PROGRAMS, kernel=True),
    "bench": Stage(groups=("test",), programs=_BENCH_PROGRAMS, kernel=True),
    "check": Stage(groups=("check",), programs=_TEST_PROGRAMS, kernel=True),
    "docs": Stage(groups=("docs", "build"), programs=(Program(package="graphviz", name="dot"),)),
}


class SetupError(Exception):
    """The set-up cannot go on; the text says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stage that the command line names.

    :returns: 0 when the stage is set up, 1 when it is not.
    """
    parser = argparse.ArgumentParser(prog="tests/bootstrap.py", description="Set up what a target needs.")
    parser.add_argument("stage", choices=[*STAGES, "pins"])
    name = parser.parse_args(arguments).stage
    try:
        if name == "pins":
            _write_pins(ROOT)
        else:
            set_up(ROOT, name)
    except SetupError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("interrupted; the next run begins again where that is safe")
        return 130
    return 0


def set_up(root: Path, name: str) -> None:
    """Bring one stage about.

    :raises SetupError: something is missing that this user or machine cannot get; what could be done was done.
    """
    stage = STAGES[name]
    if not python_ready(root, name):
        with _lock(root):
            if not python_ready(root, name):
                _install_python(root, name)
    _install_programs(name, stage)
    kernel = root / ".cache/kernel/vmlinuz"
    if stage.kernel and not _kernel_ready(kernel):
        with _lock(root):
            if not _kernel_ready(kernel):
                _fetch_kernel(kernel)


# Python packages


def requirements(root: Path, name: str) -> list[str]:
    """List what a stage installs from outside this tree, sorted: its groups, and what the distributions require."""
    groups = _read_toml(root / "pyproject.toml")["dependency-groups"]
    found: set[str] = set()
    for group in STAGES[name].groups:
        found.update(_expand(groups, group))
    for folder in DISTRIBUTIONS:
        project = _read_toml(root / folder / "pyproject.toml")["project"]
        extras = project.get("optional-dependencies", {})
        for wanted in (project.get("dependencies", []), *extras.values()):
            found.update(entry for entry in wanted if not re.match(r"ferryman\b", entry))
    return sorted(found)


def fingerprint(root: Path, name: str) -> str:
    """Digest all that decides what an installed stage looks like.

    Configuration of tools in the root's pyproject.toml is left out: changing it installs nothing.
    """
    files = [root / folder / "pyproject.toml" for folder in DISTRIBUTIONS]
    return _digest(_base(root), name, *requirements(root, name), *map(_read, files), _read(Path(__file__)))


def python_ready(root: Path, name: str) -> bool:
    """Tell whether ``.venv`` is complete and current for the stage."""
    state = _read_state(root)
    return state.get("base") == _base(root) and state["stages"].get(name) == fingerprint(root, name)


def _base(root: Path) -> str:
    # A virtual environment holds its own path and fits one Python; another pin may take a package away.
    return _digest(str(root), repr(sys.version_info), _read(root / "tests/constraints.txt"))


def _install_python(root: Path, name: str) -> None:
    environment = root / ".venv"
    state = _read_state(root)
    current = state.get("base") == _base(root)
    # INVARIANT: while .venv changes it has no state file, so an interrupted change is never taken for a finished one.
    _state_file(root).unlink(missing_ok=True)
    for installer in _installers(root):
        try:
            if not current:
                _remove(environment)
                _say(f"creating .venv with Python {sys.version.split()[0]}")
                installer.create()
            wanted = requirements(root, name)
            _say(f"installing {len(wanted)} Python packages and what they require, with {installer.name}")
            installer.install(["-c", "tests/constraints.txt", *wanted])
            _say("installing " + ", ".join(DISTRIBUTIONS))
            editable = [part for folder in DISTRIBUTIONS for part in ("-e", f"./{folder}")]
            installer.install(["--no-deps", "--no-build-isolation", *editable])
            break
        except SetupError as error:
            if installer.last:
                raise
            _say(str(error))
            _say("going on with pip")
            current = False
    stages = state["stages"] if current else {}
    # A stage whose requirements are all there is set up as well.
    ready = {other for other in STAGES if set(requirements(root, other)) <= set(wanted)}
    stages.update({other: fingerprint(root, other) for other in ready})
    temporary = environment / "ferryman-setup.json.new"
    temporary.write_text(json.dumps({"base": _base(root), "stages": stages}, indent=1))
    os.replace(temporary, _state_file(root))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Installer:
    name: str
    last: bool
    create: Callable[[], object]
    install: Callable[[list[str]], object]


def _installers(root: Path) -> Iterator[_Installer]:
    python = str(root / ".venv/bin/python")
    uv = shutil.which("uv")
    if uv is not None:
        yield _Installer(
            name="uv",
            last=False,
            create=lambda: _run([uv, "venv", "--quiet", "--python", sys.executable, ".venv"], at=root),
            install=lambda what: _run([uv, "pip", "install", "--quiet", "--python", python, *what], at=root),
        )
    yield _Installer(
        name="pip",
        last=True,
        create=lambda: _create_with_venv(root),
        install=lambda what: _run(
            [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", *what],
            at=root,
        ),
    )


def _create_with_venv(root: Path) -> None:
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        # Debian and Ubuntu ship these two modules of the standard library in a package of their own.
        package = f"python3.{sys.version_info.minor}-venv"
        if not _may_install():
            raise SetupError(f"{sys.executable} cannot make virtual environments: {_by_hand([package])}")
        _apt_install([package])
    _run([sys.executable, "-m", "venv", ".venv"], at=root)


def _expand(groups: dict[str, list[str | dict[str, str]]], name: str) -> Iterator[str]:
    for entry in groups[name]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _expand(groups, entry["include-group"])


def _state_file(root: Path) -> Path:
    return root / ".venv/ferryman-setup.json"


def _read_state(root: Path) -> dict[str, Any]:
    try:
        state = json.loads(_state_file(root).read_text())
    except FileNotFoundError:
        return {"stages": {}}
    # The interpreter that the environment was made with may be gone.
    return state if (root / ".venv/bin/python").exists() else {"stages": {}}


def _write_pins(root: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        raise SetupError("resolving the pins needs the program uv")
    wanted = sorted({entry for name in STAGES for entry in requirements(root, name)})
    # One version of each package for every Python from 3.11.0 on: Debian 12 has 3.11.2.
    resolve = [uv, "pip", "compile", "--universal", "--python-version", "3.11.0", "--fork-strategy", "fewest"]
    quiet = ["--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "-"]
    pins = _run([*resolve, *quiet], at=root, stdin="\n".join(wanted))
    # Every pin carries the one system that [tool.uv] in pyproject.toml names.
    pins = re.sub(r" (;|and) sys_platform == 'linux'", "", pins)
    header = (
        "# Every package that a stage of tests/bootstrap.py installs, what they require included.\n"
        "# Written by `make pins` from the requirements in pyproject.toml, core/ and plugins/.\n"
    )
    (root / "tests/constraints.txt").write_text(header + pins)


# Programs of the operating system


def missing_programs(stage: Stage) -> list[Program]:
    """List the programs of the stage that are not installed."""
    return [program for program in stage.programs if not _installed(program)]


def _installed(program: Program) -> bool:
    if shutil.which(program.name, path=_SYSTEM_PATH) is None:
        return False
    query = shutil.which("dpkg-query")
    if not program.shared_name or query is None:
        return True
    asked = subprocess.run(
        [query, "--show", "--showformat=${db:Status-Status}", program.package],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return asked.stdout == "installed"


def _install_programs(name: str, stage: Stage) -> None:
    missing = missing_programs(stage)
    if not missing:
        return
    failure = None
    if _may_install():
        try:
            _apt_install([program.package for program in missing])
        except SetupError as error:
            failure = str(error)
        missing = missing_programs(stage)
    if not missing:
        return
    names = ", ".join(program.name for program in missing)
    advice = failure or _by_hand([program.package for program in missing])
    if not stage.optional_programs:
        raise SetupError(
            f"the stage {name} needs {names}: {advice}\n"
            "bootstrap: without them, `.venv/bin/python -m pytest` runs the tests that do not need them"
        )
    _say(f"{names} is not installed, so the {name} uses the simulated hypervisor; to change that, {advice}")


def _by_hand(packages: list[str]) -> str:
    if shutil.which("apt-get") is None:
        return f"install what Debian calls {shlex.join(packages)}"
    return f"run\nbootstrap:     sudo apt-get install --no-install-recommends {shlex.join(packages)}"


def _may_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


_APT = ("apt-get", "--quiet", "-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=300")


def _apt_install(packages: list[str]) -> None:
    _say(f"installing the system packages {', '.join(packages)}")
    _run([*_APT, "update"])
    _run([*_APT, "install", "--yes", "--no-install-recommends", *packages])


# The guest kernel


def _kernel_ready(kernel: Path) -> bool:
    """Say whether the kernel is there with the drivers of today's list, or whoever put it there brought his own."""
    kept = kernel.with_name("kept")
    return kernel.exists() and (not kept.exists() or kept.read_text() == _kept())


def _kept() -> str:
    return "\n".join(_MODULES)


def _fetch_kernel(target: Path) -> None:
    """Unpack the newest kernel for virtual machines that Debian or Ubuntu has; needs no root, installs nothing."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SetupError(
                f"the guest kernel comes from a Debian package, and {tool} is not here: put a Linux kernel with "
                f"built-in virtio and serial drivers at {target.relative_to(ROOT)}"
            )
    _say("fetching the guest kernel")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        folder = Path(work)
        options: list[str] = []
        try:
            kernel = _download_kernel(folder, options)
        except SetupError:
            # No lists, or lists older than the archive.
            if os.geteuid() != 0:
                options = _private_lists(folder)
            _run([*_APT, *options, "update"])
            kernel = _download_kernel(folder, options)
        _keep_modules(folder / "tree", target.parent / "modules")
        target.with_name("kept").write_text(_kept())
        # Last: the kernel stands for all of it.
        os.replace(kernel, target)


def _download_kernel(folder: Path, options: list[str]) -> Path:
    for meta in _KERNELS:
        try:
            depends = _run(["apt-cache", *options, "depends", meta])
        except SetupError:
            continue
        found = re.search(r"Depends: (linux-image-\d\S*)", depends)
        if found is None:
            continue
        _run([*_APT, *options, "download", found[1]], at=folder)
        (package,) = folder.glob("linux-image-*.deb")
        _run(["dpkg-deb", "--extract", str(package), str(folder / "tree")])
        (kernel,) = (folder / "tree/boot").glob("vmlinuz-*")
        return kernel
    raise SetupError(f"apt-cache knows no kernel: tried {' and '.join(_KERNELS)}")


def _keep_modules(tree: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for module in _MODULES:
        for path in tree.glob(f"lib/modules/*/kernel/drivers/{module}.ko*"):
            content = path.read_bytes()
            if path.suffix == ".xz":
                content = lzma.decompress(content)
            if path.suffix in (".ko", ".xz"):
                (target / f"{Path(module).name}.ko").write_bytes(content)


def _private_lists(folder: Path) -> list[str]:
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    return ["-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]


# Helpers


def _run(command: Sequence[str], *, at: Path = ROOT, stdin: str | None = None) -> str:
    """Run a program quietly and return its standard output.

    :raises SetupError: it failed or took longer than half an hour; the text holds the end of what it said.
    """
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", "PYTHONWARNINGS": "ignore"}
    # Like pip, uv shall trust whom the machine trusts; older versions of uv know the second name.
    certificates = {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=at,
            env={**os.environ, **quiet, **certificates},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=True,
            timeout=_STEP_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        said = "\n".join((error.stdout + error.stderr).strip().splitlines()[-20:])
        raise SetupError(f"`{shlex.join(command)}` failed with {error.returncode}:\n{said}") from error
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"`{shlex.join(command)}` took more than {error.timeout:.0f} s") from error
    return done.stdout


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Let one set-up of this tree at a time work; the kernel lets go of the lock when its holder ends."""
    (root / ".cache").mkdir(exist_ok=True)
    with open(root / ".cache/bootstrap.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def _read(path: Path) -> str:
    return path.read_text()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _remove(environment: Path) -> None:
    if environment.is_symlink():
        environment.unlink()
    elif environment.exists():
        shutil.rmtree(environment)


def _say(text: str) -> None:
    print(f"bootstrap: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
