"""Push, no change, change, break, come back, roll back: on real hosts of all three systemd versions."""

from __future__ import annotations

import json
import urllib.error
from typing import TYPE_CHECKING

import pytest
from lab import UNIT, Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from labdeploy.sandbox import SandboxHost


@pytest.fixture
def lab(make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path) -> Lab:
    """Return a lab with one fresh host of the newest suite."""
    return Lab(tmp_path, [make_host("sid")], tiny_model)


@pytest.fixture(params=sandbox.SUITES)
def any_lab(
    request: pytest.FixtureRequest, make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path
) -> Lab:
    """Return a lab with one fresh host, of each suite in turn."""
    return Lab(tmp_path, [make_host(request.param)], tiny_model)


def test_the_whole_story(any_lab: Lab) -> None:
    """From nothing to a served token, and through every way forward and back."""
    lab = any_lab

    first = lab.push_ok()
    assert (first["result"], first["generation"]) == ("changed", 1)
    assert first["services"]["chat"]["action"] == "started"
    assert lab.complete()
    assert lab.show("ActiveState") == "active"
    assert lab.show("UnitFileState") == "enabled"

    before = lab.snapshot()
    second = lab.push("--json")
    assert second.json["hosts"][lab.host.name]["result"] == "unchanged"
    assert lab.snapshot() == before, "a push without changes touched the host"

    lab.set(ctx_size=4096)
    changed = lab.push_ok()
    assert (changed["generation"], changed["services"]["chat"]["action"]) == (2, "restarted")
    assert changed["services"]["chat"]["downtime_s"] > 0
    assert lab.n_ctx() == 4096

    lab.set(ctx_size=4096, flags=["--no-such-flag"])
    broken = lab.push()
    assert broken.code == 5
    assert f"error: {lab.host.name}: chat: " in broken.err
    assert "generation 2 is back" in broken.err
    assert "hint: labdeploy logs" in broken.err
    assert lab.complete(), "the old generation serves again"
    assert lab.n_ctx() == 4096

    back = lab.run("rollback", "-y", "--json")
    assert back.code == 0, back.err
    assert back.json["hosts"][lab.host.name]["generation"] == 1
    assert lab.n_ctx() == 2048

    forth = lab.run("rollback", lab.host.name, "--json")
    assert forth.json["hosts"][lab.host.name]["generation"] == 2
    assert lab.n_ctx() == 4096

    states = {g["number"]: g["state"] for g in _history(lab)["generations"]}
    assert states == {1: "rolled-back", 2: "good", 3: "rolled-back"}
    assert lab.on_host("ls", "/run/labdeploy") == ""


def test_installed_is_rendered_byte_for_byte(any_lab: Lab) -> None:
    """What render writes is what push installs, and what systemd reads."""
    any_lab.push_ok()
    any_lab.run("render")
    rendered = (any_lab.folder / "rendered" / any_lab.host.name / "systemd" / UNIT).read_text()
    assert sandbox.run(any_lab.host, "cat", f"/etc/systemd/system/{UNIT}").stdout == rendered
    assert rendered in sandbox.run(any_lab.host, "systemctl", "cat", UNIT).stdout
    assert any_lab.show("FragmentPath") == f"/etc/systemd/system/{UNIT}"


def test_a_service_that_dies_soon_after_its_first_answer_is_rolled_back(lab: Lab) -> None:
    """Ready is not healthy: a crash within the watch brings the old generation back."""
    lab.push_ok()
    (lab.folder / "flaky").write_text(
        '#!/bin/sh\n/usr/bin/llama-server "$@" &\nsleep 3\nkill -9 $!\nexit 1\n', encoding="utf-8"
    )
    sandbox.copy_in(lab.host, lab.folder / "flaky", "/usr/local/bin/flaky", mode="0755")
    lab.extra = {"runners": {"llama-server": "/usr/local/bin/flaky"}}
    lab.set(ctx_size=4096)
    ended = lab.push(watch_s=8)
    assert ended.code == 5, ended.err
    assert "was ready, then stopped" in ended.err
    assert lab.n_ctx() == 2048


def test_only_what_changed_restarts(lab: Lab) -> None:
    """A second service is added and changed without a stop of the first; taken out, its unit goes."""
    lab.push_ok()
    since = lab.show("ActiveEnterTimestampMonotonic")
    second = {"runner": "llama-server", "model": "tiny", "port": 8081, "bind": lab.host.address, "cache_ram": "0MiB"}
    lab.services = {"notes": second | {"ctx_size": 1024}}
    lab.set(threads=2)
    added = lab.push_ok()
    assert added["services"]["notes"]["action"] == "started"
    since_with_threads = lab.show("ActiveEnterTimestampMonotonic")
    lab.services = {"notes": second | {"ctx_size": 2048}}
    lab.set(threads=2)
    changed = lab.push_ok()
    assert changed["services"]["notes"]["action"] == "restarted"
    assert changed["services"]["chat"]["action"] == "unchanged"
    assert lab.show("ActiveEnterTimestampMonotonic") == since_with_threads
    assert since_with_threads >= since
    lab.services = {}
    lab.set(threads=2)
    removed = lab.push_ok()
    assert removed["services"]["notes"]["action"] == "stopped"
    assert lab.show("LoadState", "labdeploy-notes.service") == "not-found"
    assert "notes" not in lab.on_host("ls", "-R", "/etc/systemd/system")
    assert lab.run("rollback", lab.host.name).code == 0
    assert lab.show("ActiveState", "labdeploy-notes.service") == "active"
    assert lab.show("UnitFileState", "labdeploy-notes.service") == "enabled"


