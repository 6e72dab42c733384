"""Several gipams and a real etcd, with all that can go wrong between them: `python3 .ci/lab/chaos.py`.

No dockerd: clients speak the plugin protocol. GIPAM_CHAOS_S is for how many seconds each random run goes on,
GIPAM_TEST_SEED repeats one (the schedule, not the moments).
"""

from __future__ import annotations

import collections
import contextlib
import glob
import http.client
import ipaddress
import itertools
import operator
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import unittest
from typing import Any, Callable, NamedTuple

from etcd import Etcd, Member, make_certificates
from machines import CommandError, Namespaces, main, require, until, works

from test_gipam import GIPAM, Daemon, FakeDocker, Refused, launcher, make_directory, seeds

CHAOS_S = float(os.environ.get("GIPAM_CHAOS_S") or 45)
BASES = ("-v4", "10.2.0.0/19", "-v6", "2001:db8:0:100::/59")  # 32 blocks of each family: hosts meet
QUIET_S = 60.0  # who has died is not there any more after 40 s
NOTHING = ("", "", "")
PULSE_S = 10.0
ODD = ('{"odd":1,"hosts":5}', "true", "[" * 3000, '{"hosts":[{"a":[]}],"odd":1}')
MAC = "02:42:00:00:00:01"  # comes with a container's address, but not with an auxiliary one
CLOCK = "import time; now = time.time; time.time = lambda: now() + {}"


def lans(number: int) -> list[str]:
    """Return the subnets that a tenant asks for to be shared, the last three out of a base's blocks."""
    return [f"192.168.{number}.0/25", f"fd00:{number}::/64", f"10.2.{28 + number}.0/24",
            f"10.2.31.{16 * number}/28", f"10.2.31.{128 + 4 * number}/30"]



# gipam stops itself between its claim and its reply, once, when the file named there has been made.
STOP = """
import signal
look = gipam.ClusterMember._look
def stop(self, told, again):
    if told.won and os.path.exists({0!r}):
        os.unlink({0!r})
        os.kill(os.getpid(), signal.SIGSTOP)
    return look(self, told, again)
gipam.ClusterMember._look = stop
"""
# In front of a member of etcd: 6 % of the replies are lost, 6 % of the requests run 1 to 2.5 s late.
PROXY = """
import http.client, http.server, random, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fate = random.random()
        time.sleep(random.uniform(1, 2.5) if fate < 0.06 else 0)
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
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_): pass
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
    """A gipam of its own name, in a namespace of its own, with the tenants that use it."""

    def __init__(self, site: Site, name: str, options: tuple[str, ...], *, lines: str = "", directory: str = "",
                 env: dict[str, str] | None = None) -> None:
        self.site, self.name, self.namespace = site, name, Namespace(site.test)
        self.address = site.plug(self.namespace)
        directory = directory or make_directory(site.test)
        self.daemon = Daemon(site.test, *BASES, *options, directory=directory,
                             env={"DOCKER_HOST": "unix://" + site.docker.path, **(env or {})},
                             command=(*self.namespace.inside, *launcher(directory, lines)))
        self.client = self.daemon.client()
        self.is_on_etcd = "-host" in options
        self.tenants: list[Tenant] = []
        self.had: set[tuple[str, str]] = set()  # once evicted: what it may give again as long as it is cut off
        self.is_dying = False

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.is_dying = True
        self.client.close()
        self.daemon.stop(number)

    def start_again(self) -> None:
        """Start it after kill(), and see that it has what its tenants were answered."""
        until(lambda: not [it for it in self.tenants if it.is_alive() and it.lost == NOTHING], "tenants have seen it")
        self.daemon.start()
        self.reconcile()
        self.is_dying = False

    def cut_off(self) -> str:
        return self.site.namespace.ip(f"link set host{self.namespace.pid} down")

    def join_again(self) -> str:
        return self.site.namespace.ip(f"link set host{self.namespace.pid} up")

    def pools(self) -> dict[str, Any]:
        return {pool["id"]: pool for pool in self.client.state()["pools"]}

    def is_etcd_up(self) -> bool:
        return not self.client.state()["etcd"]["failure"]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of gipam's on this host."""
        return subprocess.run([sys.executable, GIPAM, "-unix", "-socket", self.daemon.socket, *arguments],
                              env=self.daemon.env, capture_output=True, encoding="utf-8")

    def reconcile(self) -> None:
        """Check that gipam holds what its tenants were answered; what lost replies have done, they learn of."""
        found = {(pool["id"], address): (pool, kind) for pool in self.pools().values()
                 for address, kind in [("", ""), *((it["address"], it["kind"]) for it in pool["addresses"])]}
        known = {(entry.pool_id, entry.address) for entry in self.site.ledger.of(*self.tenants)}
        for what in known - set(found):
            self.site.ledger.problem(f"{self.name} has lost {what}")
        for pool_id, address in sorted(set(found) - known):
            pool, kind = found[pool_id, address]
            asked = [tenant for tenant in self.tenants if tenant.explains(pool_id, pool["subnet"], address)]
            if asked:
                asked[0].learn(pool_id, pool["subnet"], address, pool["is_shared"], kind == "gateway")
            else:
                self.site.ledger.problem(f"{self.name} holds {address} of {pool_id}, which nobody asked for")
        for tenant in self.tenants:
            tenant.lost = NOTHING


