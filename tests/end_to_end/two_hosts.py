"""Two hosts as two network namespaces of this machine, joined by a veth pair that can be cut and restored."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.end_to_end.command import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "wire"


def missing() -> str:
    """Why no namespaces can be had here; empty where they can."""
    if os.geteuid() != 0:
        return "not root, who alone makes network namespaces"
    if shutil.which("ip") is None:
        return "ip not installed (Debian: iproute2)"
    probe = f"fastssl-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "this kernel or container allows no network namespaces"
    _ip("netns", "delete", probe)
    return ""


class TwoHosts:
    """Host 0 and host 1, each with its own network; files, CPUs and host name are this machine's."""

    def __init__(self, names: tuple[str, str]):
        self.names = names

    def start(self, host: int, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        """Run `command` on a host, in a process group of its own, both outputs to `log`, in the folder of `log`.
        gloo is told which network to use, for both hosts answer to one name."""
        env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": INTERFACE} | environment
        with log.open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                cwd=log.parent,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def cut(self) -> None:
        """Break the link: packets are lost both ways, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", INTERFACE, "down")

    def restore(self) -> None:
        """Mend it: what is sent again arrives."""
        _ip("-n", self.names[0], "link", "set", INTERFACE, "up")


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """The pair; whatever still runs on it is killed at the end."""
    hosts = TwoHosts((f"fastssl-{os.getpid()}-0", f"fastssl-{os.getpid()}-1"))
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        ends = (("name", INTERFACE, "netns", name) for name in hosts.names)
        _ip("link", "add", *next(ends), "type", "veth", "peer", *next(ends))
        for name, address in zip(hosts.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _ip("-n", name, "link", "set", interface, "up")
        yield hosts
    finally:
        for name in hosts.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            subprocess.run(["kill", "-KILL", *pids.split()], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
