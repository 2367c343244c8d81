"""Whatever happens, at whatever moment: the host is wholly old or wholly new, and the next push just works.

Each story (a push, a push that fails, a rollback, a boot after a power cut) is first run once to see which points
of the host program it passes; then again with a fault at those points. `make faults` tries all of them; kinds that
cannot tell one command of a function from the next (COARSE) strike each function once. `make test` draws some, with
LABDEPLOY_FAULT_SEED or today's date as its seed: each kind of fault, and each function once.
"""

from __future__ import annotations

import functools
import itertools
import random
import subprocess
import time
from typing import TYPE_CHECKING, Any

import faults
import pytest
from faults import ALL, SEED, Result, Victim, forward
from lab import Lab

from labdeploy import sandbox

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from conftest import MakeHost

    from labdeploy.sandbox import SandboxHost

KINDS = ("controller", "connection", "sleep", "kill", "power", "reboot", "full", "readonly", "reload")
COARSE = ("controller", "connection", "sleep", "reboot", "reload")
TWICE = ("kill",)  # also when a point is passed for the second time
STORIES = ("push", "back", "rollback")
SHARDS = range(8 if ALL else 1)  # so that several workers can share what is slow
COMMITTED = "commit"
Points = tuple[tuple[str, int], ...]
SILENT_S = faults.DEADLINE_S - 5  # more says that something waited for what cannot come


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file with the program that has points."""
    return faults.write_program(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="session")
def victims(
    sandbox_dir: Path, tiny_model: Path, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Victims]:
    """Return the hosts of this session that faults strike."""
    made = Victims(sandbox_dir, tiny_model, program, tmp_path_factory)
    yield made
    made.end()


class Victims:
    """One host for each suite, on a small disk of its own, made when it is first asked for."""

    def __init__(self, state_dir: Path, model: Path, program: Path, folders: pytest.TempPathFactory) -> None:
        self._made: dict[str, Victim] = {}
        self._disks: list[SandboxHost] = []
        self._state_dir, self._model, self._program, self._folders = state_dir, model, program, folders

    def __getitem__(self, suite: str) -> Victim:
        """Give the suite's host, whole and with a confirmed generation."""
        if suite not in self._made:
            self._made[suite] = victim = self.fresh(suite, "faults")
            for _ in range(2):
                forward(victim)
        return self._made[suite]

    def fresh(self, suite: str, name: str) -> Victim:
        """Make a host to which nothing was pushed."""
        host = faults.on_small_disk(sandbox.up([f"{name}-{suite}"], suite, state_dir=self._state_dir)[0])
        self._disks.append(host)
        return Victim(Lab(self._folders.mktemp(suite), [host], self._model), self._program)

    def end(self) -> None:
        """Take the hosts down, and their disks."""
        for host in self._disks:
            sandbox.power_cut(host)
            faults.unmount(host)

    def forget(self, suite: str) -> None:
        """Give up a host that a fault has left broken, so that the next case has a fresh one."""
        victim = self._made.pop(suite)
        self._disks.remove(victim.host)
        sandbox.power_cut(victim.host)
        faults.unmount(victim.host)
        sandbox.down([victim.host.name], state_dir=self._state_dir)


def prepare(victim: Victim, story: str) -> list[str]:
    """Write the inventory of a story, and give its command."""
    victim.turn += 1
    name = victim.host.name
    if story == "rollback":
        return ["rollback", name]
    victim.inventory(victim.turn, **({"flags": ["--no-such-flag"]} if story == "back" else {}))
    return ["push", name, "--watch", "0"]


