"""The whole story on one sandbox host: plan, push, ask the model, change, break, watch it come back, roll back."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from labdeploy import sandbox
from labdeploy.errors import LabdeployError
from labdeploy.tiny_model import write_tiny_model

HOST = "demo1"
PORT = 8080
CTX, LONGER_CTX = 2048, 4096
MODEL = "tiny.gguf"


@dataclass(frozen=True)
class Stage:
    """Where the story plays: a folder with an inventory, and a sandbox host."""

    folder: Path
    host: sandbox.SandboxHost

    def write_inventory(self, *, ctx_size: int = CTX, flags: str = "[]") -> None:
        """Write the inventory as the story has it now."""
        host = self.host
        (self.folder / "inventory.yaml").write_text(
            f"""\
models:
  tiny: {{path: {MODEL}, local: ./{MODEL}}}
hosts:
  {HOST}:
    address: {host.address}
    ssh: {{user: root, port: {host.port}, key: {host.key}, known_hosts: {host.known_hosts}}}
    hardware: {{cpu: {{cores: {os.cpu_count() or 1}}}, ram: 8GiB}}
    services:
      chat:
        runner: llama-server
        model: tiny
        port: {PORT}
        bind: {host.address}
        ctx_size: {ctx_size}
        cache_ram: 64MiB
        flags: {flags}
""",
            encoding="utf-8",
        )

    def labdeploy(self, *words: str, expect: int = 0) -> None:
        """Type one command and see that it ends as it should."""
        click.secho(f"\n$ labdeploy {' '.join(words)}", bold=True)
        ended = subprocess.run([sys.executable, "-m", "labdeploy", *words], cwd=self.folder, check=False)
        if expect:
            click.echo(f"(exit code {ended.returncode})")
        if ended.returncode != expect:
            raise LabdeployError(f"labdeploy {words[0]} ended with {ended.returncode}, not {expect}", where="demo")

    def ask(self) -> None:
        """Ask the model for a few tokens, at the port of the unit that was pushed."""
        address = f"{self.host.address}:{PORT}"
        click.secho(
            f'\n$ curl http://{address}/v1/completions -d \'{{"prompt": "Once", "max_tokens": 12}}\'', bold=True
        )
        web = http.client.HTTPConnection(address, timeout=30)
        body = json.dumps({"model": "tiny", "prompt": "Once", "max_tokens": 12})
        web.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = json.loads(web.getresponse().read())
        web.close()
        click.echo(f"{answer['choices'][0]['text']!r}  ({answer['usage']['completion_tokens']} tokens, random weights)")

    def on_host(self, *argv: str, lines: int) -> None:
        """Show what a command prints on the host."""
        click.secho(f"\n{HOST}$ {' '.join(argv)} | head -n {lines}", bold=True)
        said = sandbox.run(self.host, *argv).stdout
        click.echo("\n".join(said.splitlines()[:lines]))


def run() -> int:
    """Play the story; where no sandbox can be had, render the shipped inventory and say what is missing."""
    missing = sandbox.prerequisites()
    if missing:
        return _without_sandbox(missing)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="labdeploy-demo-") as name:
        folder = Path(name)
        try:
            _play(_set_up(folder))
        finally:
            sandbox.down([HOST], state_dir=folder / "sandbox")
    click.echo(f"\nThat was the whole story, in {time.monotonic() - started:.0f} s. Nothing of it is left behind.")
    return 0


def _set_up(folder: Path) -> Stage:
    click.echo("Bringing up a host: Debian with systemd as init, sshd and llama-server (the first time takes minutes).")
    host = sandbox.up([HOST], "sid", state_dir=folder / "sandbox", progress=click.echo)[0]
    write_tiny_model(folder / MODEL)
    sandbox.copy_in(host, folder / MODEL, f"/srv/models/{MODEL}", mode="0644")
    return Stage(folder, host)


def _play(stage: Stage) -> None:
    _say("An inventory of one machine with one service. What would it take, and why?")
    stage.write_inventory()
    stage.labdeploy("plan")
    _say("Push it: checked on the host, switched, started, and asked for a token before it counts.")
    stage.labdeploy("push", HOST)
    stage.ask()
    stage.on_host("systemctl", "cat", "labdeploy-chat.service", lines=12)
    _say("A second push changes nothing and restarts nothing.")
    stage.labdeploy("push", HOST)
    _say("A longer context: one line in the inventory, one push.")
    stage.write_inventory(ctx_size=LONGER_CTX)
    stage.labdeploy("push", HOST)
    stage.ask()
    _say("Now break it, with a flag that llama-server does not know. The old generation must come back.")
    stage.write_inventory(ctx_size=LONGER_CTX, flags="[--no-such-flag]")
    stage.labdeploy("push", HOST, expect=5)
    stage.ask()
    _say("And the way back, from what the host itself has kept:")
    stage.labdeploy("rollback", "-y")
    stage.ask()
    stage.labdeploy("history")
    stage.labdeploy("check")


def _say(text: str) -> None:
    click.secho(f"\n--- {text}", fg="cyan")


def _without_sandbox(missing: list[LabdeployError]) -> int:
    """Show what can be shown anywhere: the shipped inventory's plan and units."""
    example = Path(__file__).parent / "example" / "inventory.yaml"
    if not example.exists():
        example = Path(__file__).parent.parent / "inventory.yaml"
    click.secho("$ labdeploy -i inventory.yaml render --stdout minipc", bold=True)
    subprocess.run([sys.executable, "-m", "labdeploy", "-i", example, "render", "--stdout", "minipc"], check=True)
    for error in missing:
        click.echo(f"error: {error}", err=True)
        click.echo(f"\nhint: {error.hint}", err=True)
    click.echo(
        "\nThat was a rendered unit. To see it run on a real host, the demo needs what is named above.", err=True
    )
    return missing[0].exit_code
