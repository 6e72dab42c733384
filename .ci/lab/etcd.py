"""A real etcd for the lab: Debian's etcd-server, one member or more, each on an address of its own.

    etcd = Etcd(*loopback(3))
    # Or addresses of hosts, and for each the command that runs others there:
    etcd = Etcd("10.9.0.1", "10.9.0.2", inside=[["nsenter", "-t", pid, "-n", "--"], ...])
    test.addCleanup(etcd.close)
    etcd.start()                         # waits until it is well
    etcd.endpoints                       # "http://10.9.0.1:2379,http://10.9.0.2:2379", for -etcd
    etcd.kill(etcd.leader())             # one Member, several or all (none named); then start()
    etcd.pause(*etcd.members[:2])        # SIGSTOP; resume() lets them go on
    etcd.keys("/gipam/")                 # {"/gipam/gipam/head": ..., ...}, values parsed as JSON
    etcd.ctl("get", "--prefix", "/gipam")
    etcd.compact(); etcd.save(path); etcd.restore(path)

The command that runs others must exec them, so that signals reach them: nsenter -n without -p, or
`ip netns exec`. With tls=True gipam needs -etcdtls etcd.client_tls; enable_auth() then adds a user.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import tempfile
from typing import Any, Iterable, Sequence

from machines import CommandError, Process, read_blocks, require, run, works

from test_gipam import wait_until

CLIENT_PORT, PEER_PORT = 2379, 2380
START_DEADLINE_S = 60.0
ROOT = "root:rootpw"  # the administrator of an etcd with users
NUMBERS = itertools.count(1)


def loopback(count: int) -> list[str]:
    """Return loopback addresses that no other run and no other cluster of this one has."""
    pid = os.getpid()
    network = f"127.{128 + pid // 250 % 125}.{1 + pid % 250}"
    first = 8 * next(NUMBERS)
    return [f"{network}.{number}" for number in range(first, first + count)]


def make_certificates(directory: str, addresses: Iterable[str]) -> None:
    """Make a CA, and a certificate for server and client, by the README's commands.

    The gateway in etcd is a client, too. With users it refuses one whose certificate has a CN.
    """
    block, = (block for block in read_blocks() if "CN=CA of etcd" in block.text)
    names = ",".join("IP:" + address for address in addresses)
    script = re.sub(r"IP:127\S+", names, block.text.replace("/etc/etcd", directory))
    run("bash", "-ec", script)


class Member:
    """One etcd process."""

    def __init__(self, directory: str, address: str, inside: Sequence[str]) -> None:
        self.name = f"etcd-{address}"
        self.address = address
        self.inside = list(inside)
        self.data = f"{directory}/{self.name}"
        self.log = f"{directory}/{self.name}.log"
        self.peer_url = f"http://{address}:{PEER_PORT}"
        self.process: Process | None = None

    def is_running(self) -> bool:
        return self.process is not None and self.process.is_running()

    def send(self, number: int) -> None:
        if self.process is not None:
            self.process.send(number)


class Etcd:
    """A cluster in a temporary directory; close() ends it and leaves nothing behind."""

    def __init__(
        self,
        *addresses: str,
        inside: Sequence[Sequence[str]] = (),
        tls: bool = False,
        token_ttl_s: int = 300,
    ) -> None:
        require("bash", "etcd", "etcdctl", "etcdutl", "openssl")
        self.directory = tempfile.mkdtemp(prefix="gipam-etcd-")
        self.members = []
        for address, prefix in itertools.zip_longest(addresses, inside, fillvalue=()):
            self.members.append(Member(self.directory, str(address), prefix))
        self.is_tls = tls
        self.token_ttl_s = token_ttl_s
        self.has_users = False
        self.cluster_token = "gipam-lab"
        self.client_tls = f"{self.directory}/tls"
        if tls:
            make_certificates(self.client_tls, addresses)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def url(self, member: Member) -> str:
        scheme = "https" if self.is_tls else "http"
        return f"{scheme}://{member.address}:{CLIENT_PORT}"

    @property
    def endpoints(self) -> str:
        return ",".join(self.url(member) for member in self.members)

    @property
    def cluster(self) -> list[str]:
        """Return the options that make the members one cluster."""
        peers = ",".join(f"{member.name}={member.peer_url}" for member in self.members)
        return ["--initial-cluster", peers, "--initial-cluster-token", self.cluster_token]

    # -- processes; no member named means all of them

    def start(self, wait: bool = True) -> None:
        """Start those that do not run, and wait until etcd is well."""
        for member in self.members:
            if not member.is_running():
                self._start(member)
        if wait:
            self.wait()

    def _start(self, member: Member) -> None:
        url = self.url(member)
        options = [
            "--name", member.name,
            "--data-dir", member.data,
            "--listen-client-urls", url,
            "--advertise-client-urls", url,
            "--listen-peer-urls", member.peer_url,
            "--initial-advertise-peer-urls", member.peer_url,
            *self.cluster,
            "--auth-token-ttl", str(self.token_ttl_s),
            "--log-level", "warn",
        ]
        if self.is_tls:
            options += [
                "--client-cert-auth",
                "--trusted-ca-file", f"{self.client_tls}/ca.pem",
                "--cert-file", f"{self.client_tls}/cert.pem",
                "--key-file", f"{self.client_tls}/key.pem",
            ]
        member.process = Process(member.log, *member.inside, "etcd", *options)

    def wait(self) -> None:
        """Wait until etcd is well, so that it has a leader and accepts writes."""
        try:
            wait_until("etcd is well", self.is_well, deadline_s=START_DEADLINE_S)
        except AssertionError as error:
            texts = [str(error)]
            for member in self.members:
                if member.process:
                    texts.append(member.process.read_log()[-3000:])
            raise AssertionError("\n".join(texts)) from None

    def is_well(self) -> bool:
        """Return whether etcd accepts writes."""
        return works(self.ctl, "--command-timeout=2s", "put", "/is-well", "")

    def kill(self, *members: Member) -> None:
        """End these members with SIGKILL, also paused ones."""
        killed = members or self.members
        for member in killed:
            member.send(signal.SIGKILL)
        for member in killed:
            if member.process is not None:
                member.process.process.wait()

    def pause(self, *members: Member) -> None:
        paused = members or self.members
        for member in paused:
            member.send(signal.SIGSTOP)

    def resume(self) -> None:
        for member in self.members:
            member.send(signal.SIGCONT)

    def leader(self) -> Member:
        """Return the member that leads. Raises: CommandError, if none does."""
        for member in filter(Member.is_running, self.members):
            with contextlib.suppress(CommandError):
                text = self.ctl(
                    "--command-timeout=2s", "endpoint", "status", "-w", "json", member=member)
                status = json.loads(text)[0]["Status"]
                # A cluster has no leader during an election.
                if status.get("leader") == status["header"]["member_id"]:
                    return member
        raise CommandError("no member leads")

    # -- etcdctl and etcdutl

    def ctl(self, *arguments: str, member: Member | None = None) -> str:
        """Return the output of etcdctl, run for one member or for any. Raises: CommandError."""
        asked = member or self.members[0]
        options = ["--endpoints", self.url(member) if member else self.endpoints]
        if self.is_tls:
            options += [
                "--cacert", f"{self.client_tls}/ca.pem",
                "--cert", f"{self.client_tls}/cert.pem",
                "--key", f"{self.client_tls}/key.pem",
            ]
        if self.has_users:
            options += ["--user", ROOT]
        # With a limit, for a paused member saves no snapshot, for ever.
        return run(*asked.inside, "etcdctl", *options, *arguments, for_s=20)

    def keys(self, prefix: str) -> dict[str, Any]:
        """Return every key under the prefix with its value, parsed if it is JSON."""
        reply = json.loads(self.ctl("get", "--prefix", prefix, "-w", "json"))
        values = {}
        for pair in reply.get("kvs", []):
            key = base64.b64decode(pair["key"]).decode()
            values[key] = base64.b64decode(pair.get("value", "")).decode()
            with contextlib.suppress(ValueError):
                values[key] = json.loads(values[key])
        return values

    def revision(self) -> int:
        reply = json.loads(self.ctl("get", "/is-well", "-w", "json"))
        return int(reply["header"]["revision"])

    def compact(self) -> None:
        """Delete the history of all keys before now."""
        self.ctl("compact", str(self.revision()))

    def save(self, path: str) -> None:
        """Save a snapshot of all keys."""
        self.ctl("snapshot", "save", path, member=self.members[0])

    def restore(self, path: str, cluster_token: str = "") -> None:
        """Replace all keys by a snapshot; another token makes another cluster id."""
        self.kill()
        self.cluster_token = cluster_token or self.cluster_token
        for member in self.members:
            shutil.rmtree(member.data)
            run("etcdutl", "snapshot", "restore", path,
                "--data-dir", member.data,
                "--name", member.name,
                "--initial-advertise-peer-urls", member.peer_url,
                *self.cluster)
        self.start()

    def enable_auth(self, user: str, password: str) -> None:
        """Enable authentication for root and for this user, who may access only /gipam/."""
        for command in (f"user add {ROOT}", "user grant-role root root", "role add gipam",
                        "role grant-permission gipam --prefix=true readwrite /gipam/",
                        f"user add {user}:{password}", f"user grant-role {user} gipam",
                        "auth enable"):
            self.ctl(*command.split())
        self.has_users = True