class Site:
    """Hosts, each plugged into a bridge, and an etcd there: members on addresses of the bridge's namespace."""

    def __init__(self, test: unittest.TestCase, members: int = 1, tls: bool = False, token_ttl_s: int = 300) -> None:
        require("ss")
        self.test, self.ledger, self.namespace = test, Ledger(), Namespace(test)
        self.docker = FakeDocker(test, make_directory(test) + "/docker.sock", print)  # knows no network
        self.hosts: list[Host] = []
        self.plugs = itertools.count(1)
        addresses = [f"10.77.0.{index + 1}" for index in range(members)]
        for words in ("link add site type bridge", "link set site up"):
            self.namespace.ip(words)
        for address in addresses:
            self.namespace.ip(f"addr add {address}/16 dev site")
        self.etcd = Etcd(*addresses, inside=[self.namespace.inside] * members, tls=tls, token_ttl_s=token_ttl_s)
        test.addCleanup(self.etcd.close)
        self.etcd.start()
        self.endpoints = self.etcd.endpoints

    def add_proxies(self) -> None:
        """Have the hosts to come speak to etcd through what loses replies and is late."""
        for number, member in enumerate(self.etcd.members, 101):
            self.namespace.ip(f"addr add 10.77.0.{number}/16 dev site")
            proxy = subprocess.Popen([*self.namespace.inside, sys.executable, "-c", PROXY, f"10.77.0.{number}",
                                      member.address])
            self.test.addCleanup(proxy.wait)
            self.test.addCleanup(proxy.kill)
        self.endpoints = ",".join(f"http://10.77.0.{number}:2379" for number, _ in enumerate(self.etcd.members, 101))

    def plug(self, namespace: Namespace) -> str:
        """Connect a namespace, and return its address."""
        address = f"10.77.1.{next(self.plugs)}"
        self.namespace.ip(f"link add host{namespace.pid} type veth peer name eth0 netns {namespace.pid}")
        self.namespace.ip(f"link set host{namespace.pid} master site up")
        namespace.ip(f"addr add {address}/16 dev eth0")
        namespace.ip("link set eth0 up")
        return address

    def new_host(self, name: str, *options: str, is_on_etcd: bool = True, **more: Any) -> Host:
        """Return a host whose gipam does not run yet."""
        on_etcd = ("-host", name, "-etcd", self.endpoints) if is_on_etcd else ()
        return Host(self, name, (*on_etcd, *options), **more)

    def host(self, name: str, *options: str, **more: Any) -> Host:
        """Return a host whose gipam runs."""
        host = self.new_host(name, *options, **more)
        host.daemon.start()
        self.hosts.append(host)
        return host

    def claims(self, depth: int = 1) -> dict[str, list[str]]:
        """Return what etcd has: subnet -> the names of its hosts, sorted; or of addresses: 2."""
        prefix = "/gipam/gipam/claims/"
        return {key[len(prefix):]: sorted(value["hosts"]) for key, value in self.etcd.keys(prefix).items()
                if key[len(prefix):].count("/") == depth}

    def holders(self) -> dict[str, list[str]]:
        """Return what the hosts hold: subnet -> their names, sorted."""
        found: dict[str, set[str]] = {}
        for host in self.hosts:
            for pool in host.pools().values():
                found.setdefault(pool["subnet"], set()).add(host.name)
        return {subnet: sorted(names) for subnet, names in found.items()}

    def addresses(self) -> dict[str, list[str]]:
        """Return what the hosts hold of shared subnets: name of the claim -> their names, sorted."""
        found: dict[str, set[str]] = {}
        for host in self.hosts:
            for pool in filter(operator.itemgetter("is_shared"), host.pools().values()):
                for lease in pool["addresses"]:
                    found.setdefault(f"{pool['subnet']}/{lease['address']}", set()).add(host.name)
        return {name: sorted(hosts) for name, hosts in found.items()}

    def assert_agreement(self) -> None:
        """After quiet every claim has a holder, every holder a claim."""
        with contextlib.suppress(AssertionError):
            until(lambda: (self.claims(), self.claims(2)) == (self.holders(), self.addresses()), "agreement", QUIET_S)
        self.test.assertEqual(self.claims(), self.holders())
        self.test.assertEqual(self.claims(2), self.addresses())
        for host in self.hosts:
            for pool in host.pools().values():
                self.test.assertFalse(pool.get("claimed_elsewhere"), pool)

    def evict(self, host: Host, by: Host) -> None:
        """Evict a host once it is not heard of any more; what it was answered does not count any more."""
        until(lambda: by.command("evict", host.name, "--yes").returncode == 0, "evicted", 2 * QUIET_S)
        for entry in self.ledger.of(*host.tenants):
            self.ledger.remove(entry.pool_id, entry.address)