def test_rollback_of_the_first_push_leaves_nothing_running(lab: Lab) -> None:
    """Before the first push there was nothing, so that is what its rollback brings back."""
    lab.push_ok()
    assert lab.run("rollback", "-y").code == 0
    assert lab.show("LoadState") == "not-found"
    assert lab.run("rollback", "-y").code == 0
    assert lab.complete()


def test_rollback_needs_only_the_host(lab: Lab) -> None:
    """The inventory may have lost the service, and its model: what the host has kept is enough."""
    lab.push_ok()
    lab.set(ctx_size=4096)
    lab.push_ok()
    inventory = json.loads(json.dumps({"hosts": {lab.host.name: lab._host(lab.host, {})}}))
    inventory["hosts"][lab.host.name]["services"] = {}
    lab.write(inventory)
    assert lab.run("rollback", lab.host.name, "--to", "1").code == 0
    assert lab.n_ctx() == 2048


def test_a_stopped_service_is_started_again(lab: Lab) -> None:
    """A push brings the host to what the inventory says, also where only the process is missing."""
    lab.push_ok()
    lab.on_host("systemctl", "stop", UNIT)
    again = lab.push_ok()
    assert (again["result"], again["generation"]) == ("changed", 1)
    assert lab.complete()


def test_dry_run_changes_nothing(lab: Lab) -> None:
    """A dry run says what would happen and leaves the host as it was."""
    before = lab.snapshot()
    fresh = lab.push_ok("--dry-run")
    assert fresh["result"] == "would-change"
    assert lab.snapshot() == before
    lab.push_ok()
    lab.set(ctx_size=4096)
    before = lab.snapshot()
    dry = lab.push("--dry-run")
    assert dry.code == 0
    assert "ctx_size 2048 -> 4096" in dry.out
    assert f"would systemctl restart {UNIT}" in dry.out
    assert "+    --ctx-size 4096" in dry.out
    assert lab.snapshot() == before


def test_a_change_by_hand_is_never_overwritten_silently(lab: Lab) -> None:
    """Drift stops a push until it is allowed to be overwritten."""
    lab.push_ok()
    lab.on_host("sh", "-c", f"echo '# mine' >> /etc/systemd/system/{UNIT}")
    lab.set(ctx_size=4096)
    refused = lab.push()
    assert refused.code == 2
    assert "by hand" in refused.err
    assert "--overwrite-drift" in refused.err
    assert "# mine" in lab.on_host("cat", f"/etc/systemd/system/{UNIT}")
    shown = lab.run("diff", "--exit-code")
    assert shown.code == 1
    assert "+# mine" in shown.out
    lab.push_ok("--overwrite-drift")
    assert "# mine" not in lab.on_host("cat", f"/etc/systemd/system/{UNIT}")
    assert lab.run("diff", "--exit-code").code == 0


@pytest.mark.parametrize("by_hand", ["rm", "ln -sfn /dev/null"])
@pytest.mark.parametrize("then", [{"ctx_size": 2048}, None], ids=["changed", "removed"])
def test_an_undo_is_whole_where_a_unit_was_deleted_or_masked(
    lab: Lab, by_hand: str, then: dict[str, int] | None
) -> None:
    """It comes back as it was pushed, and the host can be pushed to again."""
    notes = {"runner": "llama-server", "model": "tiny", "port": 8081, "bind": lab.host.address, "cache_ram": "0MiB"}
    lab.services = {"notes": notes | {"ctx_size": 1024}}
    lab.set()
    lab.push_ok()
    unit = "/etc/systemd/system/labdeploy-notes.service"
    pushed = lab.on_host("cat", unit)
    lab.on_host("sh", "-c", f"{by_hand} {unit}; systemctl daemon-reload")
    lab.services = {} if then is None else {"notes": notes | then}
    lab.set(ctx_size=4096, flags=["--no-such-flag"])
    ended = lab.push("--overwrite-drift")
    assert ended.code == 5, ended.err

    state = lab.run("status", "--json").json["hosts"][lab.host.name]
    assert (state["generation"], state["good"], state["pending"]) == (1, 1, False)
    assert state["drift"] == []
    assert lab.on_host("cat", unit) == pushed
    assert lab.show("UnitFileState", "labdeploy-notes.service") == "enabled"
    assert lab.show("ActiveState", "labdeploy-notes.service") == "active"
    assert lab.n_ctx() == 2048
    lab.services = {"notes": notes | {"ctx_size": 1024}}
    lab.set(ctx_size=4096)
    assert lab.push_ok()["generation"] == 3


