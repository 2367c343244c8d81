"""What the unit tests share: inventories written in a line or two, command lines run in this process."""

from __future__ import annotations

import functools
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

TOP = Path(__file__).parents[2]
sys.path.insert(0, str(TOP / "tests"))

from labdeploy import inventory as inventories  # noqa: E402
from labdeploy import lock as locks  # noqa: E402
from labdeploy import plan as planning  # noqa: E402
from labdeploy.__main__ import run  # noqa: E402
from labdeploy.models.book import ModelBook  # noqa: E402

if TYPE_CHECKING:
    from labdeploy.inventory import Inventory
    from labdeploy.plan import HostPlan

MACHINES = TOP / "tests" / "data" / "machines"
MODELS = """
models:
  qwen3-4b: {path: Qwen3-4B-Q4_K_M.gguf}
  qwen3-8b: {path: Qwen3-8B-Q4_K_M.gguf}
  qwen3-30b: {path: Qwen3-30B-A3B-Q4_K_M.gguf}
  gemma3-27b: {path: gemma-3-27b-it-Q4_K_M.gguf}
  gemma3-27b-mmproj: {path: mmproj-gemma-3-27b-it-f16.gguf}
  llama3-70b: {path: Llama-3.3-70B-Instruct-Q4_K_M.gguf}
  qwen2.5-7b-awq: {path: Qwen2.5-7B-Instruct-AWQ}
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag that writes the golden trees anew, for `git diff` to show what changed."""
    parser.addoption("--refresh-golden", action="store_true", help="write tests/data/machines/*/expected anew")


@dataclass(frozen=True)
class Ran:
    """What one command line said."""

    code: int
    out: str
    err: str


class Lab:
    """A folder with an inventory and the lock of the tests, and what people do there."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.path = folder / "inventory.yaml"

    def write(self, text: str) -> Path:
        """Write the inventory as it is."""
        self.path.write_text(textwrap.dedent(text), encoding="utf-8")
        return self.path

    def load(self, text: str) -> Inventory:
        """Write and read an inventory."""
        return inventories.load(self.write(text))

    def problems(self, text: str) -> list[str]:
        """Give the problems of an inventory as `LINE: PATH: WHAT`."""
        with pytest.raises(inventories.InventoryProblemsError) as caught:
            self.load(text)
        return [f"{problem.line}: {problem.path}: {problem.what}" for problem in caught.value.problems]

    def host(self, hardware: str, **services: str) -> Inventory:
        """Read an inventory of one host `h` with these services, each the inside of a flow mapping."""
        lines = "\n".join(f"      {name}: {{{keys}}}" for name, keys in services.items())
        text = f"hosts:\n  h:\n    hardware: {{{hardware}}}\n    services:\n{lines or '      {}'}\n{MODELS}"
        return self.load(text)

    def plan(self, hardware: str, **services: str) -> HostPlan:
        """Plan one host."""
        return self.plans(self.host(hardware, **services))["h"]

    def plans(self, inventory: Inventory) -> dict[str, HostPlan]:
        """Plan every host of an inventory."""
        book = ModelBook(inventory, self.lock())
        return {name: planning.plan_host(host, book) for name, host in inventory.hosts.items()}

    @staticmethod
    @functools.cache
    def lock() -> dict[str, object]:
        """Read the lock that the tests share, once."""
        return locks.read(MACHINES / "inventory.lock.yaml")

    def copy_lock(self) -> None:
        """Put the lock beside the inventory, for command lines."""
        shutil.copy(MACHINES / "inventory.lock.yaml", self.folder / "inventory.lock.yaml")

    def run(self, *argv: str) -> Ran:
        """Run a command line on this inventory; of its hints the `-i` that names it is left out."""
        ran = self.bare("-i", str(self.path), *argv)
        return Ran(ran.code, ran.out, ran.err.replace(f"hint: labdeploy -i {self.path} ", "hint: labdeploy "))

    def bare(self, *argv: str) -> Ran:
        """Run a command line that says all by itself."""
        self._capsys.readouterr()
        code = run(list(argv))
        said = self._capsys.readouterr()
        return Ran(code, said.out, said.err)


@pytest.fixture
def lab(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Lab:
    """Give an empty folder to write an inventory in."""
    return Lab(tmp_path, capsys)
