"""A vLLM that spans hosts: how its parts find each other, how each tells that it joined, and how all end as one.

vLLM's own multi-node mode (engine: mp): the first host's ranks wait at --master-port for those of the others. Or Ray
(engine: ray): each host's unit runs a node of a Ray cluster, and the first host's vLLM starts its ranks on all of them.
Facts are of vLLM 0.32.0 and Ray 2.60.0, read in v1/executor/multiproc_executor.py and distributed/parallel_state.py.
"""

from __future__ import annotations

import ipaddress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from labdeploy.runners.vllm_memory import MIB, RAY_STORE_MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labdeploy.runners.base import Part
    from labdeploy.runners.vllm_memory import Engine

ESTABLISHED, CLOSE_WAIT = "01", "08"  # in the kernel's table of sockets (include/net/tcp_states.h)
# What Ray is told of its own times (src/ray/common/ray_config_def.h): it waits 60 s for a head that is gone, though one
# that comes back is another cluster; and 30 s for its own agents, which took longer on a machine with much else to do.
RAY_TIMES = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10", "RAY_agent_register_timeout_ms": "120000"}
GONE_S = 5  # that vLLM gets to end by itself once a host of its span has left


def engine_of(engine: Engine) -> str:
    """Name what joins the hosts."""
    return engine.asked.engine or "mp"


def words(engine: Engine, part: Part) -> list[str]:
    """Write what a part's command line has beside that of a service on one host."""
    split = ["--pipeline-parallel-size", str(engine.pp)]
    split += [] if engine.gpus else ["--tensor-parallel-size", str(engine.tp)]
    if engine_of(engine) == "ray":
        return [*split, "--distributed-executor-backend", "ray"]
    nodes = ["--nnodes", str(engine.hosts), "--node-rank", str(part.rank)]
    head = ["--master-addr", part.addresses[0], "--master-port", str(engine.asked.joins_at)]
    return [*split, *nodes, *head, *(["--headless"] if part.rank else [])]


def env(engine: Engine, part: Part) -> dict[str, str]:
    """Name a part's address; which interface has it is looked up when it starts, unless it is the loopback one."""
    found = {"VLLM_HOST_IP": part.address}
    if ipaddress.ip_address(part.address).is_loopback:
        found |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
    if engine_of(engine) == "ray":
        found |= {"RAY_ADDRESS": f"{part.addresses[0]}:{engine.asked.joins_at}", "RAY_USAGE_STATS_ENABLED": "0"}
        found |= RAY_TIMES
    return found


def command(engine: Engine, part: Part, argv: tuple[str, ...]) -> tuple[str, ...]:
    """Give the whole command of a part: a shell that finds the interface, starts it, and ends it when others leave."""
    ray = " ".join(_ray(engine, part, PurePosixPath(argv[0]).with_name("ray")))
    if engine_of(engine) == "mp":
        script = _watched(engine, part)
    elif part.rank:
        return _shell(part, f"exec {ray} --block")
    else:
        script = f'{ray} || exit; exec "$@"'
    return (*_shell(part, script), *argv)


def _shell(part: Part, script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", _interface(part) + script, "span")


def facts(part: Part, engine: Engine, drain_s: int) -> dict[str, Any]:
    """Give what the unit of a worker says: how it knows that it joined, and how it waits for the head to end first."""
    joined = f"[ {_connections(engine, part)} -gt 0 ]"
    wait = f"n=0; while {joined} && [ $n -lt {drain_s} ]; do sleep 1; n=$((n+1)); done"
    return {"joined": joined, "let_go": ("/bin/sh", "-c", wait)} if part.rank else {}


def _interface(part: Part) -> str:
    """Find the interface that has the address: NCCL and gloo would take another one, or the loopback one."""
    if ipaddress.ip_address(part.address).is_loopback:
        return ""
    return (
        f"i=$(ip -o address show to {part.address} | cut -d' ' -f2 | head -n 1);"
        f' [ -n "$i" ] || {{ echo "no interface of this host has {part.address}" >&2; exit 1; }};'
        " export NCCL_SOCKET_IFNAME=$i GLOO_SOCKET_IFNAME=$i; "
    )


def _watched(engine: Engine, part: Part) -> str:
    """Run the rest of the words; once all ranks have been connected, end as soon as one is not any more.

    vLLM does not see it. Tried with 0.32.0: a worker whose head has gone waits for ever; a head whose worker was killed
    says 200 at /health until the next request fails. Restart=always then brings both back, and they join anew. A worker
    may also have joined and been left between two looks: its end of the connection is then still open.
    """
    ranks = len(engine.gpus) or 1
    ranks *= 1 if part.rank else engine.hosts
    left = f" || [ {_connections(engine, part, CLOSE_WAIT)} -gt 0 ]" if part.rank else ""
    return (
        "p=; stop=; trap 'stop=1; kill -TERM $p 2>/dev/null' TERM;"  # before there is anything that could be missed
        ' "$@" & p=$!; [ -z "$stop" ] || kill -TERM $p; all=;'
        " while sleep 1; kill -0 $p 2>/dev/null; do"
        f" if [ {_connections(engine, part)} -ge {ranks} ]; then all=1;"
        f' elif [ -n "$all" ]{left}; then echo "a host of the span has left: this one ends, to join again" >&2;'
        f" kill -TERM $p; (sleep {GONE_S}; kill -KILL $p) & wait $p; exit 1; fi;"
        " done; wait $p"
    )


def _connections(engine: Engine, part: Part, state: str = ESTABLISHED) -> str:
    """Count connections at the place where the span joins: to the first host, or on it.

    With the kernel's own table of sockets: vLLM says nothing when a host has joined, and ss may not be there.
    """
    port = f":{engine.asked.joins_at:04X}"
    anything = "[0-9A-F]+:[0-9A-F]{4}"
    ends = f"{anything} {_hex(part.addresses[0])}{port}" if part.rank else f"[0-9A-F]+{port} {anything}"
    return f'$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -cE "^ *[0-9]+: {ends} {state} ")'


def _hex(address: str) -> str:
    """Write an address as the kernel's table does: 32 bits at a time, lowest byte first; IPv4 in IPv6 sockets too."""
    ip = ipaddress.ip_address(address)
    words = [ip.packed[i : i + 4][::-1].hex().upper() for i in range(0, len(ip.packed), 4)]
    return f"(0000000000000000FFFF0000)?{words[0]}" if ip.version == 4 else "".join(words)  # noqa: PLR2004


def _ray(engine: Engine, part: Part, ray: PurePosixPath) -> Iterator[str]:
    yield f"{ray} start --node-ip-address={part.address} --num-gpus={len(engine.gpus)} --disable-usage-stats"
    yield f"--object-store-memory={RAY_STORE_MIB * MIB}"
    if part.rank:
        yield f"--address={part.addresses[0]}:{engine.asked.joins_at}"
    else:
        yield f"--head --port={engine.asked.joins_at} --include-dashboard=false"