@functools.cache
def points_of(victims: Victims, story: str) -> Points:
    """Run a story without a fault, and give the points it passes, in order: each at its first and second pass."""
    victim = victims["sid"]
    last = commit_point(victims) if story == "boot" else ""
    words = prepare(victim, story)
    if story == "boot":
        victim.order((last, 1, "wait"), ("-", 1, "trace"))
        process = victim.start(*words)
        assert victim.wait_for_hit(process)
        sandbox.power_cut(victim.host)
        faults.end(process)
        sandbox.boot(victim.host)
    else:
        victim.order(("-", 1, "trace"))
        victim.run(*words)
    victim.settled()
    passed = victim.trace()
    victim.order()
    forward(victim)
    seen: dict[str, int] = {}
    found: list[tuple[str, int]] = []
    for point in passed:
        seen[point] = seen.get(point, 0) + 1
        if seen[point] <= 2:
            found.append((point, seen[point]))
    assert found, f"{story} passed no point"
    return tuple(found)


def commit_point(victims: Victims) -> str:
    """Give the last point before the decision."""
    return next(p for p, _ in points_of(victims, "push") if p.startswith(COMMITTED))


def functions(points: Points) -> set[str]:
    """Give the functions that have these points."""
    return {name.split(":")[0] for name, _ in points}


def own_functions(victims: Victims, story: str) -> set[str]:
    """Give the functions that no story before this one passes."""
    known: set[str] = set()
    for earlier in itertools.takewhile(lambda other: other != story, (*STORIES, "boot")):
        known |= functions(points_of(victims, earlier))
    return functions(points_of(victims, story)) - known


def drawn(points: Points, *about: str, each: Iterable[str] = ()) -> Points:
    """Give all points, or one that the seed draws of each of some functions, or of any."""
    if ALL:
        return every(points, about[-1])
    chance = random.Random(f"{SEED} {about}")  # noqa: S311
    chosen = sorted(functions(points) & set(each)) or [chance.choice(sorted(functions(points)))]
    return tuple(chance.choice([p for p in points if p[0].split(":")[0] == f]) for f in chosen)


def every(points: Points, kind: str) -> Points:
    """Give all points at which a kind of fault can make a difference."""
    first = [point for point in points if point[1] == 1]
    if kind in COARSE:
        return tuple({name.split(":")[0]: (name, nth) for name, nth in reversed(first)}.values())
    return points if kind in TWICE else tuple(first)


def suites(about: str) -> Iterator[str]:
    """Give the suites in turn, from one on that differs from test to test and from seed to seed."""
    first = random.Random(f"{SEED} {about}").randrange(len(sandbox.SUITES))  # noqa: S311
    return itertools.islice(itertools.cycle(sandbox.SUITES), first, None)


def judge(victims: Victims, suite: str, result: Result, old: str, *, must: str = "") -> None:
    """See that the host is whole, and that a fresh push brings it to what the inventory says."""
    victim = victims[suite]
    lines = faults.look(victim.host)
    result.problems += faults.problems(lines)
    current = next((line.split()[1] for line in faults.fields(lines, "link") if line.startswith("current")), "")
    result.ended = result.ended if result.ended == "not reached" else "old" if current == old else "new"
    if (result.silent_s or 0) > SILENT_S and result.kind != "hangs before ready":
        result.problems.append(f"silent for {result.silent_s} s")
    if must and result.ended not in {must, "not reached"}:
        result.problems.append(f"is {result.ended}, must be {must}")
    try:
        assert victim.lab.complete()
        forward(victim)
    except (AssertionError, OSError) as error:
        result.problems.append(f"afterwards: {error}"[:600])
    if result.problems:
        victims.forget(suite)


def current(victim: Victim) -> str:
    """Give what is installed."""
    return sandbox.run(victim.host, "readlink", "/etc/labdeploy/current").stdout.strip()


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("story", STORIES)
def test_one_fault(victims: Victims, results: Path, story: str, kind: str, shard: int) -> None:
    """One fault at one step: the host is whole without anybody's help, and the next push works."""
    points = points_of(victims, story)
    each = own_functions(victims, story) if kind == "kill" else ()
    wrong: list[Result] = []
    chosen = drawn(points, story, kind, each=each)[shard :: len(SHARDS)]
    for point, suite in zip(chosen, suites(f"{story}{kind}{shard}"), strict=False):
        victim = victims[suite]
        words = prepare(victim, story)
        old = current(victim)
        result = victim.strike(kind, point, *words)
        result.story = story
        must = must_be(points, point, story) if kind in {"kill", "power"} else ""
        judge(victims, suite, result, old, must=must)
        faults.note(results, result)
        wrong += [result] if result.problems else []
    assert not wrong, "\n".join(map(str, wrong))


