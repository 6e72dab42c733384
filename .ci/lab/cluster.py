"""Helpers of chaos.py: several gipams that share a real etcd, clients that use them, and a checker.

    site = Site(test, members=3)      # hosts in network namespaces on one bridge, with an etcd
    host = site.host("web")           # a gipam that runs there
    host.client.request_pool()        # speaks the plugin protocol, in the place of dockerd
    host.cut_off(); host.rejoin()     # its cable
    site.etcd.kill()                  # see etcd.py
    site.assert_agreement()           # hosts and etcd have the same claims
    Chaos(site, seed).run(45)         # tenants of every host live with random faults

The Ledger knows only the replies: a pool or an address is held from the reply to its request
until its release is about to be requested, and a grant that is held twice is a problem.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import ipaddress
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import unittest
from typing import Any, Callable, NamedTuple

from etcd import Etcd, Member
from machines import CommandError, Namespaces, require, works

from test_gipam import (
    GIPAM,
    Daemon,
    ErrorReply,
    FakeDocker,
    launcher,
    make_directory,
    wait_until,
)

BASES = ("-v4", "10.2.0.0/19", "-v6", "2001:db8:0:100::/59")  # 32 blocks each: hosts meet
CHAOS_S = float(os.environ.get("GIPAM_CHAOS_S") or 45)
QUIET_S = 60.0  # a dead host is absent after 40 s
HEARTBEAT_S = 10.0
MAC = "02:42:00:00:00:01"  # comes with the address of a container
PREFIX = "/gipam/gipam/"
ODD_VALUES = ('{"odd":1,"hosts":5}', "true", "[" * 3000, '{"hosts":[{"a":[]}],"odd":1}')

# A proxy before a member of etcd: 6 % of the replies are lost, 6 % of the requests 1 to 2.5 s late.
# With a delay as third argument, each request is that late, and nothing is lost.
PROXY = """
import http.client, http.server, random, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fate = random.random()
        if len(sys.argv) > 3:
            fate = 1.0
            time.sleep(float(sys.argv[3]))
        elif fate < 0.06:
            time.sleep(random.uniform(1, 2.5))
        member = http.client.HTTPConnection(sys.argv[2], 2379, timeout=20)
        self.close_connection = True
        try:
            member.request("POST", self.path, body, {"Connection": "close"})
            reply = member.getresponse()
            data = reply.read()
        except OSError:
            return
        if fate > 0.12:
            self.close_connection = False
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass

class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        pass