def test_looking(lab: Lab) -> None:
    """Status, history, check and logs say what the contract says."""
    lab.push_ok()
    status = lab.run("status", "--json").json["hosts"][lab.host.name]
    assert (status["reachable"], status["generation"], status["good"], status["pending"]) == (True, 1, 1, False)
    assert status["services"]["chat"]["healthy"] is True
    assert status["services"]["chat"]["unit"] == UNIT
    generation = _history(lab)["generations"][0]
    assert (generation["number"], generation["changed"], generation["state"]) == (1, ["chat"], "good")
    check = lab.run("check", "--json").json["hosts"][lab.host.name]["services"]["chat"]
    assert check["healthy"] is True
    assert 0 < check["ttft_ms"]["p50"] <= check["ttft_ms"]["p95"]
    assert check["decode_tokens_per_s"] > 0
    assert "llama-server" in lab.run("logs", lab.host.name, "chat", "-n", "20").out
    lab.on_host("systemctl", "stop", UNIT)
    shown = lab.run("logs", lab.host.name, "chat", "-n", "20").out
    logs = lab.run("logs", lab.host.name, "chat", "-n", "20", "--json").json["hosts"][lab.host.name]["services"]["chat"]
    assert logs["unit"] == UNIT
    assert len(logs["lines"]) == 20
    said = [line["message"].strip() for line in logs["lines"]]  # as text, tabs are wider
    assert [message for message in said if message not in shown] == []
    assert any("llama-server" in message for message in said)
    assert [line["at"] for line in logs["lines"]] == sorted(line["at"] for line in logs["lines"])
    assert lab.run("status", "--json").json["hosts"][lab.host.name]["services"]["chat"]["healthy"] is False
    assert lab.run("check").code == 8


def test_two_hosts_at_once_and_one_that_is_gone(
    make_host: Callable[[str], SandboxHost], tiny_model: Path, tmp_path: Path
) -> None:
    """Hosts are pushed side by side; one that does not answer fails alone, with exit code 4."""
    lab = Lab(tmp_path, [make_host("sid"), make_host("trixie")], tiny_model)
    both = lab.run("push", "--all", "-y", "--watch", "1", "--json")
    assert both.code == 0, both.err
    assert {host["result"] for host in both.json["hosts"].values()} == {"changed"}
    sandbox.power_cut(lab.hosts[1])
    lab.set(ctx_size=4096)
    ended = lab.run("push", "--all", "-y", "--watch", "1", "--json")
    assert ended.code == 4
    assert [host["result"] for host in ended.json["hosts"].values()] == ["changed", "failed"]
    sandbox.boot(lab.hosts[1])
    undone = lab.run("rollback", "-y", "--json")
    assert list(undone.json["hosts"]) == [lab.host.name], "only what the last push changed is undone"


def test_push_all_asks_first(lab: Lab) -> None:
    """Without a terminal and without -y, whatever touches every host does nothing."""
    before = lab.snapshot()
    for words in (("push", "--all"), ("push", "--all", "--json")):
        ended = lab.run(*words)
        assert ended.code == 2
        assert "-y" in ended.err
    assert lab.snapshot() == before


def _history(lab: Lab) -> dict:
    ended = lab.run("history", "--json")
    assert ended.code == 0, ended.err
    return ended.json["hosts"][lab.host.name]


def test_an_api_key_stays_on_the_host(lab: Lab) -> None:
    """The key reaches the service by systemd's credentials: it is in no unit, no command line and no journal."""
    secret = "s3cret-key-of-this-test"  # noqa: S105 (a test's own)
    lab.on_host("sh", "-c", f"umask 077; echo {secret} > /etc/chat.key")
    lab.set(api_key_file="/etc/chat.key")
    lab.push_ok()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        lab.complete()
    pid = lab.show("MainPID")
    seen = [
        lab.on_host("cat", f"/etc/systemd/system/{UNIT}"),
        lab.on_host("sh", "-c", f"tr '\\0' ' ' < /proc/{pid}/cmdline"),
        lab.on_host("sh", "-c", f"tr '\\0' ' ' < /proc/{pid}/environ"),
        lab.on_host("journalctl", "--no-pager"),
        lab.on_host("sh", "-c", "grep -rh . /etc/labdeploy"),
    ]
    assert not [text for text in seen if secret in text]
    assert lab.push_ok()["result"] == "unchanged"


def test_commands_right_after_one_another(lab: Lab) -> None:
    """The lock of a push is gone when its command is: what is typed next never meets it."""
    lab.push_ok()
    for number in range(12):
        lab.set(ctx_size=1024 + 256 * number)
        assert lab.push("--dry-run").code == 0
        ended = lab.push(watch_s=0) if number % 2 else lab.run("rollback", lab.host.name)
        assert ended.code == 0, ended.err
