"""Networks for ranks that a script starts: loopback, or namespaces joined by links of limited rate.

A limited link needs Linux, root, and the commands ip and tc (package iproute2).
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from stdit.errors import UserError

PACKET_BYTES = 9000
"""MTU of a link. Links of clusters have such large packets; small ones would cost this machine's CPUs too much."""
TCP_BUFFER = "4096 16777216 33554432"
"""Smallest, initial and largest TCP buffer in bytes, as large as on hosts of clusters; with small buffers gloo's two
directions wait for each other."""
TCP = (
    f"tcp_rmem={TCP_BUFFER}",
    f"tcp_wmem={TCP_BUFFER}",
    "tcp_congestion_control=reno",
    "tcp_slow_start_after_idle=0",
)
"""Settings of the namespaces. Networks of clusters lose no packets and have no slow start; bbr, the default of some
systems, all but stops a connection for 0.2 s every ten seconds to measure it."""


class Network(NamedTuple):
    """Where ranks run."""

    name: str
    prefixes: list[list[str]]
    """By rank, what its command begins with; empty: any number of ranks, without a prefix."""
    environment: dict[str, str]


LOOPBACK = Network("loopback", [], {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})


class NoLinkError(Exception):
    """This machine cannot join namespaces by links of limited rate; the message says why."""


@contextmanager
def limited_link(rate: str, ranks: int = 2) -> Iterator[Network]:
    """Make a network namespace for each rank, joined by a switch; each sends and receives at most ``rate``.

    Raises:
        NoLinkError: if this machine cannot do that.
        UserError: if ``rate`` is not such as "200mbit".
    """
    burst = max(
        4 * PACKET_BYTES, megabits(rate) * 125
    )  # bytes that may pass at once: of a millisecond, or more
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        raise NoLinkError("it needs Linux, root, and the commands ip and tc (package iproute2)")
    switch = f"stdit-{os.getpid()}-switch"
    spaces = [f"stdit-{os.getpid()}-{rank}" for rank in range(ranks)]
    queue = "1s"  # long enough that no packet is lost
    shape = ["root", "tbf", "rate", rate, "burst", str(burst), "latency", queue]
    try:
        for space in (switch, *spaces):
            _run("ip", "netns", "add", space)
        _run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge0", "mtu", str(PACKET_BYTES), "up")
        for rank, space in enumerate(spaces):
            port = f"port{rank}"
            pair = f"link add link0 netns {space} type veth peer name {port} netns {switch}"
            _run("ip", *pair.split())
            _run("ip", "-n", space, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "link0")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            for at, device in ((space, "link0"), (switch, port)):
                _run("ip", "-n", at, "link", "set", device, "mtu", str(PACKET_BYTES), "up")
                _run("tc", "-n", at, "qdisc", "add", "dev", device, *shape)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge0")
            for setting in TCP:
                _run("ip", "netns", "exec", space, "sysctl", "-qw", f"net.ipv4.{setting}")
        prefixes = [["ip", "netns", "exec", space] for space in spaces]
        _run(*prefixes[0], "true")
        yield Network(rate, prefixes, {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "link0"})
    finally:
        for space in (*spaces, switch):  # the devices are removed with them
            subprocess.run(["ip", "netns", "delete", space], stderr=subprocess.DEVNULL)


def megabits(rate: str) -> int:
    """Return a rate such as "200mbit" or "1gbit" in Mbit/s. Raises UserError for anything else."""
    number, unit = rate[:-4], rate[-4:]
    if unit not in ("mbit", "gbit") or not number.isdecimal() or int(number) < 1:
        raise UserError(f"--rate {rate}: must be a whole number of mbit or gbit a second, such as 200mbit")
    return int(number) * (1000 if unit == "gbit" else 1)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise NoLinkError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