Server((sys.argv[1], 2379), Handler).serve_forever()
"""


# === A site: hosts and an etcd on one bridge ======================================================


class Namespace(Namespaces):
    """A network namespace, which ends with the test."""

    def __init__(self, test: unittest.TestCase) -> None:
        super().__init__("--net", setup="ip link set lo up")
        test.addCleanup(self.close)

    def ip(self, words: str) -> str:
        return self.run("ip", *words.split())


class Host:
    """A gipam of its own name in a namespace of its own, with the tenants that use it."""

    def __init__(self, site: Site, name: str, options: tuple[str, ...], *, lines: str = "",
                 directory: str = "", env: dict[str, str] | None = None) -> None:
        self.site = site
        self.name = name
        self.namespace = Namespace(site.test)
        self.address = site.plug_in(self.namespace)
        directory = directory or make_directory(site.test)
        variables = {"DOCKER_HOST": "unix://" + site.docker.path}
        variables.update(env or {})
        self.daemon = Daemon(
            site.test, *BASES, *options, directory=directory, env=variables,
            command=(*self.namespace.inside, *launcher(directory, lines)))
        self.client = self.daemon.client()
        self.is_on_etcd = "-host" in options
        self.tenants: list[Tenant] = []
        self.is_dying = False

    def send(self, number: int) -> None:
        assert self.daemon.process
        self.daemon.process.send_signal(number)

    def pause(self) -> None:
        self.send(signal.SIGSTOP)

    def resume(self) -> None:
        self.send(signal.SIGCONT)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.is_dying = True
        self.client.close()
        self.daemon.stop(number)

    def start_again(self) -> None:
        """Start gipam again after kill(), and check that it holds all grants of its tenants."""
        wait_until("tenants have seen it", self.have_tenants_noticed)
        self.daemon.start()
        self.reconcile()
        self.is_dying = False

    def have_tenants_noticed(self) -> bool:
        return not any(tenant.is_alive() and not tenant.lost for tenant in self.tenants)

    def lose_file(self) -> None:
        """Remove the lease file and its journal, as if the disk were new."""
        for name in os.listdir(self.daemon.directory):
            if name.startswith("leases.json"):
                os.unlink(os.path.join(self.daemon.directory, name))

    def cut_off(self) -> None:
        self.site.namespace.ip(f"link set host{self.namespace.pid} down")

    def rejoin(self) -> None:
        self.site.namespace.ip(f"link set host{self.namespace.pid} up")

    def pools(self) -> dict[str, Any]:
        """Return the pools that the host holds, by id."""
        return {pool["id"]: pool for pool in self.client.state()["pools"]}

    def conflict(self, pool_id: str) -> str:
        """Return the other hosts that have claimed a pool."""
        return str(self.pools()[pool_id]["claimed_elsewhere"])

    def is_etcd_up(self) -> bool:
        return not self.client.state()["etcd"]["failure"]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of gipam's on this host."""
        command = [sys.executable, GIPAM, "-unix", "-socket", self.daemon.socket, *words]
        return subprocess.run(
            command, env=self.daemon.env, capture_output=True, encoding="utf-8")

    def holdings(self) -> dict[tuple[str, str], tuple[Any, str]]:
        """Return (pool id, address or "") -> (pool, kind of the lease)."""
        holdings = {}
        for pool in self.pools().values():
            holdings[pool["id"], ""] = (pool, "")
            for lease in pool["addresses"]:
                holdings[pool["id"], lease["address"]] = (pool, lease["kind"])
        return holdings

    def reconcile(self) -> None:
        """Check that gipam holds the grants of its tenants.

        The tenant that made a call without a reply learns its effect here.
        """
        ledger = self.site.ledger
        holdings = self.holdings()
        known = {(entry.pool_id, entry.address) for entry in ledger.of(*self.tenants)}
        for missing in known - set(holdings):
            ledger.problem(f"{self.name} has lost {missing}")

        for pool_id, address in sorted(set(holdings) - known):
            pool, kind = holdings[pool_id, address]
            for tenant in self.tenants:
                if tenant.explains(pool_id, pool["subnet"], address):
                    is_gateway = kind == "gateway"
                    tenant.learn(pool_id, pool["subnet"], address, pool["is_shared"], is_gateway)
                    break
            else:
                ledger.problem(f"{self.name} holds {address} of {pool_id}, which nobody requested")
        for tenant in self.tenants:
            tenant.lost = None