# === The checker: it knows only what was answered =================================================


class Entry(NamedTuple):
    """What a tenant surely holds: a pool, or an address of it."""

    tenant: Tenant
    pool_id: str
    subnet: str
    address: str  # "" for the pool itself
    is_common: bool = False  # a shared subnet, its gateway: several hosts may hold it, each once

    def stands_against(self, other: Entry) -> bool:
        """Tell whether nobody should have been given this while the other is held."""
        if self.is_common and other.is_common and self.subnet == other.subnet and self.address == other.address:
            return self.tenant.host is other.tenant.host
        if self.address or other.address:
            return (self.subnet, self.address) == (other.subnet, other.address)
        return ipaddress.ip_network(self.subnet).overlaps(ipaddress.ip_network(other.subnet))


class Ledger:
    """Who holds what: from the reply to a request until its release is about to be asked for."""

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
                if new.stands_against(old):
                    self.problem(f"{new} was given while there is {old}")
            self.entries.append(new)

    def remove(self, pool_id: str, address: str = "") -> None:
        """Forget an address, or a pool with all its addresses."""
        with self.lock:
            self.entries = [it for it in self.entries if it.pool_id != pool_id or (address and it.address != address)]

    def of(self, *tenants: Tenant) -> list[Entry]:
        with self.lock:
            return [entry for entry in self.entries if entry.tenant in tenants]


class Tenant(threading.Thread):
    """Makes and removes networks and containers of a host at random, and knows what it was answered."""

    ACTIONS = ("request_pool", "release_pool", *["request_address"] * 6, *["release_address"] * 3)
    MAX_POOLS, MAX_ENTRIES = 4, 60

    def __init__(self, host: Host, number: int, rng: random.Random) -> None:
        super().__init__(name=f"tenant {number} of {host.name}", daemon=True)
        self.host, self.number, self.rng = host, number, rng
        self.client, self.ledger = host.daemon.client(), host.site.ledger
        self.client.connection.timeout = 2 * CHAOS_S  # gipam may be paused
        self.asked = NOTHING  # the call that was made last: its name, pool, address
        self.lost = NOTHING  # the same, when it got no reply; nothing more is asked until it is reconciled
        self.end = threading.Event()

    def run(self) -> None:
        while not self.end.wait(self.rng.random() / 50):
            if self.lost == NOTHING:
                self.step()

    def step(self) -> None:
        held = self.ledger.of(self)
        pools = [entry for entry in held if not entry.address]
        action = self.rng.choice(self.ACTIONS) if pools else "request_pool"
        if action == "request_pool" and len(pools) >= self.MAX_POOLS:
            action = "release_pool"
        if action == "request_address" and len(held) >= self.MAX_ENTRIES:
            action = "release_address"
        try:
            what = getattr(self, action)(*[self.rng.choice(pools)] if action != "request_pool" else ())
        except Refused as refusal:
            what = f"{action} {refusal.status}"
            if refusal.status == 500 or action.startswith("release"):
                self.ledger.problem(f"{self.name}: {self.asked}: {refusal.status} {refusal}")
        except (OSError, http.client.HTTPException) as error:
            what = "lost reply"
            if not self.host.is_dying:
                self.ledger.problem(f"{self.name}: {self.asked}: {error!r}")
            self.lost = self.asked
            self.client.close()
        self.ledger.counts[what] += 1

    def request_pool(self) -> str:
        block = self.rng.randrange(32)
        kinds: list[tuple[str, str, bool, dict[str, str]]] = [
            ("dynamic", "", False, {}), ("dynamic", "", True, {}), ("small", "", False, {"gipam_v4ab": "26"}),
            ("large", "", False, {"gipam_v4ab": "23"}), ("small", "", True, {"gipam_v6ab": "72"}),
            ("named", "", bool(block % 2), {"gipam_name": f"net{self.number}{block % 3}"}),
            ("explicit", f"10.2.{block}.0/24", False, {}), ("explicit", f"10.2.{block}.64/26", False, {}),
            ("explicit", f"2001:db8:0:100::{block}:0:0/96", True, {}),
            ("outside", f"172.16.{block % 4}.0/24", False, {}),
            *[("shared", lan, ":" in lan, {"gipam_shared": "true"})
              for lan in lans(self.number)] * self.host.is_on_etcd,
            ("explicit", "10.2.30.0/23", False, {}), ("explicit", lans(self.number)[3], False, {}),
            ("explicit", f"192.168.{self.number}.0/24", False, {})]
        kind, pool, is_v6, options = self.rng.choice(kinds)
        self.asked = ("request_pool", pool, "")
        pool_id, subnet = self.client.request_pool(pool, "", is_v6, **options)
        self.learn(pool_id, subnet, "", kind == "shared")
        if kind == "shared":  # its gateway, as Docker does at once
            self.asked = ("request_address", pool_id, str(ipaddress.ip_network(subnet)[1]))
            self.client.request_address(pool_id, self.asked[2], gateway=True)
            self.learn(pool_id, subnet, self.asked[2], is_shared=True, is_gateway=True)
        return kind + " pool"

    def release_pool(self, pool: Entry) -> str:
        self.ledger.remove(pool.pool_id)
        self.asked = ("release_pool", pool.pool_id, "")
        self.client.release_pool(pool.pool_id)
        return "released pool"

    def request_address(self, pool: Entry) -> str:
        address = ""
        if not self.rng.randrange(4):  # 1 is a gateway's
            network = ipaddress.ip_network(pool.subnet)
            address = str(network[self.rng.randrange(2, min(60, network.num_addresses - 1))])
        mac = f"02:42:00:00:{self.number:02x}:{self.rng.randrange(64):02x}"
        self.asked = ("request_address", pool.pool_id, address)
        given = self.client.request_address(pool.pool_id, address, mac, f"web{self.number}").partition("/")[0]
        self.learn(pool.pool_id, pool.subnet, given, pool.is_common)
        return "shared " * pool.is_common + ("fixed" if address else "dynamic") + " address"

    def release_address(self, pool: Entry) -> str:
        held = [entry.address for entry in self.ledger.of(self) if entry.pool_id == pool.pool_id and entry.address]
        if not held:
            return "nothing to release"
        self.asked = ("release_address", pool.pool_id, self.rng.choice(held))
        self.ledger.remove(*self.asked[1:])
        self.client.release_address(*self.asked[1:])
        return "released address"

    def learn(self, pool_id: str, subnet: str, address: str = "", is_shared: bool = False,
              is_gateway: bool = False) -> None:
        self.ledger.add(Entry(self, pool_id, subnet, address, is_shared and (is_gateway or not address)))

    def explains(self, pool_id: str, subnet: str, address: str) -> bool:
        """Tell whether the call without a reply has made gipam hold this, or has not made it let go."""
        name, what, which = self.lost
        if name == "release_pool":
            return pool_id == what
        is_it = (name == "request_pool" and not address and what in ("", subnet)) or (
            bool(address) and pool_id == what and which in ("", address))
        if is_it:
            self.lost = ("", "", "explained")
        return is_it


