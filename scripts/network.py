"""Networks for ranks that a script starts: loopback, or two namespaces joined by a link of limited rate.

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


class Network(NamedTuple):
    """Where ranks run."""

    name: str
    prefixes: list[list[str]]
    """By rank, what its command begins with; empty: any number of ranks, without a prefix."""
    environment: dict[str, str]


LOOPBACK = Network("loopback", [], {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"})


class NoLinkError(Exception):
    """This machine cannot join two namespaces by a link of limited rate; the message says why."""


@contextmanager
def limited_link(rate: str) -> Iterator[Network]:
    """Make two network namespaces, joined by a pair of virtual Ethernet devices that each send at most ``rate``.

    Raises:
        NoLinkError: if this machine cannot do that.
        UserError: if ``rate`` is not such as "200mbit".
    """
    burst = max(
        128 * 1024, megabits(rate) * 125
    )  # bytes that may pass at once: those of a millisecond, or more
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        raise NoLinkError("it needs Linux, root, and the commands ip and tc (package iproute2)")
    spaces = [f"stdit-{os.getpid()}-{end}" for end in "ab"]
    try:
        for space in spaces:
            _run("ip", "netns", "add", space)
        ends = [["link0", "netns", space] for space in spaces]
        _run("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, space in enumerate(spaces, 1):
            _run("ip", "-n", space, "address", "add", f"10.77.0.{number}/24", "dev", "link0")
            for device in ("lo", "link0"):
                _run("ip", "-n", space, "link", "set", device, "up")
            _run("ip", "-n", space, "link", "set", "link0", "mtu", str(PACKET_BYTES))
            for way in ("tcp_rmem", "tcp_wmem"):
                _run("ip", "netns", "exec", space, "sysctl", "-qw", f"net.ipv4.{way}={TCP_BUFFER}")
            shape = ["tbf", "rate", rate, "burst", str(burst), "latency", "50ms"]
            _run("tc", "-n", space, "qdisc", "add", "dev", "link0", "root", *shape)
        prefixes = [["ip", "netns", "exec", space] for space in spaces]
        _run(*prefixes[0], "true")
        yield Network(rate, prefixes, {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "link0"})
    finally:
        for space in spaces:  # the devices are removed with them
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