class Site:
    """Hosts, each plugged into a bridge, and an etcd whose members are on the bridge, too."""

    def __init__(self, test: unittest.TestCase, members: int = 1, tls: bool = False,
                 token_ttl_s: int = 300) -> None:
        require("ss")
        self.test = test
        self.ledger = Ledger()
        self.namespace = Namespace(test)
        self.docker = FakeDocker(test, make_directory(test) + "/docker.sock", print)
        self.hosts: list[Host] = []
        self._plugs = itertools.count(1)
        self.namespace.ip("link add site type bridge")
        self.namespace.ip("link set site up")
        addresses = [f"10.77.0.{number}" for number in range(1, members + 1)]
        for address in addresses:
            self.namespace.ip(f"addr add {address}/16 dev site")
        inside = [self.namespace.inside for _ in addresses]
        self.etcd = Etcd(*addresses, inside=inside, tls=tls, token_ttl_s=token_ttl_s)
        test.addCleanup(self.etcd.close)
        self.etcd.start()
        self.endpoints = self.etcd.endpoints

    def add_proxies(self, *delay: str) -> None:
        """Have the hosts to come speak to etcd through proxies; see PROXY."""
        urls = []
        for number, member in enumerate(self.etcd.members, 101):
            address = f"10.77.0.{number}"
            self.namespace.ip(f"addr add {address}/16 dev site")
            proxy = subprocess.Popen([
                *self.namespace.inside, sys.executable, "-c", PROXY, address, member.address,
                *delay])
            self.test.addCleanup(proxy.wait)
            self.test.addCleanup(proxy.kill)
            urls.append(f"http://{address}:2379")
        self.endpoints = ",".join(urls)

    def plug_in(self, namespace: Namespace) -> str:
        """Connect a namespace to the bridge, and return its address."""
        address = f"10.77.1.{next(self._plugs)}"
        cable = f"host{namespace.pid}"
        self.namespace.ip(f"link add {cable} type veth peer name eth0 netns {namespace.pid}")
        self.namespace.ip(f"link set {cable} master site up")
        namespace.ip(f"addr add {address}/16 dev eth0")
        namespace.ip("link set eth0 up")
        return address

    def new_host(self, name: str, *options: str, is_on_etcd: bool = True, **more: Any) -> Host:
        """Return a host whose gipam does not run yet."""
        if is_on_etcd:
            options = ("-host", name, "-etcd", self.endpoints, *options)
        return Host(self, name, options, **more)

    def host(self, name: str, *options: str, **more: Any) -> Host:
        """Return a host whose gipam runs."""
        host = self.new_host(name, *options, **more)
        host.daemon.start()
        self.hosts.append(host)
        return host

    def claims(self, has_addresses: bool = False) -> dict[str, list[str]]:
        """Return the hosts of each subnet that is claimed in etcd, or of each address."""
        prefix = PREFIX + "claims/"
        claims = {}
        for key, value in self.etcd.keys(prefix).items():
            claim_key = key[len(prefix):]
            if (claim_key.count("/") == 2) == has_addresses:
                claims[claim_key] = sorted(value["hosts"])
        return claims

    def holders(self) -> dict[str, list[str]]:
        """Return the hosts that hold each subnet."""
        holders: dict[str, set[str]] = collections.defaultdict(set)
        for host in self.hosts:
            for pool in host.pools().values():
                holders[pool["subnet"]].add(host.name)
        return {subnet: sorted(names) for subnet, names in holders.items()}

    def address_holders(self) -> dict[str, list[str]]:
        """Return the hosts that hold each address of a shared subnet."""
        holders: dict[str, set[str]] = collections.defaultdict(set)
        for host in self.hosts:
            for pool in host.pools().values():
                if not pool["is_shared"]:
                    continue
                for lease in pool["addresses"]:
                    holders[f"{pool['subnet']}/{lease['address']}"].add(host.name)
        return {key: sorted(names) for key, names in holders.items()}

    def does_agree(self) -> bool:
        return self.claims() == self.holders() and (
            self.claims(has_addresses=True) == self.address_holders())

    def assert_agreement(self) -> None:
        """Check that after quiet every claim has a holder, every holder a claim."""
        with contextlib.suppress(AssertionError):
            wait_until("agreement", self.does_agree, deadline_s=QUIET_S)
        self.test.assertEqual(self.claims(), self.holders())
        self.test.assertEqual(self.claims(has_addresses=True), self.address_holders())
        for host in self.hosts:
            for pool in host.pools().values():
                self.test.assertFalse(pool.get("claimed_elsewhere"), pool)

    def evict(self, host: Host, by: Host) -> None:
        """Evict a host once it is absent; earlier replies to it do not count any more."""
        def is_evicted() -> bool:
            return by.command("evict", host.name, "--yes").returncode == 0

        wait_until(f"{host.name} is evicted", is_evicted, deadline_s=2 * QUIET_S)
        for entry in self.ledger.of(*host.tenants):
            self.ledger.remove(entry.pool_id, entry.address)


# === The checker, which knows only the replies ====================================================


class Entry(NamedTuple):
    """A grant that a tenant surely holds: a pool, or an address of it."""

    tenant: Tenant
    pool_id: str
    subnet: str
    address: str  # "" for the pool itself
    is_common: bool = False  # each host may hold it once

    def conflicts_with(self, other: Entry) -> bool:
        """Return whether this must not be granted while the other one is held."""
        is_same = (self.subnet, self.address) == (other.subnet, other.address)
        if self.is_common and other.is_common and is_same:
            return self.tenant.host is other.tenant.host
        if self.address or other.address:
            return is_same
        subnet = ipaddress.ip_network(self.subnet)
        return subnet.overlaps(ipaddress.ip_network(other.subnet))