def must_be(points: Points, point: tuple[str, int], story: str) -> str:
    """Say what the host must be after the program ended at a point; around the very rename of `good`, either."""
    if story == "back":
        return "old"
    names = [name for name, _ in points]
    first = next(i for i, name in enumerate(names) if name.startswith(COMMITTED))
    last = next(i for i in range(first, len(names)) if not names[i].startswith((COMMITTED, "place:")))
    at = points.index(point)
    return "old" if at <= first else "new" if at >= last else ""


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("kind", ["kill", "power", "reboot", "readonly"])
def test_a_second_fault_while_it_boots(victims: Victims, results: Path, kind: str, shard: int) -> None:
    """The power goes in the middle of a push, and another fault strikes what puts things right at boot."""
    wrong: list[Result] = []
    last = commit_point(victims)
    each = own_functions(victims, "boot") if kind == "kill" else ()
    chosen = drawn(points_of(victims, "boot"), "boot", kind, each=each)[shard :: len(SHARDS)]
    for point, suite in zip(chosen, suites(f"boot{kind}{shard}"), strict=False):
        victim = victims[suite]
        words = prepare(victim, "boot")
        old = current(victim)
        result = victim.strike(kind, point, *words, before=((last, 1, "wait"),))
        result.story, result.kind = "boot", f"power, then {kind}"
        judge(victims, suite, result, old, must="old")
        faults.note(results, result)
        wrong += [result] if result.problems else []
    assert not wrong, "\n".join(map(str, wrong))


# --- faults that have a place of their own ---------------------------------------------------------------------------

BROKEN = {
    "crash at start": "#!/bin/sh\nexit 1\n",
    "crash after 5 s": '#!/bin/sh\n{runner} "$@" & sleep 5; kill -9 $!; exit 1\n',
    "hangs before ready": "#!/bin/sh\nexec sleep 600\n",
    "answers 500": "#!/bin/sh\nexec perl -MIO::Socket::INET -e '"
    "$s = IO::Socket::INET->new(LocalAddr => $ARGV[0], LocalPort => 8080, Listen => 9, ReuseAddr => 1) or exit 3;"
    'while ($c = $s->accept) {{ $l = <$c>; print $c ($l =~ /health/ ? "HTTP/1.0 200 OK\\r\\n\\r\\n" : '
    '"HTTP/1.0 500 No\\r\\n\\r\\n"); close $c }}\' {address}\n',
}


@pytest.mark.parametrize("kind", [*BROKEN, "unit fails verify"])
def test_a_service_that_is_no_good(victims: Victims, results: Path, kind: str) -> None:
    """A service that crashes, hangs, answers nonsense or is no valid unit: the old generation is back, and serves."""
    wrong: list[Result] = []
    for suite in itertools.islice(suites(kind), 3 if ALL else 1):
        old = current(victims[suite])
        result = push_no_good(victims[suite], kind)
        judge(victims, suite, result, old, must="old")
        faults.note(results, result)
        wrong += [result] if result.problems else []
    assert not wrong, "\n".join(map(str, wrong))