# === What goes wrong ==============================================================================


class Chaos:
    """Faults, one or two at a time, drawn from a seed, while tenants of every host go on."""

    KILL_GIPAM = "gipam killed"

    def __init__(self, site: Site, seed: int) -> None:
        self.site, self.etcd, self.rng = site, site.etcd, random.Random(seed)
        for host in site.hosts:
            host.tenants = [Tenant(host, number, random.Random(f"{seed} {host.name} {number}")) for number in range(3)]

    def run(self, for_s: float, only: str = "") -> None:
        """Live with the faults, or with one, then be quiet and check what every host holds."""
        tenants = [tenant for host in self.site.hosts for tenant in host.tenants]
        for tenant in tenants:
            tenant.start()
        end = time.monotonic() + for_s
        while time.monotonic() < end and not self.site.ledger.problems:
            with contextlib.ExitStack() as undo:
                for host in self.rng.sample(self.site.hosts, self.rng.randrange(1, 3)):
                    faults = [fault for fault in self.faults(host) if only in fault[0]]
                    name, begin, end_it = self.rng.choice(faults)
                    self.site.ledger.counts[name] += 1
                    begin()
                    undo.callback(end_it)
                    self.sleep(2)
                self.sleep(max(4.0, for_s / 15))  # in a long run longer than the lease of a presence
            self.sleep(2)
        for tenant in tenants:
            tenant.end.set()
        for tenant in tenants:
            tenant.join()
        self.put_odd(False)
        for host in self.site.hosts:
            host.reconcile()
        print("\n" + ", ".join(f"{number} {what}" for what, number in sorted(self.site.ledger.counts.items())))

    def sleep(self, at_most_s: float) -> None:
        time.sleep(self.rng.random() * at_most_s)

    def faults(self, host: Host) -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
        """Return what may go wrong, the likelier twice: its name, what begins it, what ends it."""
        etcd, process = self.etcd, host.daemon.process
        assert process
        send = process.send_signal
        return [
            *[(self.KILL_GIPAM, host.kill, host.start_again)] * 2,
            ("gipam paused", lambda: send(signal.SIGSTOP), lambda: send(signal.SIGCONT)),
            ("host cut off", host.cut_off, host.join_again),
            ("etcd compacted", host.cut_off, lambda: (works(etcd.compact), host.join_again())),
            ("etcd emptied", lambda: works(etcd.ctl, "del", "--prefix", "/gipam/"), lambda: None),
            ("etcd restored", self.save, self.restore),
            ("odd values", lambda: self.put_odd(True), lambda: self.put_odd(False)),
            *[("etcd killed", lambda: etcd.kill(*self.members()), lambda: etcd.start(wait=False))] * 2,
            *[("etcd paused", lambda: etcd.pause(*self.members()), etcd.resume)] * 2]

    def save(self) -> None:
        path = os.path.join(self.etcd.directory, "snapshot")
        with contextlib.suppress(OSError):
            os.unlink(path)
        works(self.etcd.save, path)

    def restore(self) -> None:
        """Go back to what was saved, if it could be; nobody restores what is younger than a sign of presence."""
        time.sleep(PULSE_S + 1)
        path = os.path.join(self.etcd.directory, "snapshot")
        if os.path.exists(path):
            self.etcd.restore(path)

    def put_odd(self, is_there: bool) -> None:
        """Have keys and values in etcd that gipam did not write."""
        for number, value in enumerate(ODD):
            key = f"/gipam/gipam/claims/10.2.27.{number * 16}/28"
            works(self.etcd.ctl, *(("put", key, value) if is_there else ("del", key)))
        works(self.etcd.ctl, *(("put",) if is_there else ("del",)), "/gipam/gipam/claims/10.2.27.0/024",
              *["{}"] * is_there)

    def members(self) -> list[Member]:
        """Return the leader, or any, or a majority of them."""
        which, members = self.rng.choice(("leader", "any", "majority")), self.etcd.members
        self.site.ledger.counts[f"{which} of etcd"] += 1
        if which == "leader":
            with contextlib.suppress(CommandError):
                return [self.etcd.leader()]
        return self.rng.sample(members, len(members) // 2 + 1 if which == "majority" else 1)


class ChaosTest(unittest.TestCase):
    """Hosts under load; nothing that was answered is lost, and nothing is given twice."""

    maxDiff = None

    def live(self, hosts: int, members: int, is_lossy: bool) -> None:
        seed = seeds(1)[0]
        with self.subTest(GIPAM_TEST_SEED=seed):
            site = Site(self, members)
            if is_lossy:
                site.add_proxies()
            for number in range(hosts):
                site.host(f"host{number}", lines=CLOCK.format(3600 * number))
            Chaos(site, seed).run(CHAOS_S)
            self.assertEqual(site.ledger.problems, [])
            site.assert_agreement()

    def test_two_hosts_and_an_etcd_of_one_member(self) -> None:
        self.live(2, 1, is_lossy=False)

    def test_three_hosts_whose_clocks_are_an_hour_apart_and_three_members_that_are_late(self) -> None:
        self.live(3, 3, is_lossy=True)

    def test_checker_sees_two_hosts_that_do_not_speak(self) -> None:
        site = Site(self)
        for name in ("deaf", "dumb"):
            site.host(name, is_on_etcd=False)
        Chaos(site, seeds(1)[0]).run(30, Chaos.KILL_GIPAM)
        self.assertRegex(site.ledger.problems[0], "was given while there is")


# === One thing at a time ==========================================================================


class SiteCase(unittest.TestCase):
    maxDiff = None

    def assert_refused(self, words: str, ask: Callable[..., Any], *arguments: Any, **more: Any) -> str:
        """Check that the answer is an error with these words (a pattern), and return it."""
        with self.assertRaisesRegex(Refused, words) as caught:
            ask(*arguments, **more)
        return str(caught.exception)

    def request_when_calm(self, ask: Callable[[], Any]) -> None:
        """Request what is refused as long as others may claim again what they hold."""
        def is_given() -> bool:
            try:
                ask()
            except Refused as refusal:
                self.assertIn("etcd has lost claims", str(refusal))
                return False
            return True

        until(is_given, "it is given", QUIET_S)

    def assert_no_password(self, host: Host, password: str) -> None:
        done = host.command("config")
        self.assertEqual(done.returncode, 0, done.stderr)
        for text in (host.daemon.read_log(), done.stdout + done.stderr, repr(host.client.state()),
                     host.command("status").stdout):
            self.assertNotIn(password, text)


class NameTest(SiteCase):
    def test_second_host_of_a_name_does_not_serve_and_a_restart_of_the_first_does_at_once(self) -> None:
        site = Site(self)
        first, second = site.host("web"), site.new_host("web")
        first.client.request_pool()
        second.daemon.start(wait=False)
        self.assert_ends(second)
        before = first.pools()
        first.kill()
        first.daemon.start()  # its presence is still in etcd
        self.assertEqual(first.pools(), before)
        first.client.request_pool()
        site.etcd.kill()
        second.daemon.start()  # nobody can tell
        site.etcd.start()
        self.assert_ends(second)
        first.client.request_pool()
        site.assert_agreement()

    def assert_ends(self, host: Host) -> None:
        """It says that another has its name, and nothing is left of it."""
        assert host.daemon.process
        self.assertEqual(host.daemon.process.wait(QUIET_S), 75, host.daemon.read_log())
        self.assertIn("'web'", host.daemon.read_log())
        self.assertFalse(os.path.exists(host.daemon.socket))

    def come_with(self, site: Site, name: str, *subnets: str) -> tuple[Host, list[str]]:
        """Return a host that held these subnets, and addresses in them, before it used etcd, and its pools."""
        before = site.new_host(name, is_on_etcd=False)
        before.daemon.start()
        pool_ids = [before.client.request_pool(subnet)[0] for subnet in subnets]
        for pool_id in pool_ids:
            for address in ("", "", str(ipaddress.ip_network(pool_id.partition("#")[0])[200])):
                before.client.request_address(pool_id, address, MAC)
        before.kill()
        return site.host(name, directory=before.daemon.directory), pool_ids

    def test_hosts_come_to_a_site_with_what_they_have(self) -> None:
        site = Site(self)
        old, pool_ids = self.come_with(site, "old", "10.2.0.0/24", "172.16.0.0/23")
        until(lambda: site.claims() == site.holders(), "all is claimed")
        for pool_id in pool_ids:
            old.client.request_address(pool_id)
        new, pool_ids = self.come_with(site, "new", "10.2.0.0/24", "172.16.0.0/16", "172.17.0.0/24")
        for pool_id in pool_ids[:2]:
            until(lambda: "old" in new.pools()[pool_id]["claimed_elsewhere"], "the dispute is named")  # noqa: B023
            self.assert_refused("old", new.client.request_address, pool_id)
            new.client.release_pool(pool_id)
        new.client.request_address(pool_ids[2])
        self.request_when_calm(new.client.request_pool)
        site.assert_agreement()

    def test_who_was_paused_while_another_took_its_name_ends(self) -> None:
        site = Site(self)
        first, second = site.host("web"), site.new_host("web")  # neither claims anything, so that no head tells
        assert first.daemon.process
        first.daemon.process.send_signal(signal.SIGSTOP)
        second.daemon.start()  # once it has seen nothing of the first for long enough
        first.daemon.process.send_signal(signal.SIGCONT)
        self.assert_ends(first)
        second.client.request_pool()

    def test_old_backup_of_a_lease_file_gives_nothing_away(self) -> None:
        site = Site(self)
        host, other = site.host("old"), site.host("other")
        kept = host.client.request_pool()[1]
        host.kill(signal.SIGTERM)
        backup = pathlib.Path(host.daemon.file).read_bytes()
        host.daemon.start()
        for subnet in ("10.2.5.0/24", "10.2.6.0/24"):
            host.client.request_pool(subnet)
        host.kill()
        for name in glob.glob(host.daemon.file + ".journal*"):
            os.unlink(name)
        pathlib.Path(host.daemon.file).write_bytes(backup)
        site.docker.before = lambda _: time.sleep(1)  # it takes its time
        site.docker.show_network("net", {"Subnet": "10.2.5.0/24"})
        host.daemon.start()
        for subnet in (kept, "10.2.5.0/24", "10.2.6.0/24"):
            self.assert_refused("claimed by host old", other.client.request_pool, subnet)
        until(lambda: set(site.claims()) == {kept, "10.2.5.0/24"}, "Docker has told", QUIET_S)
        self.assertEqual(site.holders(), {kept: ["old"], "10.2.5.0/24": ["old"]})
        other.client.request_pool("10.2.6.0/24")
        site.assert_agreement()


class EvictTest(SiteCase):
    """What one host was answered does not count any more once it has been evicted; what it is answered then does."""

    LAN = "10.2.31.0/28"

    def setUp(self) -> None:
        self.site = Site(self)
        self.file = os.path.join(make_directory(self), "stop")
        self.here = self.site.host("here", lines=STOP.format(self.file))
        self.there = self.site.host("there")
        self.here.client.connection.timeout = 4 * QUIET_S  # it is stopped for long
        self.lan, self.other = (host.client.request_pool(self.LAN, gipam_shared="true")[0]
                                for host in (self.here, self.there))

    def stop_at(self, ask: Callable[[], str]) -> tuple[str, str]:
        """Stop it between its claim and its reply; evict it, give away what it has claimed, and let it go on.

        Return what has been given to the other and, or what has been said, to the one that was stopped.
        """
        pathlib.Path(self.file).touch()
        before, said = {**self.site.claims(), **self.site.claims(2)}, []

        def run() -> None:
            try:
                said.append(ask())
            except Refused as refusal:
                said.append(str(refusal))

        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: not os.path.exists(self.file), "it is stopped")
        (claimed,) = {**self.site.claims(), **self.site.claims(2)}.keys() - before.keys()
        self.assertNotEqual(self.there.command("evict", "here", "--yes").returncode, 0, "it was there just now")
        self.site.evict(self.here, self.there)
        subnet, _, address = claimed.rpartition("/")
        given = self.there.client.request_address(self.other, address, MAC) if "/" in subnet else \
            self.there.client.request_pool(claimed)[1]
        assert self.here.daemon.process
        self.here.daemon.process.send_signal(signal.SIGCONT)
        thread.join()
        return given, said[0]

    def test_who_is_stopped_between_its_claim_and_its_reply_is_not_given_what_it_claimed(self) -> None:
        given, said = self.stop_at(lambda: self.here.client.request_pool("10.2.7.0/24")[1])
        self.assertEqual(given, "10.2.7.0/24")
        self.assertRegex(said, "claimed by host there|etcd|try again")

    def test_nor_an_address_of_a_shared_subnet(self) -> None:
        given, said = self.stop_at(lambda: self.here.client.request_address(self.lan, "10.2.31.9", MAC))
        self.assertEqual(given, "10.2.31.9/28")
        self.assertRegex(said, "claimed by host there|etcd|try again")

    def test_who_is_cut_off_gets_nothing_anew_of_what_it_remembers(self) -> None:
        pool_id, subnet = self.here.client.request_pool(gipam_name="web")
        self.here.client.release_pool(pool_id)
        pool_id, _ = self.here.client.request_pool(gipam_name="web")
        self.here.cut_off()
        self.site.evict(self.here, self.there)
        self.there.client.request_pool(subnet)
        self.here.client.release_pool(pool_id)
        for ask in (lambda: self.here.client.request_pool(gipam_name="web"),
                    lambda: self.here.client.request_address(self.lan)):
            self.assert_refused("etcd does not answer", ask)
        self.here.join_again()
        until(lambda: self.site.claims().get(self.LAN) == ["here", "there"], "what it holds is claimed again", QUIET_S)
        self.site.assert_agreement()

    def test_who_is_dead_is_evicted_and_finds_what_is_anothers_by_then(self) -> None:
        mine, subnet = self.here.client.request_pool()
        address = self.here.client.request_address(self.lan, "10.2.31.9", MAC).partition("/")[0]
        self.here.kill()
        self.site.evict(self.here, self.there)
        self.there.client.request_pool(subnet)
        self.there.client.request_address(self.other, address, MAC)
        self.here.daemon.start()
        for pool_id in (mine, self.lan):
            until(lambda: "there" in self.here.pools()[pool_id]["claimed_elsewhere"], "it is named", QUIET_S)  # noqa: B023
        self.assert_refused("there", self.here.client.request_address, mine)
        self.here.client.release_pool(mine)
        self.here.client.release_address(self.lan, address)
        self.assert_refused("claimed by host there", self.here.client.request_address, self.lan, address, MAC)
        self.site.assert_agreement()


