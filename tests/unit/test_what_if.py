"""`plan` to look at: bars by device, and plans as they would be with another value; nothing is written."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from labdeploy import report

if TYPE_CHECKING:
    from conftest import Lab

GPU = 'cpu: {cores: 8}, ram: 64GiB, gpus: [{name: RTX 3090, vram: 24GiB, compute_capability: "8.6"}]'
CHAT = "runner: llama-server, model: qwen3-8b, port: 8080, ctx_size: 8192"


@pytest.fixture
def two(lab: Lab) -> Lab:
    """Give a host with two services, one of which leaves its runner open."""
    lab.copy_lock()
    lab.host(GPU, **{"chat": CHAT, "o.k": "model: qwen3-4b, port: 8081"})
    return lab


def what_if(lab: Lab, *changes: str) -> dict[str, object]:
    """Give the JSON of a plan with changes."""
    ran = lab.run("plan", "--json", *(word for change in changes for word in ("--what-if", change)))
    assert ran.code == 0, ran.err
    document: dict[str, object] = json.loads(ran.out)
    return document


def setting(document: dict[str, object], service: str, key: str) -> object:
    """Give one setting of a service in a report."""
    return document["hosts"]["h"]["services"][service]["settings"][key]["value"]  # type: ignore[index]


def test_a_bare_key_is_meant_for_every_service_that_has_it(two: Lab):
    """Also for one whose runner was chosen; the report says what changes, and the file stays as it is."""
    before = two.path.read_text()
    document = what_if(two, "ctx_size=16384")
    assert setting(document, "chat", "ctx_size") == setting(document, "o.k", "ctx_size") == 16384
    changes = document["what_if"]["changes"]["h"]  # type: ignore[index]
    assert "ctx_size 8192 -> 16384" in changes["services"]["chat"]
    assert changes["planned_mib"]["gpu0"][0] < changes["planned_mib"]["gpu0"][1] or "o.k" in changes["services"]
    assert two.path.read_text() == before


@pytest.mark.parametrize("scope", ["chat.", "h.chat."])
def test_a_scope_names_one_service(two: Lab, scope: str):
    """By its name, or by its host and its name, which may hold dots."""
    document = what_if(two, f"{scope}ctx_size=16384", "h.o.k.cache_ram=512MiB")
    assert setting(document, "chat", "ctx_size") == 16384
    assert setting(document, "o.k", "cache_ram") == 512
    assert setting(document, "o.k", "ctx_size") != 16384


@pytest.mark.parametrize("change", ["hardware.gpus[0].vram=12GiB", "h.hardware.gpus[0].vram=12GiB"])
def test_hardware_that_is_not_there_yet(two: Lab, change: str):
    """What a smaller or larger card would do, before it is bought."""
    device = what_if(two, change)["hosts"]["h"]["devices"][0]  # type: ignore[index]
    assert device["total_mib"] == 12288
    assert device["planned_mib"] <= 12288 - 512


def test_what_would_not_fit_says_so(two: Lab):
    """With the exit code of a plan that does not fit, and the lines that would."""
    ran = two.run("plan", "--what-if", "chat.ctx_size=2000000")
    assert ran.code == 3
    assert "chat: does not fit" in ran.err
    assert "would change; nothing was written" in ran.out


def test_what_an_alias_shares_is_not_changed_for_the_other(lab: Lab):
    """Two hosts with the same services by an anchor: only the one that was named changes."""
    lab.copy_lock()
    lab.write(f"""
        models: {{qwen3-8b: {{path: x.gguf}}}}
        hosts:
          a: {{hardware: &hw {{{GPU}}}, services: &all {{chat: {{{CHAT}}}}}}}
          b: {{hardware: *hw, services: *all}}
    """)
    hosts = what_if(lab, "a.chat.ctx_size=16384")["hosts"]
    sizes = [hosts[h]["services"]["chat"]["settings"]["ctx_size"]["value"] for h in ("a", "b")]  # type: ignore[index]
    assert sizes == [16384, 8192]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("ctx_size=many", "hosts.h.services.chat.ctx_size: 'many' is not a whole number"),
        ("ctx_size=1", "out of range"),
        ("ctx_sise=4096", 'did you mean "ctx_size"'),
        ("chat.ctx_sise=4096", 'did you mean "ctx_size"'),
        ("chta.ctx_size=4096", "nothing that is planned has"),
        ("hardware.ram=64", "has no unit"),
        ("hardware.gpus[3].vram=8GiB", "has no item 3"),
        ("ctx_size", "is not KEY=VALUE"),
        ("ctx_size=", "is not KEY=VALUE"),
        ("ctx_size=[", "is not KEY=VALUE"),
        ("=4", "is not KEY=VALUE"),
        ("chat.port=8081", "is already the port of"),
        ("chat.ctx_size.more=3", "--what-if"),
        ("reserve.vram=90000%", "is not a size"),
    ],
)
def test_a_wrong_change_is_one_clear_error(two: Lab, change: str, what: str):
    """Checked by the rules of the inventory; it names the change, and one that works."""
    ran = two.run("plan", "--what-if", change)
    assert ran.code == 2
    assert what in ran.err
    assert "--what-if" in ran.err.splitlines()[0]
    assert "\n\nhint: labdeploy plan --what-if" in ran.err


# --- bars ---------------------------------------------------------------------------------------------------------


def test_a_bar_shows_who_takes_what(two: Lab):
    """A letter for each service, what is left and what is kept back; as wide as a terminal, and to scale."""
    out = two.run("plan").out
    bars = re.findall(r"^    \[(.*)\]$", out, re.MULTILINE)
    assert [len(bar) for bar in bars] == [report.BAR] * 2
    assert re.fullmatch(r"a+b+\.*-+", bars[0])
    assert re.search(r"^    a chat \d+, b o\.k \d+, left \d+, kept back 512$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) < 80


def test_a_bar_of_too_much_says_so(lab: Lab):
    """There is no room left to draw; the text has the number."""
    plan = lab.plan(GPU, a=f"{CHAT}, gpu_layers: 37".replace("8192", "262144"))
    text = report.plan_text(plan)
    assert re.search(r"\[a+\]\n    a a \d+, TOO MUCH BY \d+", text)
