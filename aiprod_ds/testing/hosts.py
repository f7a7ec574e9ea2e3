"""Two hosts on one machine, for tests of what happens between hosts: Linux namespaces with addresses and sshd
of their own.

Each host has its own network, processes, name and /etc/hosts; the file system is shared, as a cluster's run
folders are. Traffic stays between them. Everything ends with the processes that hold the namespaces, which
end with this one. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NEEDED = {
    "unshare": "util-linux",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
}
_NAMESPACES = (
    "unshare",
    "--net",
    "--pid",
    "--mount",
    "--uts",
    "--ipc",
    "--fork",
    "--kill-child=KILL",
    "--mount-proc",
)
_NETWORK = "10.77.0"
_START_SECONDS = 20.0
_HOST = """\
set -e
hostname "$1"
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind "$3/hosts" /etc/hosts
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add "$2/24" dev eth0
ip link set eth0 up
exec "$4" -D -e -f "$3/sshd_config"
"""
_SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
_SSH = """\
Host *
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""

Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualHosts:
    """Running hosts.

    Attributes:
        names: Of the hosts, as they know each other.
        ssh_config: For `ssh -F`: keys and known hosts made for this test.
        holders: The first process of each host, as this machine numbers it.
    """

    names: tuple[str, ...]
    ssh_config: Path
    holders: tuple[int, ...]

    def start(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str], output: Path
    ) -> Process:
        """Starts a command on a host; it ends with the host at the latest. `output` gets what it says."""
        entered, variables = [*self._enter(name), *command], dict(environment)
        with output.open("ab") as file:
            return subprocess.Popen(
                entered, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def run(
        self, name: str, command: Sequence[str], *, timeout_seconds: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a short command on a host and returns its end, whatever it was."""
        entered = [*self._enter(name), *command]
        return subprocess.run(entered, capture_output=True, text=True, timeout=timeout_seconds, check=False)

    def _enter(self, name: str) -> list[str]:
        holder = self.holders[self.names.index(name)]
        enter = ["nsenter", "--target", str(holder), "--mount", "--uts", "--ipc", "--net", "--pid", "--"]
        return [*enter, "env", "-C", str(Path.cwd())]


def why_no_virtual_hosts() -> str | None:
    """Returns what this machine lacks for `virtual_hosts`; None if nothing."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root, to make namespaces"
    missing = sorted({package for tool, package in _NEEDED.items() if _which(tool) is None})
    if missing:
        return f"needs the packages {', '.join(missing)}"
    tried = subprocess.run(
        [*_NAMESPACES, "mount", "-t", "tmpfs", "none", "/run"], capture_output=True, text=True, check=False
    )
    return None if tried.returncode == 0 else f"cannot make namespaces here: {tried.stderr.strip()}"


@contextmanager
def virtual_hosts(names: Sequence[str] = ("node-a", "node-b")) -> Iterator[VirtualHosts]:
    """Yields two running hosts that reach each other, by ssh too, and ends everything on them afterwards."""
    first, second = names
    with tempfile.TemporaryDirectory(prefix="hosts_") as place:
        folder = Path(place)
        _write_keys(folder, names)
        unshares = [_begin(folder, name, index) for index, name in enumerate(names, start=1)]
        try:
            holders = tuple(_child(unshare) for unshare in unshares)
            pair = [
                "ip",
                "link",
                "add",
                "eth0",
                "netns",
                str(holders[0]),
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
            ]
            subprocess.run([*pair, "netns", str(holders[1])], check=True)
            hosts = VirtualHosts(names=tuple(names), ssh_config=folder / "ssh_config", holders=holders)
            _await_ssh(hosts, first, second)
            yield hosts
        finally:
            for unshare in unshares:
                _end(unshare)


def _write_keys(folder: Path, names: Sequence[str]) -> None:
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    lines = [
        "127.0.0.1 localhost",
        *(f"{_NETWORK}.{index} {name}" for index, name in enumerate(names, start=1)),
    ]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "host.sh").write_text(_HOST)
    (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(_SSH.format(folder=folder))
    (folder / "known_hosts").write_text(f"* {(folder / 'host_key.pub').read_text()}")


def _begin(folder: Path, name: str, index: int) -> Process:
    command = [
        *_NAMESPACES,
        "sh",
        str(folder / "host.sh"),
        name,
        f"{_NETWORK}.{index}",
        str(folder),
        str(_which("sshd")),
    ]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def _child(process: Process) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        found = children.read_text().split()
        if found and _has_own_network(int(found[0])):
            return int(found[0])
        time.sleep(0.01)
    raise TimeoutError("unshare started no process")


def _end(unshare: Process) -> None:
    """Ends the first process of a host, and with it all others there; `unshare` waits for it."""
    for child in Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    try:
        unshare.wait(timeout=_START_SECONDS)
    except subprocess.TimeoutExpired:
        unshare.kill()
        unshare.wait()


def _has_own_network(process: int) -> bool:
    return os.readlink(f"/proc/{process}/ns/net") != os.readlink("/proc/self/ns/net")  # noqa: PTH115  a link to nothing


def _await_ssh(hosts: VirtualHosts, first: str, second: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    command = ["ssh", "-F", str(hosts.ssh_config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=2"]
    while True:
        done = [hosts.run(first, [*command, name, "true"]) for name in (first, second)]
        if all(one.returncode == 0 for one in done):
            return
        if time.monotonic() > deadline:
            logs = "".join(path.read_text() for path in hosts.ssh_config.parent.glob("*.log"))
            raise TimeoutError(f"the hosts do not answer: {''.join(one.stderr for one in done)}{logs}")
        time.sleep(0.05)


def _which(tool: str) -> str | None:
    return shutil.which(
        tool, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    )