def push_no_good(victim: Victim, kind: str) -> Result:
    """Push a service that is no good, and say how that ended."""
    suite = victim.host.suite
    victim.turn += 1
    runner = "/usr/bin/llama-server" if suite == "sid" else "/usr/local/bin/llama-server"
    template = victim.lab.folder / "templates" / "llama-server.service.j2"
    if kind in BROKEN:
        script = victim.lab.folder / "broken"
        script.write_text(BROKEN[kind].format(runner=runner, address=victim.host.address))
        sandbox.copy_in(victim.host, script, "/usr/local/bin/broken", mode="0755")
        victim.lab.extra = {"runners": {"llama-server": "/usr/local/bin/broken"}}
    else:
        template.parent.mkdir(exist_ok=True)
        template.write_text('{% extends "base.service.j2" %}\n{% block restart %}\nRestartSec=abc\n{% endblock %}\n')
    victim.inventory(victim.turn)
    watcher = faults.Watcher(victim.host.address, victim.lab.port)
    watcher.start()
    code, out = victim.run("push", victim.host.name, "--watch", "7")
    result = Result(suite, "push", kind, "-", ended="hit", silent_s=round(watcher.stop(), 2))
    if code != (2 if kind == "unit fails verify" else 5):
        result.problems.append(f"exit code {code}: {out[-300:]}")
    victim.lab.extra = {}
    template.unlink(missing_ok=True)
    return result


# --- adoption --------------------------------------------------------------------------------------------------------

FOREIGN = "ollama.service"
ADOPTING = ("place_generation", "take_away", "bring_home", "restart_foreign", "tell_adopted")
ADOPT_KINDS = ("kill", "power", "reboot", "full", "readonly", "connection")
MAKE_FOREIGN = f"""
cd /etc/systemd/system && mkdir {FOREIGN}.d && printf '[Service]\\nEnvironment=MINE=1\\n' >{FOREIGN}.d/10-mine.conf &&
printf '[Service]\\nExecStart=/bin/sleep infinity\\n[Install]\\nWantedBy=default.target\\n' >{FOREIGN} &&
chmod 0600 {FOREIGN} && ln -s {FOREIGN} llm.service && systemctl daemon-reload && systemctl enable -q {FOREIGN} &&
systemctl start {FOREIGN}
"""
AS_FOUND = f"""
cd /etc/systemd/system && find . \\( -path '*ollama*' -o -name 'llm*' \\) -printf '%p %m %U %G %T@ %l\\n' | sort
sha256sum {FOREIGN} {FOREIGN}.d/*; systemctl is-enabled {FOREIGN}; systemctl is-active {FOREIGN}
systemctl show -p Environment -p NeedDaemonReload {FOREIGN}
"""


class Adopter:
    """A host with a unit that is not ours, and what it looked like."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        sandbox.run(victim.host, "sh", "-c", MAKE_FOREIGN)
        self.before = self.found()

    def found(self) -> str:
        """Give all that belongs to the foreign unit."""
        return sandbox.run(self.victim.host, "sh", "-c", AS_FOUND, check=False).stdout

    def words(self, story: str) -> list[str]:
        """Write the inventory that adopts or releases the unit, and give the command."""
        lab, name = self.victim.lab, self.victim.host.name
        if story == "adopt":
            lab.set(unit=FOREIGN)
            return ["push", name, "--watch", "0", "--adopt"]
        lab.write({"hosts": {name: lab._host(lab.host, {}) | {"services": {}}}})
        return ["push", name, "--watch", "0"]

    def problems(self) -> list[str]:
        """Say what is wrong: the host must be whole, and without our service all must be as it was found."""
        lines = faults.look(self.victim.host)
        ours = any(FOREIGN in line for line in faults.fields(lines, "same") + faults.fields(lines, "differs"))
        wrong = faults.problems(lines, (FOREIGN,) if ours else ())
        if not ours and (now := self.found()) != self.before:
            wrong.append(f"not as it was found: {now}")
        return wrong

    def to(self, story: str) -> list[str]:
        """Push to the end that a story has."""
        code, out = self.victim.run(*self.words(story))
        return ([] if code == 0 else [f"exit code {code}: {out[-300:]}"]) + self.problems()


class Adopters(Victims):
    """One host with a unit that is not ours for each suite, made when it is first asked for."""

    def __init__(self, *args: Any) -> None:  # noqa: ANN401
        super().__init__(*args)
        self._adopters: dict[str, Adopter] = {}

    def adopter(self, suite: str) -> Adopter:
        """Give the suite's host."""
        if suite not in self._adopters:
            self._adopters[suite] = Adopter(self.fresh(suite, "adopts"))
        return self._adopters[suite]