class LeaveTest(SiteCase):
    def test_who_leaves_a_shared_subnet_gets_nothing_of_it_though_it_has_not_let_go_yet(self) -> None:
        site, end = Site(self), threading.Event()
        here, there = site.host("here"), site.host("there")
        lan = "192.168.1.0/24"
        there.client.request_pool(lan, gipam_shared="true")

        def be_busy() -> None:
            client = here.daemon.client()
            while not end.is_set():
                client.release_pool(client.request_pool()[0])

        busy = [threading.Thread(target=be_busy) for _ in range(4)]
        for thread in busy:
            thread.start()
        try:
            for subnet in ("192.168.1.128/25", "192.168.0.0/22", lan) * 5:
                here.client.release_pool(here.client.request_pool(lan, gipam_shared="true")[0])
                self.assert_refused("claimed by hosts? .*there", here.client.request_pool, subnet)
        finally:
            end.set()
            for thread in busy:
                thread.join()
        site.assert_agreement()


class RestoreTest(SiteCase):
    """An etcd that is older than it was; save() is before, restore() is after."""

    def setUp(self) -> None:
        self.site = Site(self, 3)
        self.here, self.there = (self.site.host(name) for name in ("here", "there"))
        self.snapshot = os.path.join(self.site.etcd.directory, "snapshot")

    def save(self) -> None:
        until(lambda: self.site.claims() == self.site.holders(), "claims")
        self.site.etcd.save(self.snapshot)
        time.sleep(PULSE_S + 1)  # nobody restores what is younger than a sign of presence

    def restore(self, cluster_token: str = "") -> None:
        """Restore it, and wait until it is noticed by the one that is there."""
        self.site.etcd.restore(self.snapshot, cluster_token)
        until(lambda: self.site.claims() == {claim["subnet"]: claim["hosts"] for claim in
                                             self.there.client.state()["claims"]}, "it is read anew", QUIET_S)

    def test_what_an_older_etcd_gave_away_is_named_and_all_else_claimed_again(self) -> None:
        here, there, site = self.here, self.there, self.site
        gone_later = here.client.request_pool()[0]
        there.client.request_pool()
        self.save()
        here.client.release_pool(gone_later)
        disputed, subnet = here.client.request_pool("10.2.30.0/24")
        kept = here.client.request_pool(v6=True)
        there.client.request_pool(gipam_v4ab="26")
        before = site.holders()
        until(lambda: site.claims() == before, "claims")
        here.kill()  # it sees nothing of it
        self.restore("another")
        self.request_when_calm(lambda: there.client.request_pool(subnet))
        here.daemon.start()
        until(lambda: "there" in here.pools()[disputed]["claimed_elsewhere"], "the dispute is found and named", QUIET_S)
        self.assert_refused("there", here.client.request_address, disputed)
        until(lambda: site.claims() == {**before, subnet: ["there"]}, "every other claim is there again", QUIET_S)
        self.assertRegex(here.daemon.read_log(), f"{subnet}.*there")
        here.client.request_address(kept[0])
        here.client.release_pool(disputed)  # the way out: the network is made anew
        site.assert_agreement()

    def test_restore_behind_a_host_that_was_cut_off_is_seen(self) -> None:
        here, there, subnet = self.here, self.there, "192.168.1.0/24"
        mine, yours = (host.client.request_pool(subnet, gipam_shared="true")[0] for host in (here, there))
        self.save()
        for number in (24, 201):
            here.client.request_address(mine, f"192.168.1.{number}", MAC)
        here.cut_off()
        self.restore()
        self.request_when_calm(lambda: there.client.request_address(yours, "192.168.1.201", MAC))
        here.join_again()
        until(lambda: "there" in here.pools()[mine]["claimed_elsewhere"], "the dispute is found", QUIET_S)
        until(lambda: f"{subnet}/192.168.1.24" in self.site.claims(2), "the others are claimed again", QUIET_S)
        here.client.release_address(mine, "192.168.1.201")
        self.assert_refused("there", here.client.request_address, mine, "192.168.1.201", MAC)
        self.site.assert_agreement()

    def test_etcd_that_lost_all_is_told_again_before_anything_new_is_claimed(self) -> None:
        for host in (self.here, self.there):
            for _ in range(5):
                host.client.request_pool()
        before = self.site.claims()
        self.site.etcd.ctl("del", "--prefix", "/gipam/")
        self.assert_refused("etcd has lost claims", self.here.client.request_pool)
        until(lambda: self.site.claims() == before, "all is claimed again", QUIET_S)
        self.request_when_calm(self.here.client.request_pool)
        self.site.assert_agreement()


