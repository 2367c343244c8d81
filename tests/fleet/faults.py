"""Faults at every step of the host program: where they can strike, how they are made, and what must hold afterwards.

The program that is sent to a host is the one in labdeploy/apply.sh with a call of `_point` before every command of
the functions that change something. A point does nothing until /var/tmp/fault on the host names it. So new code gets
new points by itself, and the shipped program has no hooks for tests.

`python faults.py PROGRAM ARGUMENT...` is the labdeploy command with that program in the place of its own, and with
what lies beside it for Ollama.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labdeploy import sandbox, sandbox_boot
from labdeploy.errors import LabdeployError
from labdeploy.sandbox_host import machine_lock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lab import Lab

    from labdeploy.sandbox import SandboxHost

ALL = os.environ.get("LABDEPLOY_FAULTS") == "all"
SEED = os.environ.get("LABDEPLOY_FAULT_SEED") or f"{dt.datetime.now(dt.UTC):%Y%m%d}"
CONFIRM_S = 2
KEEP = 3
DEADLINE_S = 20  # a service's time to start; a tiny model needs less than one second
SETTLED_S = 60  # within which a host must be whole again, whatever happened
SHIPPED = Path(sys.modules["labdeploy"].__file__ or "").parent
LOOKING = {  # functions that only look, or run outside of a transaction; all others have points
    *("emit", "one_line", "generation", "number", "units_in", "units_of", "service_of", "generations", "centiseconds"),
    *("seconds_since", "refuse", "names_json", "load_service", "show", "directives", "drift", "unit_states", "option"),
    *("without", "room", "port_free", "disk_fast_enough", "foreign", "foreign_paths", "describe", "last_words", "http"),
    *("gpu_in_use", "unhealthy", "state", "history", "files", "confirm", "would", "fail", "intent", "load_pending"),
    *("not_running", "drifted_units", "compare_units", "locked", "refuse_drift", "touched_since", "preflight_service"),
    *("pids_of", "as_nobody", "facts_for_proof", "held", "deny", "waiting", "denied"),
    *("identity", "stores_in", "store_whole", "stale_stores", "preflight_version", "preflight_store", "refuse_link"),
    *("version_suits", "sum_of", "ladder_ollama", "rung_version", "rung_loaded", "rung_placed", "rung_token"),
    *("model_digest",),
}
_CHANGING = "mv|rm|sync|cp|ln|mkdir|durable|place|put|turn|close|prune|systemctl|take_away|bring_home|uninstall"
POINT = r"""
_point() {
    _f_rc=$?
    [ ! -e /var/tmp/fault ] || _fault "$1"
    return $_f_rc
}
_fault() {
    read -r _f_want _f_nth _f_kind </var/tmp/fault || return
    if [ "$_f_kind" = trace ]; then echo "$1" >>/var/tmp/fault-trace; return; fi
    [ "$_f_want" = "$1" ] || return
    if [ "$_f_nth" -gt 1 ]; then
        _f_all=$(sed "1s/.*/$_f_want $((_f_nth - 1)) $_f_kind/" /var/tmp/fault)
        printf '%s\n' "$_f_all" >/var/tmp/fault
        return
    fi
    _f_rest=$(sed 1d /var/tmp/fault)
    rm -f /var/tmp/fault
    [ -z "$_f_rest" ] || printf '%s\n' "$_f_rest" >/var/tmp/fault
    cut -d' ' -f1,22 /proc/$$/stat >/var/tmp/fault-who
    echo "$1 $_f_kind" >>/var/tmp/fault-hit
    case $_f_kind in
        kill) kill -9 $$; exit 1 ;;
        full) head -c 1G /dev/zero >/filler 2>/dev/null; head -c 100k /dev/zero >/filler2 2>/dev/null ;;
        readonly) mount --bind /etc /etc; mount -o remount,bind,ro /etc ;;
        reload) mount -o "remount,size=$(($(df -k --output=used /run | tail -n 1) + 9000))k" /run ;;
        wait) until [ -e /var/tmp/fault-go ]; do sleep 0.02; done ;;
    esac
}
"""

# --- points ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """The host program with points in it."""

    text: str
    points: dict[str, str]
    """Name of a point to the function it is in."""


def instrument(text: str) -> Program:
    """Put points into the program: before each command of a function, between the commands of a list, at its end."""
    out: list[str] = []
    points: dict[str, str] = {}
    function, inside, cases, heredoc, continued = "", False, 0, "", False

    def point(number: int, part: int = 0) -> str:
        name = f"{function}:{number}" + (f".{part}" if part else "")
        points[name] = function
        return f"_point {name}"

    for number, line in enumerate(text.split("\n"), 1):
        bare = line.strip()
        if heredoc:
            heredoc = "" if bare == heredoc else heredoc
            out.append(line)
            continue
        if start := re.match(r"([a-z_]+)\(\) \{(?P<rest>.*)", line):
            function, inside = start[1], not re.search(r"\}\s*(#.*)?$", start["rest"])
            out.append(line)
            continue
        if inside and line == "}":
            if function not in LOOKING:
                out.append("    " + point(number))
            inside = False
            out.append(line)
            continue
        code = re.sub(r"\s#\s.*", "", bare)
        first = inside and function not in LOOKING and not continued and cases == 0
        plain = not re.match(r"(else|elif|then|do\b|done|fi|esac|\)|\}|;;|#|$)", bare)
        if first and plain:
            out.append(line[: len(line) - len(line.lstrip())] + point(number))
        if inside and function not in LOOKING and "'" not in code:
            line = _between(line, number, point)  # noqa: PLW2901
        out.append(line)
        cases += len(re.findall(r"\bcase\b.*\bin\b", code)) - len(re.findall(r"\besac\b", code))
        continued = bool(re.search(r"(\\|&&|\|)$", code))
        if found := re.search(r"<<'?([A-Z]+)'?", code):
            heredoc = found[1]
    whole = "\n".join(out).replace("\nset -u -f\n", "\nset -u -f\n" + POINT, 1)
    return Program(whole, points)


def _between(line: str, number: int, point: Any) -> str:  # noqa: ANN401
    """Put points between the commands of a list that is written on one line."""
    parts = 0

    def put(match: re.Match[str]) -> str:
        nonlocal parts
        parts += 1
        return f"{match[1]} {point(number, parts)}{';' if match[1] == 'do' else ' &&'} {match[2]}"

    return re.sub(rf"(&&|\bdo) ({_CHANGING})\b", put, line)


def write_program(folder: Path) -> Path:
    """Write the program with points, and with shorter waits and fewer kept generations, and give its main file."""
    for name in ("ollama.sh", "apply.sh"):
        (folder / name).write_text(instrument((SHIPPED / name).read_text(encoding="utf-8")).text)
    text = re.sub(r"\nKEEP=\d+", f"\nKEEP={KEEP}", (folder / "apply.sh").read_text())
    text = text.replace("deadline_s) deadline_s=$_value", f"deadline_s) deadline_s={DEADLINE_S}")
    assert text.count(f"deadline_s={DEADLINE_S}") == 1
    (folder / "apply.sh").write_text(text)
    return folder / "apply.sh"


# --- looking at the service from outside -----------------------------------------------------------------------------


class Watcher(threading.Thread):
    """Asks a service whether it is ready, all the time, and adds up how long it was not."""

    def __init__(self, address: str, port: int) -> None:
        super().__init__(daemon=True)
        self._at = (address, port)
        self._end = threading.Event()
        self.longest_s = 0.0

    def run(self) -> None:
        """Ask until told to stop."""
        since: float | None = None
        while not self._end.is_set():
            asked = time.monotonic()
            if self._answers():
                since = None
            else:
                since = since or asked
                self.longest_s = max(self.longest_s, time.monotonic() - since)
            time.sleep(0.03)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(self._at, timeout=1) as connection:
            connection.settimeout(1)
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(64)
        return False

    def stop(self) -> float:
        """Stop, and give the longest time without an answer."""
        self._end.set()
        self.join()
        return self.longest_s


# --- a disk of its own -----------------------------------------------------------------------------------------------


def on_small_disk(host: SandboxHost, size_mib: int = 160) -> SandboxHost:
    """Move a host's files to an ext4 file system of its own, which can fill up, break and lose what was not synced."""
    sandbox.power_cut(host)
    image = image_of(host)
    image.unlink(missing_ok=True)
    subprocess.run(["truncate", "-s", f"{size_mib}M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    aside = host.folder.with_name(f"{host.name}.aside")
    with machine_lock():  # whoever brings up another host now would take a host without its folder for a deleted one
        host.folder.rename(aside)
        host.folder.mkdir()
        mount(host)
        subprocess.run(["cp", "-a", f"{aside}/.", host.folder], check=True)
    subprocess.run(["rm", "-rf", aside], check=True)
    sandbox.boot(host)
    return host


def image_of(host: SandboxHost) -> Path:
    """Give the file that a host's disk is in."""
    return host.state_dir / f"{host.name}.img"


def mount(host: SandboxHost) -> None:
    """Mount the host's disk; a journal that was cut off is replayed."""
    subprocess.run(["mount", "-o", "loop", image_of(host), host.folder], check=True)


def write_back(host: SandboxHost) -> None:
    """Make all that is on the host's disk now durable, so that only what comes later can be lost."""
    subprocess.run(["sync", "--file-system", host.folder], check=True)


def unmount(host: SandboxHost) -> None:
    """Take the disk of a host away that is off."""
    subprocess.run(["umount", "-l", host.folder], check=False)


# --- what must hold afterwards ---------------------------------------------------------------------------------------

_LOOK = r"""
cd /etc/labdeploy 2>/dev/null || exit 0
for link in current good previous; do echo "link $link $(readlink $link)"; done
ls -A | sed 's/^/top /'; ls -A bin | sed 's/^/bin /'; ls -A adopted | sed 's/^/adopted /'
ls gen | sed 's/^/gen /'
for g in gen/*; do
    [ $g = gen/000000 ] || (cd $g && sha256sum --quiet -c SHA256SUMS >/dev/null 2>&1) || echo "damaged $g"
done
ls -A /run/labdeploy 2>/dev/null | sed 's/^/run /'
cd /etc/systemd/system
for u in $(cut -d' ' -f1 /etc/labdeploy/current/units 2>/dev/null); do
    cmp -s $u /etc/labdeploy/current/systemd/$u && echo "same $u" || echo "differs $u"
    pid=$(systemctl show -p MainPID --value $u)
    echo "process $u $(systemctl is-active $u) $(tr '\0' ' ' </proc/$pid/cmdline 2>/dev/null)"
    echo "wanted $u $(grep -o -e '--ctx-size [0-9]*' $u | head -n 1)"
    [ "$(systemctl show -p NeedDaemonReload --value $u)" = no ] || echo "unread $u"
done
find . -name 'labdeploy-*' -printf 'file %P %y\n'
find . -name '.labdeploy*' -o -name '*.new' | sed 's/^/stray /'
systemctl list-units --all --plain --no-legend 'labdeploy-*' | sed 's/^/unit /'
systemctl list-jobs --no-legend | sed 's/^/job /'
sed 's/^/journal /' /etc/labdeploy/journal.jsonl
"""


def look(host: SandboxHost) -> list[str]:
    """Give all that matters of a host's state."""
    return sandbox.run(host, "sh", "-c", _LOOK, check=False).stdout.splitlines()


def fields(lines: Iterable[str], kind: str) -> list[str]:
    """Give the lines of a kind, without it."""
    return [line[len(kind) + 1 :] for line in lines if line.startswith(kind + " ")]


def problems(lines: list[str], adopted: tuple[str, ...] = ()) -> list[str]:
    """List what is wrong with a host that should be whole."""
    found: list[str] = []
    links = dict(line.split(" ", 1) for line in fields(lines, "link"))
    if links and links["current"] != links["good"] and (links["current"], links["good"]) != ("gen/000000", ""):
        found.append(f"current {links['current']}, good {links['good']}")
    if links.get("current", "gen/000000") != "gen/000000" and links["previous"] in {"", links["current"]}:
        found.append(f"previous is {links['previous'] or 'missing'}")
    strays = set(fields(lines, "top")) - {"gen", "bin", "adopted", "current", "good", "previous", "journal.jsonl"}
    found += [f"stray {name}" for name in sorted(strays)]
    found += [f"stray bin/{name}" for name in fields(lines, "bin") if name != "labdeploy-host"]
    found += [f"stray adopted/{name}" for name in fields(lines, "adopted") if name not in adopted]
    found += [f"stray /run/labdeploy/{name}" for name in fields(lines, "run")]
    found += [line for line in lines if line.startswith(("damaged", "differs", "unread", "stray", "job"))]
    units = fields(lines, "same") + fields(lines, "differs")
    ours = [u for u in units if u.startswith("labdeploy-")]
    files = {line for line in fields(lines, "file") if "labdeploy-recover" not in line}
    wanted = {f"{u} f" for u in ours} | {f"multi-user.target.wants/{u} l" for u in ours}
    found += [f"missing {name}" for name in sorted(wanted - files)]
    found += [f"stray {name}" for name in sorted(files - wanted)]
    sizes = dict(line.split(" ", 1) for line in fields(lines, "wanted"))
    for line in fields(lines, "process"):
        unit, state, command = line.split(" ", 2)
        if state != "active" or sizes[unit] not in command:
            found.append(f"{unit} is {state} and runs: {command[-80:]}, wanted {sizes[unit]}")
    for line in fields(lines, "unit"):
        name, state = line.split()[0], " ".join(line.split()[1:4])
        if name not in units and name != "labdeploy-recover.service":
            found.append(f"unit {name} {state}")
        if name == "labdeploy-recover.service" and ("failed" in state or "activating" in state):
            found.append(f"unit {name} {state}")
    return found + _journal_problems(fields(lines, "journal"), links.get("current", ""))


def _journal_problems(journal: list[str], current: str) -> list[str]:
    events = []
    for line in journal:
        try:
            events.append(json.loads(line))
        except ValueError:
            return [f"journal: not JSON: {line[-60:]}"]
    said = [(event["push_id"], event["event"]) for event in events]
    found = [f"journal: {pair} twice" for pair in set(said) if said.count(pair) > 1]
    if events and events[-1]["to"] != int(current.removeprefix("gen/") or 0):
        found.append(f"journal ends with {events[-1]}, but current is {current}")
    return found


# --- a host under faults ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    """How one fault ended."""

    suite: str
    story: str
    kind: str
    point: str
    ended: str = "not reached"
    silent_s: float | None = 0.0
    """None where no service is to answer all the while."""
    problems: list[str] = field(default_factory=list)


@dataclass
class Victim:
    """A host with the service `chat` and one that comes and goes, pushed with the program that has points."""

    lab: Lab
    program: Path
    turn: int = 0

    @property
    def host(self) -> SandboxHost:
        """The host."""
        return self.lab.host

    def inventory(self, turn: int, **settings: Any) -> None:  # noqa: ANN401
        """Write inventory number `turn`: `chat` changes, and a second service is another one each time."""
        second = {"runner": "llama-server", "model": "tiny", "bind": self.host.address, "cache_ram": "0MiB"}
        self.lab.services = {f"extra{turn % 2}": second | {"port": 8090 + turn % 2, "ctx_size": 512}}
        self.lab.set(**({"ctx_size": 1024 + 256 * (turn % 8)} | settings))

    def argv(self, *words: str) -> list[str]:
        """Give the command line of labdeploy with the program that has points."""
        return [sys.executable, __file__, str(self.program), *words]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start labdeploy."""
        return subprocess.Popen(
            self.argv(*words),
            cwd=self.lab.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        """Run labdeploy to its end."""
        process = self.start(*words)
        out, _ = process.communicate(timeout=120)
        return process.returncode, out

    def push(self, *words: str) -> tuple[int, str]:
        """Push."""
        return self.run("push", self.host.name, "--watch", "0", *words)

    # --- files in the host, from outside; they do not need its shell

    def _path(self, name: str) -> Path:
        return Path(f"/proc/{sandbox_boot.leader(self.host.address)}/root/var/tmp/{name}")

    def order(self, *faults: tuple[str, int, str]) -> None:
        """Name the points at which something happens, one after another."""
        for name in ("fault", "fault-hit", "fault-go", "fault-trace", "fault-who"):
            self._path(name).unlink(missing_ok=True)
        if faults:
            self._path("fault").write_text("".join(f"{p} {n} {k}\n" for p, n, k in faults))

    def hits(self) -> list[str]:
        """Give the points that were hit."""
        with suppress(OSError):
            return self._path("fault-hit").read_text().splitlines()
        return []

    def go(self) -> None:
        """Let a point that waits go on."""
        self._path("fault-go").touch()

    def trace(self) -> list[str]:
        """Give the points that were passed."""
        with suppress(OSError):
            return self._path("fault-trace").read_text().splitlines()
        return []

    # --- waiting

    def settled(self) -> None:
        """Wait until nothing of labdeploy runs on the host or waits to be undone."""
        deadline = time.monotonic() + SETTLED_S
        while time.monotonic() < deadline:
            with suppress(LabdeployError):
                if sandbox.run(self.host, "sh", "-c", _SETTLED, check=False).returncode == 0:
                    return
            time.sleep(0.1)

    def wait_for_hit(self, process: subprocess.Popen[str], count: int = 1) -> bool:
        """Wait until a point was hit, or all is over without."""
        over: float | None = None
        while len(self.hits()) < count:
            if process.poll() is not None:
                over = over or time.monotonic() + 2
                if time.monotonic() > over:
                    return False
            time.sleep(0.02)
        return True

    def make(self, kind: str, process: subprocess.Popen[str]) -> None:
        """Do from outside what a kind of fault needs, at the point that waits now."""
        if kind == "controller":
            process.kill()
            self.go()
        elif kind == "sleep":  # a laptop that falls asleep: the connection stays open, nobody answers
            process.send_signal(19)
            self.go()
            time.sleep(CONFIRM_S + 1)
            self.settled()
            process.send_signal(18)
        elif kind == "connection":
            sandbox.run(self.host, "sh", "-c", _CUT, check=False)
            self.go()
        elif kind == "power":
            sandbox.power_cut(self.host)
            sandbox.boot(self.host)
        elif kind == "reboot":
            threading.Timer(0.4, self._go_if_up).start()
            sandbox.reboot(self.host)
        elif kind == "full":
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=8)
            self._freed("rm -f /filler /filler2")
        elif kind == "readonly":
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
            self._freed("while mountpoint -q /etc; do umount -l /etc; done")
        elif kind == "reload":
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=4)
            self._freed("mount -o remount,size=512m /run")

    def _freed(self, command: str) -> None:
        sandbox.run(self.host, "sh", "-c", command, check=False)

    def _go_if_up(self) -> None:
        with suppress(OSError):
            self.go()

    def strike(
        self, kind: str, point: tuple[str, int], *words: str, before: tuple[tuple[str, int, str], ...] = ()
    ) -> Result:
        """Run labdeploy with one fault at one point, wait until all is over, and judge the host."""
        name = "kill" if kind == "kill" else kind if kind in {"full", "readonly", "reload"} else "wait"
        self.order(*before, (*point, name))
        result = Result(self.host.suite, " ".join(words), kind, f"{point[0]} ({point[1]})")
        watcher = Watcher(self.host.address, self.lab.port)
        watcher.start()
        process = self.start(*words)
        try:
            for count, (_, _, first) in enumerate(before, 1):
                if first == "wait" and self.wait_for_hit(process, count):
                    self._reboot_in_fault(len(before), name)
            if self.wait_for_hit(process, len(before) + 1):
                result.ended = "hit"
                self.make(kind, process)
            out, _ = process.communicate(timeout=120)
        finally:
            end(process)
        self.settled()
        self.order()
        time.sleep(0.1)
        result.silent_s = round(watcher.stop(), 2)
        if "Traceback" in out or "unexpected:" in out:
            result.problems.append(out[-300:])
        return result

    def _reboot_in_fault(self, count: int, name: str) -> None:
        """Cut the power, and boot without waiting: the next fault strikes while the host boots."""
        sandbox.power_cut(self.host)
        if name == "wait":
            sandbox._start(self.host)
            deadline = time.monotonic() + 20
            while len(self.hits()) <= count and time.monotonic() < deadline:
                time.sleep(0.02)
        else:
            sandbox.boot(self.host)


def forward(victim: Victim) -> None:
    """Push the next inventory to a victim; it must end well, and the host must be whole."""
    victim.turn += 1
    victim.inventory(victim.turn)
    code, out = victim.push()
    assert code == 0, out
    assert problems(look(victim.host)) == []


def end(process: subprocess.Popen[str]) -> None:
    """Kill the controller and close what it was read through."""
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


_SETTLED = r"""
if read -r pid since 2>/dev/null </var/tmp/fault-who; then # the shell that was hit may yet start a transaction
    [ "$(cut -d' ' -f22 /proc/$pid/stat 2>/dev/null)" != "$since" ] || exit 1
fi
[ ! -e /etc/labdeploy/pending ] && [ ! -e /run/labdeploy/txn ] && [ -z "$(systemctl list-jobs --no-legend)" ] || exit 1
for unit in labdeploy-txn labdeploy-recover; do
    [ "$(systemctl show -p ActiveState --value $unit)" = inactive ] || exit 1
done
"""
_CUT = r"""
for p in /proc/[0-9]*; do
    case $(tr '\0' ' ' <$p/cmdline 2>/dev/null) in
        'sshd: root'* | 'sshd-session: root'*) kill -9 ${p#/proc/} ;;
    esac
done
"""

# --- the table -------------------------------------------------------------------------------------------------------


def note(file: Path, result: Result) -> None:
    """Append a result to the file that all workers share."""
    with file.open("a") as out:
        out.write(json.dumps(asdict(result)) + "\n")


def table(file: Path) -> str:
    """Give the table of all results: tried, consistent, and how long the service was silent."""
    results = [Result(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    seed = "all of them" if ALL else f"drawn with LABDEPLOY_FAULT_SEED={SEED}"
    lines = [f"Faults, {seed}:", f"{'fault':<28}{'tried':>7}{'consistent':>12}{'silent, median':>16}{'longest':>9}"]
    for kind in [*sorted({result.kind for result in results}), ""]:
        some = [result for result in results if kind in {"", result.kind} and result.ended != "not reached"]
        if some:
            silent = [result.silent_s for result in some if result.silent_s is not None] or [0.0]
            good = sum(not result.problems for result in some)
            name = kind or "all"
            lines.append(f"{name:<28}{len(some):>7}{good:>12}{statistics.median(silent):>14.1f} s{max(silent):>7.1f} s")
    return "\n".join(lines)


def main(program: str, *argv: str) -> int:
    """Run labdeploy with another host program and shorter waits."""
    import functools  # noqa: PLC0415

    import labdeploy.host  # noqa: PLC0415
    from labdeploy import __main__, deploy  # noqa: PLC0415

    made, shipped = Path(program), labdeploy.host.program
    texts = {file.name: file.read_bytes() for file in (made, made.with_name("ollama.sh"))}
    labdeploy.host.program = functools.cache(lambda name="apply.sh": texts.get(name) or shipped(name))
    deploy.CONFIRM_S = CONFIRM_S
    (deploy.run_jobs.__kwdefaults__ or {})["watch_s"] = 0
    return __main__.run(list(argv))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