class Ledger:
    """The holders of grants, from the reply to a request until shortly before its release."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: list[Entry] = []
        self.problems: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()

    def problem(self, text: str) -> None:
        self.problems.append(f"{time.strftime('%H:%M:%S')} {text}")

    def add(self, new: Entry) -> None:
        with self.lock:
            for old in self.entries:
                if new.conflicts_with(old):
                    self.problem(f"{new} was given while there is {old}")
            self.entries.append(new)

    def remove(self, pool_id: str, address: str = "") -> None:
        """Forget an address, or a pool with all its addresses."""
        with self.lock:
            self.entries = [entry for entry in self.entries if entry.pool_id != pool_id
                            or (address and entry.address != address)]

    def of(self, *tenants: Tenant) -> list[Entry]:
        with self.lock:
            return [entry for entry in self.entries if entry.tenant in tenants]


class Call(NamedTuple):
    """A call that a tenant makes."""

    name: str
    pool: str  # its id, or the subnet that is requested
    address: str = ""


class Wish(NamedTuple):
    """A kind of network that a tenant may request."""

    kind: str
    subnet: str = ""
    is_v6: bool = False
    options: dict[str, str] = {}


def shared_subnets(number: int) -> list[str]:
    """Return subnets that a tenant requests to be shared; the last three are of a base's blocks."""
    return [f"192.168.{number}.0/25", f"fd00:{number}::/64", f"10.2.{28 + number}.0/24",
            f"10.2.31.{16 * number}/28", f"10.2.31.{128 + 4 * number}/30"]


class Tenant(threading.Thread):
    """Makes and removes networks and containers of a host at random, and remembers the replies."""

    ACTIONS = ("request_pool", "release_pool", "request_address", "release_address")
    WEIGHTS = (1, 1, 6, 3)
    MAX_POOLS = 4
    MAX_ENTRIES = 60

    def __init__(self, host: Host, number: int, rng: random.Random) -> None:
        super().__init__(name=f"tenant {number} of {host.name}", daemon=True)
        self.host = host
        self.number = number
        self.rng = rng
        self.client = host.daemon.client()
        self.client.connection.timeout = 2 * CHAOS_S  # gipam may be paused
        self.ledger = host.site.ledger
        self.call = Call("", "")  # made last
        self.lost: Call | None = None  # the last one, without a reply
        self.end = threading.Event()

    def run(self) -> None:
        while not self.end.wait(self.rng.random() / 50):
            if self.lost is None:
                self.step()

    def choose_action(self, pool_count: int, entry_count: int) -> str:
        (action,) = self.rng.choices(self.ACTIONS, self.WEIGHTS)
        if not pool_count:
            return "request_pool"
        if action == "request_pool" and pool_count >= self.MAX_POOLS:
            return "release_pool"
        if action == "request_address" and entry_count >= self.MAX_ENTRIES:
            return "release_address"
        return action

    def step(self) -> None:
        """Make one call, and count its outcome."""
        held = self.ledger.of(self)
        pools = [entry for entry in held if not entry.address]
        action = self.choose_action(len(pools), len(held))
        try:
            if action == "request_pool":
                label = self.request_pool()
            else:
                method = getattr(self, action)
                label = method(self.rng.choice(pools))
        except ErrorReply as error:
            label = f"{action} {error.status}"
            if error.status == 500 or action.startswith("release"):
                self.ledger.problem(f"{self.name}: {self.call}: {error.status} {error}")
        except (OSError, http.client.HTTPException) as error:
            label = "lost reply"
            if not self.host.is_dying:
                self.ledger.problem(f"{self.name}: {self.call}: {error!r}")
            self.lost = self.call
            self.client.close()
        self.ledger.counts[label] += 1

    def choose_wish(self) -> Wish:
        block = self.rng.randrange(32)
        name = f"net{self.number}{block % 3}"
        wishes = [
            Wish("dynamic"), Wish("dynamic", is_v6=True),
            Wish("small", options={"gipam_v4ab": "26"}),
            Wish("large", options={"gipam_v4ab": "23"}),
            Wish("small", is_v6=True, options={"gipam_v6ab": "72"}),
            Wish("named", is_v6=block % 2 == 1, options={"gipam_name": name}),
            Wish("explicit", f"10.2.{block}.0/24"), Wish("explicit", f"10.2.{block}.64/26"),
            Wish("explicit", f"2001:db8:0:100::{block}:0:0/96", is_v6=True),
            Wish("outside", f"172.16.{block % 4}.0/24"),
            Wish("explicit", "10.2.30.0/23"),
            Wish("explicit", shared_subnets(self.number)[3]),
            Wish("explicit", f"192.168.{self.number}.0/24")]
        if self.host.is_on_etcd:
            for subnet in shared_subnets(self.number):
                wishes.append(Wish("shared", subnet, ":" in subnet, {"gipam_shared": "true"}))
        return self.rng.choice(wishes)

    def request_pool(self) -> str:
        wish = self.choose_wish()
        self.call = Call("request_pool", wish.subnet)
        pool_id, subnet = self.client.request_pool(wish.subnet, "", wish.is_v6, **wish.options)
        is_shared = wish.kind == "shared"
        self.learn(pool_id, subnet, "", is_shared)
        if is_shared:
            # Docker requests the gateway at once.
            gateway = str(ipaddress.ip_network(subnet)[1])
            self.call = Call("request_address", pool_id, gateway)
            self.client.request_address(pool_id, gateway, gateway=True)
            self.learn(pool_id, subnet, gateway, is_shared=True, is_gateway=True)
        return wish.kind + " pool"

    def release_pool(self, pool: Entry) -> str:
        self.ledger.remove(pool.pool_id)
        self.call = Call("release_pool", pool.pool_id)
        self.client.release_pool(pool.pool_id)
        return "released pool"

    def request_address(self, pool: Entry) -> str:
        address = ""
        if self.rng.random() < 0.25:
            network = ipaddress.ip_network(pool.subnet)
            offset = self.rng.randrange(2, min(60, network.num_addresses - 1))  # 1 is a gateway's
            address = str(network[offset])
        mac = f"02:42:00:00:{self.number:02x}:{self.rng.randrange(64):02x}"
        self.call = Call("request_address", pool.pool_id, address)
        cidr = self.client.request_address(pool.pool_id, address, mac, f"web{self.number}")
        self.learn(pool.pool_id, pool.subnet, cidr.partition("/")[0], pool.is_common)
        kind = "fixed" if address else "dynamic"
        return f"shared {kind} address" if pool.is_common else f"{kind} address"

    def release_address(self, pool: Entry) -> str:
        held = [entry.address for entry in self.ledger.of(self)
                if entry.pool_id == pool.pool_id and entry.address]
        if not held:
            return "nothing to release"
        address = self.rng.choice(held)
        self.call = Call("release_address", pool.pool_id, address)
        self.ledger.remove(pool.pool_id, address)
        self.client.release_address(pool.pool_id, address)
        return "released address"

    def learn(self, pool_id: str, subnet: str, address: str = "", is_shared: bool = False,
              is_gateway: bool = False) -> None:
        is_common = is_shared and (is_gateway or not address)
        self.ledger.add(Entry(self, pool_id, subnet, address, is_common))

    def explains(self, pool_id: str, subnet: str, address: str) -> bool:
        """Return whether the call without a reply has made gipam hold this, or not release it."""
        call = self.lost
        if call is None:
            return False
        if call.name == "release_pool":
            return pool_id == call.pool
        is_pool = call.name == "request_pool" and not address and call.pool in ("", subnet)
        is_address = bool(address) and call.pool == pool_id and call.address in ("", address)
        if is_pool or is_address:
            self.lost = Call("", "", "explained")
        return is_pool or is_address