class TlsTest(SiteCase):
    PASSWORD = "s3cret-of-etcd"

    def secure_site(self, token_ttl_s: int = 300) -> Site:
        site = Site(self, tls=True, token_ttl_s=token_ttl_s)
        site.etcd.enable_auth("gipam", self.PASSWORD)
        return site

    def secure_host(self, site: Site, name: str, password: str = "", tls: str = "") -> Host:
        """Start one whose password is not on its command line."""
        endpoints = site.etcd.endpoints.replace("//", f"//gipam:{password or self.PASSWORD}@")
        return site.host(name, "-host", name, "-etcdtls", tls or site.etcd.client_tls, is_on_etcd=False,
                         env={"GIPAM_ETCD": endpoints})

    def test_wrong_ca_and_wrong_password_are_named(self) -> None:
        site, foreign = self.secure_site(), make_directory(self)
        make_certificates(foreign, ["10.77.0.1"])
        for name, words, password, tls in (("ca", "certificate verify failed", "", foreign),
                                           ("password", "invalid user ID or password", "wr0ng-of-etcd", "")):
            with self.subTest(name):
                host = self.secure_host(site, name, password, tls)
                text = self.assert_refused(words, host.client.request_pool)
                self.assertIn(site.etcd.endpoints, text)
                self.assertNotIn(password or self.PASSWORD, text)
                self.assert_no_password(host, password or self.PASSWORD)

    def test_expired_token_is_renewed(self) -> None:
        site = self.secure_site(token_ttl_s=1)
        host = self.secure_host(site, "patient")
        for _ in range(3):
            host.client.request_pool()
            time.sleep(3)  # the token is good for one second
        site.etcd.kill()  # and is forgotten by an etcd that ends
        site.etcd.start()
        until(host.is_etcd_up, "etcd is back", QUIET_S)
        host.client.request_pool()
        site.assert_agreement()
        self.assert_no_password(host, self.PASSWORD)


if __name__ == "__main__":
    sys.exit(main())
