"""Real sandbox hosts for tests: one per suite and test session (each xdist worker has its own), or fresh ones.

Without what they need these tests fail, because a skipped fleet test proves nothing. On a machine that cannot
run them, say LABDEPLOY_SKIP_FLEET=1; in CI that is not heard.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from labdeploy import sandbox
from labdeploy.tiny_model import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labdeploy.sandbox import SandboxHost

HERE = Path(__file__).parent
NUMBERS = itertools.count(1)


class MakeHost(Protocol):
    """What the fixture `make_host` is."""

    def __call__(self, suite: str = "sid") -> SandboxHost:
        """Return a host that no other test has seen, which goes when the test ends."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, for `-m "not fleet"`."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.fleet)


@pytest.fixture(scope="session")
def sandbox_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the state folder of this session's hosts; they are taken down at its end."""
    problems = [f"{problem} (hint: {problem.hint})" for problem in sandbox.prerequisites()]
    if problems:
        message = "; ".join(problems)
        if os.environ.get("LABDEPLOY_SKIP_FLEET") == "1" and not os.environ.get("CI"):
            pytest.skip(message)
        pytest.fail(f"no sandbox hosts: {message}", pytrace=False)
    state_dir = tmp_path_factory.mktemp("sandbox")
    yield state_dir
    sandbox.down(state_dir=state_dir)


@pytest.fixture(scope="session")
def sid(sandbox_dir: Path) -> SandboxHost:
    """Return the session's host with the newest systemd, and llama.cpp of its own."""
    return sandbox.up(["sid"], "sid", state_dir=sandbox_dir)[0]


@pytest.fixture(scope="session")
def trixie(sandbox_dir: Path) -> SandboxHost:
    """Return the session's host with systemd 257."""
    return sandbox.up(["trixie"], "trixie", state_dir=sandbox_dir)[0]


@pytest.fixture(scope="session")
def bookworm(sandbox_dir: Path) -> SandboxHost:
    """Return the session's host with systemd 252, the oldest that labdeploy supports."""
    return sandbox.up(["bookworm"], "bookworm", state_dir=sandbox_dir)[0]


@pytest.fixture(scope="session", params=sandbox.SUITES)
def host(request: pytest.FixtureRequest) -> SandboxHost:
    """Run the test on the session's host of each suite."""
    found: SandboxHost = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def make_host(sandbox_dir: Path) -> Iterator[MakeHost]:
    """Return a function that brings up fresh hosts, for tests that break them."""
    names: list[str] = []

    def make(suite: str = "sid") -> SandboxHost:
        names.append(f"fresh{next(NUMBERS)}")
        return sandbox.up(names[-1:], suite, state_dir=sandbox_dir)[0]

    yield make
    sandbox.down(names, state_dir=sandbox_dir)


@pytest.fixture
def fresh_host(make_host: MakeHost) -> SandboxHost:
    """Return a host that no other test has seen."""
    return make_host()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small GGUF file that llama-server serves."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file in which all workers note their results."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "faults.jsonl"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the fault suite has tried, and against which Ollama was tested."""
    import faults  # noqa: PLC0415
    import ollama_lab  # noqa: PLC0415

    factory = getattr(config, "_tmp_path_factory", None)
    file = factory.getbasetemp() / "faults.jsonl" if factory else None
    if file and file.exists():
        terminalreporter.write_line("")
        terminalreporter.write_line(faults.table(file))
    if any("test_ollama" in report.nodeid for report in terminalreporter.getreports("passed")):
        terminalreporter.write_line(ollama_lab.told())