@pytest.fixture(scope="session")
def adopters(
    sandbox_dir: Path, tiny_model: Path, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adopters]:
    """Return the hosts with foreign units."""
    made = Adopters(sandbox_dir, tiny_model, program, tmp_path_factory)
    yield made
    made.end()


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("kind", ADOPT_KINDS)
@pytest.mark.parametrize("story", ["adopt", "release"])
def test_a_unit_that_was_there_before(adopters: Adopters, results: Path, story: str, kind: str, shard: int) -> None:
    """A fault while a foreign unit is adopted or given back never loses a byte, a mode or a link of it."""
    points = own_steps(adoption_points(adopters.adopter("sid"), story), kind)
    each = ADOPTING if kind in {"kill", "power"} else ()
    wrong: list[Result] = []
    chosen = drawn(points, story, kind, each=each)[shard :: len(SHARDS)]
    for point, suite in zip(chosen, suites(f"{story}{kind}{shard}"), strict=False):
        adopter = adopters.adopter(suite)
        before = adopter.to("release" if story == "adopt" else "adopt")
        result = adopter.victim.strike(kind, point, *adopter.words(story))
        result.story, result.silent_s = story, None  # the unit that was there answers nobody
        result.problems += before + adopter.problems() + adopter.to(story)
        faults.note(results, result)
        wrong += [result] if result.problems else []
    assert not wrong, "\n".join(map(str, wrong))


def own_steps(points: Points, kind: str) -> Points:
    """Leave out, of faults that cannot tell steps apart that a push has too, all but one step of each function."""
    if kind in {"kill", "power"}:
        return points
    once = {point[0].split(":")[0]: point for point in points}
    return tuple(p for p in points if p[0].split(":")[0] in ADOPTING or p in once.values())


@functools.cache
def adoption_points(adopter: Adopter, story: str) -> Points:
    """Give the points that an adoption or a release passes."""
    assert adopter.to("release" if story == "adopt" else "adopt") == []
    adopter.victim.order(("-", 1, "trace"))
    assert adopter.to(story) == []
    passed = list(dict.fromkeys(adopter.victim.trace()))
    adopter.victim.order()
    return tuple((point, 1) for point in passed)


# --- more than one at once -------------------------------------------------------------------------------------------


def test_two_controllers_at_once(victims: Victims) -> None:
    """Of two pushes that start together one wins whole; the other is told who holds the host, and changes nothing."""
    chance = random.Random(SEED)  # noqa: S311
    for attempt in range(40 if ALL else 4):
        victim = victims[sandbox.SUITES[attempt % 3]]
        victim.turn += 1
        victim.inventory(victim.turn)
        first = victim.start("push", victim.host.name, "--watch", "0")
        time.sleep(chance.random() * 0.5)
        second = victim.start("push", victim.host.name, "--watch", "0")
        said = [process.communicate(timeout=60)[0] for process in (first, second)]
        codes = sorted((first.returncode, second.returncode))
        assert codes in ([0, 6], [0, 0]), said
        if codes == [0, 0]:
            assert any("no changes" in text or "unchanged" in text for text in said), said
        else:
            assert any("another push" in text for text in said), said
        assert faults.problems(faults.look(victim.host)) == []