# === Faults =======================================================================================


class Fault(NamedTuple):
    """A fault of a host, or of etcd, with functions that begin and end it."""

    name: str
    begin: Callable[[Host], None]
    end: Callable[[Host], None]
    weight: int = 1


class Chaos:
    """Faults, one or two at a time, drawn from a seed, while tenants of every host go on."""

    KILL_GIPAM = "gipam killed"

    def __init__(self, site: Site, seed: int) -> None:
        self.site = site
        self.etcd = site.etcd
        self.rng = random.Random(seed)
        for host in site.hosts:
            for number in range(3):
                rng = random.Random(f"{seed} {host.name} {number}")
                host.tenants.append(Tenant(host, number, rng))

    def run(self, for_s: float, only: str = "") -> None:
        """Live with the faults, or with one, then be quiet and check the grants of every host."""
        tenants: list[Tenant] = []
        for host in self.site.hosts:
            tenants += host.tenants
        for tenant in tenants:
            tenant.start()

        end_s = time.monotonic() + for_s
        while time.monotonic() < end_s and not self.site.ledger.problems:
            self.cause_faults(max(4.0, for_s / 15), only)

        for tenant in tenants:
            tenant.end.set()
        for tenant in tenants:
            tenant.join()
        self.remove_odd_values()
        for host in self.site.hosts:
            host.reconcile()
        counts = sorted(self.site.ledger.counts.items())
        print("\n" + ", ".join(f"{count} {label}" for label, count in counts))

    def cause_faults(self, at_most_s: float, only: str) -> None:
        """Begin one or two faults, of one host each; end them after some time."""
        with contextlib.ExitStack() as undo:
            for host in self.rng.sample(self.site.hosts, self.rng.randrange(1, 3)):
                faults = [fault for fault in self.faults() if only in fault.name]
                weights = [fault.weight for fault in faults]
                (fault,) = self.rng.choices(faults, weights)
                self.site.ledger.counts[fault.name] += 1
                fault.begin(host)
                undo.callback(fault.end, host)
                self.sleep(2)
            self.sleep(at_most_s)
        self.sleep(2)

    def sleep(self, at_most_s: float) -> None:
        time.sleep(self.rng.random() * at_most_s)

    def faults(self) -> list[Fault]:
        """Return the possible faults."""
        return [
            Fault(self.KILL_GIPAM, Host.kill, Host.start_again, weight=2),
            Fault("gipam paused", Host.pause, Host.resume),
            Fault("host cut off", Host.cut_off, Host.rejoin),
            Fault("etcd compacted", Host.cut_off, self.compact_and_rejoin),
            Fault("etcd emptied", self.empty, self.do_nothing),
            Fault("etcd restored", self.save, self.restore),
            Fault("etcd restored behind a host", self.cut_off_and_save, self.restore_and_rejoin),
            Fault("odd values", self.put_odd_values, self.remove_odd_values),
            Fault("etcd killed", self.kill_members, self.start_members, weight=2),
            Fault("etcd paused", self.pause_members, self.resume_members, weight=2)]

    @property
    def snapshot(self) -> str:
        return os.path.join(self.etcd.directory, "snapshot")

    def do_nothing(self, _: Host) -> None:
        pass

    def compact_and_rejoin(self, host: Host) -> None:
        works(self.etcd.compact)
        host.rejoin()

    def empty(self, _: Host) -> None:
        works(self.etcd.ctl, "del", "--prefix", "/gipam/")

    def save(self, _: Host) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.snapshot)
        works(self.etcd.save, self.snapshot)

    def restore(self, _: Host) -> None:
        """Restore the saved snapshot, if there is one.

        No real backup is younger than a heartbeat.
        """
        time.sleep(HEARTBEAT_S + 1)
        if os.path.exists(self.snapshot):
            self.etcd.restore(self.snapshot)

    def cut_off_and_save(self, host: Host) -> None:
        host.cut_off()
        self.save(host)

    def restore_and_rejoin(self, host: Host) -> None:
        """Restore a snapshot that the host does not see, so that its own key is intact.

        The host comes back when the others have noticed; no rule could help before.
        """
        self.restore(host)
        time.sleep(HEARTBEAT_S + 1)
        host.rejoin()

    def put_odd_values(self, _: Host) -> None:
        """Put keys and values into etcd that gipam did not write."""
        for number, value in enumerate(ODD_VALUES):
            works(self.etcd.ctl, "put", f"{PREFIX}claims/10.2.27.{number * 16}/28", value)
        works(self.etcd.ctl, "put", f"{PREFIX}claims/10.2.27.0/024", "{}")

    def remove_odd_values(self, _: Host | None = None) -> None:
        for number, _value in enumerate(ODD_VALUES):
            works(self.etcd.ctl, "del", f"{PREFIX}claims/10.2.27.{number * 16}/28")
        works(self.etcd.ctl, "del", f"{PREFIX}claims/10.2.27.0/024")

    def kill_members(self, _: Host) -> None:
        self.etcd.kill(*self.choose_members())

    def start_members(self, _: Host) -> None:
        self.etcd.start(wait=False)

    def pause_members(self, _: Host) -> None:
        self.etcd.pause(*self.choose_members())

    def resume_members(self, _: Host) -> None:
        self.etcd.resume()

    def choose_members(self) -> list[Member]:
        """Return the leader, or any member, or a majority of them."""
        choice = self.rng.choice(("leader", "any", "majority"))
        members = self.etcd.members
        self.site.ledger.counts[f"{choice} of etcd"] += 1
        if choice == "leader":
            with contextlib.suppress(CommandError):
                return [self.etcd.leader()]
        count = len(members) // 2 + 1 if choice == "majority" else 1
        return self.rng.sample(members, count)