def test_confirmations_that_nobody_waits_for(victims: Victims) -> None:
    """A confirmation that is late, or for another push, is refused and changes nothing."""
    victim = victims["sid"]
    forward(victim)
    before = faults.look(victim.host)
    argv = sandbox.ssh_argv(victim.host, "sh /etc/labdeploy/bin/labdeploy-host confirm 20000101T000000Z-abcdef")
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "is not waiting here" in ended.stdout
    assert faults.look(victim.host) == before
    point = next(p for p, _ in points_of(victims, "push") if p.startswith("confirmed"))
    victim.turn += 1
    victim.inventory(victim.turn)
    old = current(victim)
    victim.order((point, 1, "wait"))
    process = victim.start("push", victim.host.name, "--watch", "0")
    assert victim.wait_for_hit(process)
    faults.end(process)
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "is not waiting here" in ended.stdout
    victim.go()
    victim.settled()
    victim.order()
    assert current(victim) == old
    assert faults.problems(faults.look(victim.host)) == []


def test_what_an_older_program_left_pending(victims: Victims) -> None:
    """A `pending` without what today's program stages beside it is undone as well."""
    victim = victims["trixie"]
    last = commit_point(victims)
    victim.turn += 1
    victim.inventory(victim.turn)
    old = current(victim)
    victim.order((last, 1, "wait"))
    process = victim.start("push", victim.host.name, "--watch", "0")
    assert victim.wait_for_hit(process)
    sandbox.run(
        victim.host,
        *("sh", "-c"),
        "cd /etc/labdeploy && rm undo/current undo/restored undo/committed undo/room"
        " && sed -i '/^phase/d; /^was_dis/d' pending",
    )
    sandbox.power_cut(victim.host)
    faults.end(process)
    sandbox.boot(victim.host)
    victim.settled()
    victim.order()
    assert current(victim) == old
    assert faults.problems(faults.look(victim.host)) == []
    forward(victim)


def test_an_old_service_waits_for_room(victims: Victims) -> None:
    """Where systemd cannot start the old service, for the disk is full to the last block, it is tried until it can."""
    victim = victims["trixie"]
    point = next(p for p, _ in points_of(victims, "back") if p.startswith("bring_back"))
    words = prepare(victim, "back")
    old = current(victim)
    victim.order((point, 1, "wait"))
    process = victim.start(*words)
    assert victim.wait_for_hit(process)
    # Room for fault-go and the first of the two folders that PrivateTmp= makes: with none, systemd does without them.
    sandbox.run(victim.host, "sh", "-c", "mount -t tmpfs -o nr_inodes=3 tmpfs /var/tmp")
    victim.go()
    time.sleep(3)
    said = sandbox.run(victim.host, "journalctl", "-b", "-u", "labdeploy-chat").stdout
    sandbox.run(victim.host, "sh", "-c", "umount -l /var/tmp")
    out, _ = process.communicate(timeout=60)
    victim.settled()
    victim.order()
    assert "No space left" in said
    assert process.returncode == 5, out
    assert "is back" in out, out
    assert current(victim) == old
    assert faults.problems(faults.look(victim.host)) == []


def test_a_push_that_ends_where_it_was_cut_leaves_no_marks(victims: Victims) -> None:
    """What says which services were brought back goes with the transaction, wherever the end of that is cut off."""
    victim = victims["bookworm"]
    cut = next(p for p, _ in points_of(victims, "back") if p.startswith("close:") and p.endswith(".1"))
    result = victim.strike("kill", (cut, 1), *prepare(victim, "back"))
    assert result.problems + faults.problems(faults.look(victim.host)) == []


def test_rollback_of_the_first_push_needs_no_journal(make_host: MakeHost, tiny_model: Path, tmp_path: Path) -> None:
    """What was there before the first push is a generation to go back to, by its link alone."""
    lab = Lab(tmp_path, [make_host("sid")], tiny_model)
    lab.push_ok()
    assert lab.on_host("readlink", "/etc/labdeploy/previous") == "gen/000000"
    lab.on_host("rm", "/etc/labdeploy/journal.jsonl")
    assert lab.run("rollback", lab.host.name).code == 0
    assert lab.show("LoadState") == "not-found"
