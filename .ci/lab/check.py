"""`gipam.py check` and lost lease files beside a real dockerd: `python3 .ci/lab/check.py`.

The tests make the leftovers of crashes; check finds them, fixes them and finds no more.
"""

from __future__ import annotations

import contextlib
import glob
import ipaddress
import itertools
import json
import os
import pathlib
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from typing import Any

from engine import DOCKER, ROUTED, SOCKET, DockerCase, endpoint_addresses
from machines import DOCKER_DEADLINE_S, main

import gipam
from test_gipam import ENDPOINT, Client, FakeDocker, wait_until

DOCKER_SOCKET = "/run/docker.sock"
BLIND = "DOCKER_HOST=tcp://192.0.2.1:1"  # gipam cannot reach Docker
CHURN_S = 60.0
HOUR_S = 3600
PAGE_BYTES = 4096  # of a tmpfs
# Runs gipam and kills it in a request of its import; arguments: which one, the path of gipam.py,
# gipam's arguments.
KILLED_IN_IMPORT = """
import itertools, os, signal, sys
count, path = int(sys.argv[1]), sys.argv[2]
sys.path.insert(0, os.path.dirname(path))
import gipam

post_in_loop = gipam.post_in_loop
numbers = itertools.count(1)

def post_or_die(*arguments):
    if next(numbers) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return post_in_loop(*arguments)

gipam.post_in_loop = post_or_die
sys.exit(gipam.main(sys.argv[3:]))
"""
WAYS_TO_STOP = (("restart", "-t", "0"), ("stop", "-t", "0"), ("kill",))


def run_on(network: str, name: str) -> tuple[str, ...]:
    """Return the docker command that starts a container."""
    return ("run", "-d", "--name", name, "--network", network, "bb")


def with_older_leases(text: str, age_s: int) -> str:
    """Return a lease file as if each lease had been granted this much earlier."""
    document = json.loads(text)
    # Without a checksum, gipam takes it for a file that somebody has edited.
    del document["Checksum"]
    for pool in document["Allocated"]:
        for lease in pool["Leases"]:
            lease[3] -= age_s
    return json.dumps(document)


class FakeDockerTest(DockerCase):
    """The FakeDocker of the self-check shows the same as this Docker, key by key."""

    def setUp(self) -> None:
        super().setUp()
        lan = "--subnet 10.9.0.0/24 --ip-range 10.9.0.64/26 --aux-address a=10.9.0.7"
        self.docker.network("web", "--ipv6")
        self.docker.network("lan", *lan.split())
        self.docker.container("one", "web")
        self.docker("network", "connect", "lan", "one")
        self.docker("create", "--name", "created", "--network", "lan", "bb")
        ipv4, ipv6 = self.docker.subnets("web")
        self.subnets = {"4": ipaddress.ip_network(ipv4), "6": ipaddress.ip_network(ipv6)}

        self.client = Client(self.docker.path(DOCKER_SOCKET))
        self.addCleanup(self.client.close)
        path = os.path.join(self.docker.disk, "fake.sock")
        self.addCleanup(os.unlink, path)
        self.fake = FakeDocker(self, path, self.grant, DOCKER)
        self.fake.make_network("web", "4", "6")
        self.fake.start("one", "web")

    def grant(self, method: str, **arguments: Any) -> Any:
        """Reply to the fake as gipam replied to the real network."""
        if method == "IpamDriver.RequestPool":
            pool_id = "6" if arguments["V6"] else "4"
            return {"PoolID": pool_id, "Pool": str(self.subnets[pool_id])}
        subnet = self.subnets[arguments["PoolID"]]
        return {"Address": f"{subnet[1]}/{subnet.prefixlen}"}

    def get(self, path: str) -> Any:
        """Return Docker's reply to a GET request."""
        status, reply = self.client.post(path, b"", "GET")[:2]
        self.assertEqual(status, 200)
        return reply

    def test_networks(self) -> None:
        networks = {network["Name"]: network for network in self.get("/networks")}
        web = networks["web"]
        fake = self.fake.networks["web"]
        self.assertEqual(web.keys(), fake.keys())
        self.assertEqual(web["IPAM"]["Driver"], "gipam")
        self.assertEqual(web["IPAM"]["Options"], {})
        self.assertEqual(web["IPAM"]["Config"], fake["IPAM"]["Config"])
        self.assertEqual(networks["lan"]["IPAM"]["Config"], [{
            "Subnet": "10.9.0.0/24",
            "IPRange": "10.9.0.64/26",
            "AuxiliaryAddresses": {"a": "10.9.0.7"},
        }])

    def test_containers(self) -> None:
        listed = self.get("/containers/json?all=1")
        containers = {container["Names"][0]: container for container in listed}
        one = containers["/one"]
        fake = self.fake.containers["one"]
        self.assertEqual(one.keys(), fake.keys())
        endpoints = one["NetworkSettings"]["Networks"]
        fake_endpoints = fake["NetworkSettings"]["Networks"]
        self.assertEqual(endpoints["web"].keys(), fake_endpoints["web"].keys())
        web = self.docker.inspect("network", "web")[0]
        self.assertEqual(endpoints["web"]["NetworkID"], web["Id"])
        self.assertEqual(endpoints["lan"]["Gateway"], "10.9.0.64")

        unused = containers["/created"]["NetworkSettings"]["Networks"]["lan"]
        expected = {**ENDPOINT, **self.fake.since(28, GwPriority=0)}
        expected["IPAMConfig"] = unused["IPAMConfig"]
        self.assertEqual(unused, expected)

    def test_addresses_that_the_user_named(self) -> None:
        six = ("--subnet", "fd00:9::/64", "--ipv6")
        self.docker.network("both", "--subnet", "10.10.0.0/24", *six)
        self.docker.container("four", "both", "--ip", "10.10.0.70")
        self.docker.container("six", "both", "--ip6", "FD00:9:0::0F")
        path = self.docker.path(DOCKER_SOCKET)
        view = gipam.read_docker_allocations(path, "gipam", DOCKER_DEADLINE_S)
        named = {allocation.address for allocation in view.ours if allocation.is_explicit}
        self.assertEqual(named, {"10.10.0.70", "fd00:9::f"})


class RelayHandler(socketserver.BaseRequestHandler):
    """Relays a connection of dockerd to gipam, until the reply to a fatal request."""

    server: KillingRelay

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as gipam:
            gipam.connect(self.server.gipam_path)
            self.relay(self.request, gipam)

    def relay(self, dockerd: socket.socket, gipam: socket.socket) -> None:
        """Pass data on in both directions; kill dockerd instead of delivering the fatal reply."""
        request = b""
        while True:
            readable, _, _ = select.select([dockerd, gipam], [], [])
            if dockerd in readable:
                data = dockerd.recv(65536)
                if not data:
                    return
                request += data
                self.send(gipam, data)
            if gipam in readable:
                data = gipam.recv(65536)
                if self.server.fatal in request:
                    self.server.kill_dockerd()
                    return
                if not data:
                    return
                self.send(dockerd, data)
                request = b""

    def send(self, peer: socket.socket, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # the peer has gone
            peer.sendall(data)


class KillingRelay(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Stands between dockerd and gipam, in the place of gipam's socket.

    The relay kills dockerd instead of delivering the reply to the next request with `fatal` in it.
    """

    daemon_threads = True
    NOTHING = b"no method"

    def __init__(self, test: DockerCase) -> None:
        self.docker = test.docker
        self.fatal = self.NOTHING
        path = test.docker.path(SOCKET)
        self.gipam_path = path + ".real"
        os.rename(path, self.gipam_path)
        test.addCleanup(os.rename, self.gipam_path, path)
        super().__init__(path, RelayHandler)
        test.addCleanup(self.docker.stop, "dockerd")
        test.addCleanup(self.server_close)
        test.addCleanup(self.shutdown)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def kill_dockerd(self) -> None:
        self.fatal = self.NOTHING
        self.docker.stop("dockerd", number=signal.SIGKILL)


class CheckTest(DockerCase):
    MAC = "02:42:00:00:00:09"

    def leaked(self, container: str, network: str, v6: bool = False) -> str:
        """Return the finding of `check` on a container's address if it leaks."""
        address = self.docker.address(container, network, v6)
        mac = self.docker.endpoint(container, network)["MacAddress"]
        return self.leaked_address(address, network, mac)

    def leaked_address(self, address: str, network: str, owner: str) -> str:
        return (f"leaked_address: address {address} of network {network} is reserved for {owner}, "
                "but nothing uses it")

    def leaked_pool(self, subnet: str) -> str:
        return f"leaked_pool: subnet {subnet} is held with 1 lease, but no network uses it"

    def test_containers_killed_and_networks_removed_while_gipam_is_down(self) -> None:
        self.docker.network("web", containers=("one", "two", "three"))
        self.docker.network("gone")
        gone = self.docker.subnets("gone")[0]
        expected = (self.leaked("one", "web"), self.leaked("two", "web"), self.leaked_pool(gone))
        self.docker.stop("gipam", number=signal.SIGKILL)
        # Docker waits 15 s for each release.
        self.docker.at_once(("kill", "one"), ("rm", "-f", "two"), ("network", "rm", "gone"))
        self.docker.start_gipam()
        self.assert_found_and_fixed(*expected)
        self.docker("start", "one")
        self.assert_no_address_is_twice()

    def test_lease_file_restored_from_an_old_copy(self) -> None:
        self.docker.network("web", "--ipv6", containers=("one",))
        self.docker.network("gone")
        gone = self.docker.subnets("gone")[0]
        leaked = [self.leaked("one", "web"), self.leaked("one", "web", v6=True)]
        leaked.append(self.leaked_pool(gone))
        copy = self.docker.read_lease_file()

        self.docker("rm", "-f", "one")
        self.docker("network", "rm", "gone")
        self.docker.container("two", "web")
        self.docker.network("new", containers=("three",))
        self.docker.replace_lease_file(copy)
        # The import adds grants that the file lacks; only check may release surplus ones.
        wait_until("the end of the import", self.is_import_done)
        self.assert_found_and_fixed(*leaked)

        self.docker.container("four", "web")
        self.docker.container("five", "new")
        self.docker.network("newer")
        self.assert_found_and_fixed()

    def test_stopped_container_with_a_fixed_address_starts_again(self) -> None:
        """In a /30, the only other address is the gateway's, which Docker up to 28 hides."""
        self.addCleanup(self.docker.stop, "gipam")
        self.docker.network("tiny", "--subnet", "10.8.0.0/30")
        self.docker.container("fixed", "tiny", "--ip", "10.8.0.2")
        for variables in ((), (BLIND,)):
            with self.subTest(variables):
                self.docker("stop", "fixed")
                self.docker.replace_lease_file("", *variables, number=signal.SIGKILL)
                self.docker("start", "fixed")
                held = self.docker.held_by_gipam()
                self.assertEqual(held["10.8.0.0/30"], {"10.8.0.1", "10.8.0.2"})

    def test_gateway_of_an_empty_network_with_a_size_hint_is_given_to_no_container(self) -> None:
        """Docker does not show the subnet of such a network until it has a container."""
        self.docker.network("hint", "--subnet", "0.0.0.0/29")
        self.docker.replace_lease_file(number=signal.SIGKILL)
        for number in range(5):
            self.docker.container(f"hint{number}", "hint")
        self.assert_refused("no available addresses", "run", "-d", "--network", "hint", "bb")
        self.assert_agreement()

    def is_dockerd_dead(self) -> bool:
        assert self.docker.dockerd is not None
        return not self.docker.dockerd.is_running()

    def lose_reply(self, relay: KillingRelay, method: bytes, *command: str) -> None:
        """Run a docker command that ends when dockerd is killed before it gets a reply."""
        relay.fatal = method
        self.assert_refused("", *command)
        wait_until("the end of dockerd", self.is_dockerd_dead)
        self.docker.start_dockerd()

    def test_dockerd_killed_between_a_reply_and_storing_it(self) -> None:
        self.docker.stop("dockerd")
        relay = KillingRelay(self)
        self.docker.start_dockerd()
        self.docker.network("web", "--ipv6", containers=("one",))
        used = ipaddress.ip_address(self.docker.address("one", "web"))

        # The address of a container, then that of a gateway.
        run = ("run", "-d", "--network", "web", "--mac-address", self.MAC, "bb")
        self.lose_reply(relay, b"RequestAddress", *run)
        create = ("network", "create", "--ipam-driver", "gipam", "--subnet", "10.9.0.0/24")
        self.lose_reply(relay, b"RequestAddress", *create, "lan")

        self.docker("start", "one")
        leaked = self.leaked_address(str(used + 1), "web", self.MAC)
        self.assert_found_and_fixed(leaked, self.leaked_pool("10.9.0.0/24"))
        self.docker.network("lan", "--subnet", "10.9.0.0/24")
        self.assert_found_and_fixed()


class AllKindsTest(DockerCase):
    """Networks of all kinds: hidden gateways, odd spellings, size hints, one family, templates."""

    def networks(self) -> dict[str, str]:
        """Return the options of each network."""
        near, far = self.docker.wire()
        other_near, other_far = self.docker.wire()
        lan = "-d macvlan --subnet 10.50.0.0/24"
        return {
            "plain": "",
            "dual": "--ipv6",
            "internal": "--ipv6 --internal",
            "routed": "--ipv6 " + " ".join(ROUTED),
            "small": "--ipv6 --ipam-opt gipam.v4ab=27 --ipam-opt gipam.v6ab=80",
            "hint": "--subnet 0.0.0.0/28",
            "hint6": "--ipv6 --subnet ::/72",
            "any": "--subnet 0.0.0.0/0",
            "named": "--ipv6 --ipam-opt gipam.name=named",
            "six": "--subnet fd00:7::/64",
            "explicit": "--ipv6 --subnet 10.2.200.0/22 --subnet 2001:db8:0:1ff::/64",
            "odd": "--ipv6 --subnet FD00:0008:0::/64 --gateway FD00:8:0::0F "
                   "--aux-address b=fd00:8:0:0::00AA",
            "range": "--subnet 10.8.0.0/16 --ip-range 10.8.7.0/24 --gateway 10.8.0.9 "
                     "--aux-address a=10.8.7.0 --aux-address b=10.8.0.1 "
                     "--aux-address DefaultGatewayIPv4=10.8.0.77",
            "macvlan": f"-d macvlan -o parent={near} --ipv6 --subnet 10.51.0.0/24 "
                       "--subnet 10.52.0.0/24 --subnet fd00:51::/64",
            "low": f"{lan} -o parent={far} --ip-range 10.50.0.0/25",
            "high": f"{lan} -o parent={other_near} --ip-range 10.50.0.128/25 "
                    "--gateway 10.50.0.9",
            "whole": f"{lan} -o parent={other_far} --ip-range 10.50.0.0/24",
        }

    def setUp(self) -> None:
        super().setUp()
        networks = self.networks()
        self.names = list(networks)
        self.containers = ["in-" + name for name in networks]
        for name, options in networks.items():
            self.docker.network(name, *options.split())
        self.make_networks_of_templates()
        self.assertEqual(self.docker.check(), [])

        for name, container in zip(self.names, self.containers):
            restart = ("--restart", "always") if len(name) % 2 else ()
            self.docker.container(container, name, *restart)
        self.docker("network", "connect", "dual", "in-plain")
        self.docker("stop", "in-internal")
        self.assert_agreement()

    def make_networks_of_templates(self) -> None:
        subnet = ("--subnet", "10.60.0.0/24", "--ip-range", "10.60.0.128/25")
        self.docker.network("template", "--config-only", *subnet)
        copy = ("-d", "bridge", "--config-from", "template")
        self.docker("network", "create", *copy, "made")
        self.docker.network("unused", "--config-only", "--subnet", "10.61.0.0/24")
        self.assertEqual(self.docker.held_by_gipam()["10.60.0.0/24"], {"10.60.0.128"})

    def test_check_finds_nothing_after_a_lost_lease_file_and_after_crashes(self) -> None:
        self.assert_lengths_are_those_of_the_options()
        self.assert_lost_file_is_rebuilt()
        for number, name in enumerate(("plain", "range", "low", "high")):
            self.docker.container(f"more{number}", name)
        self.docker.network("new", "--ipv6")
        self.assert_agreement()
        for _ in range(2):
            self.docker.kill_and_start()
            self.docker("start", *self.containers)
            self.assert_agreement()

    def assert_lengths_are_those_of_the_options(self) -> None:
        lengths = []
        for container in self.docker.inspect("container", "in-small", "in-hint", "in-hint6"):
            lengths += [cidr.split("/")[1] for cidr in endpoint_addresses(container)]
        self.assertEqual(lengths, ["27", "80", "28", "24", "72"])

    def assert_lost_file_is_rebuilt(self) -> None:
        """Docker shows everything that gipam needs to hold the same as before."""
        before = self.docker.held_by_gipam()
        self.docker.replace_lease_file(number=signal.SIGKILL)
        self.assertEqual(self.docker.check(), [])
        self.assertEqual(self.docker.held_by_gipam(), before)


class ChurnTest(DockerCase):
    """Containers stop and start while `check` looks at them."""

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("web", "--ipv6")
        self.docker.network("lan", "--subnet", "10.9.0.0/24")
        commands = [run_on("web", f"web{number}") for number in range(10)]
        commands += [run_on("lan", f"lan{number}") for number in range(10)]
        self.docker.at_once(*commands)

    def come_and_go(self, name: str, end_s: float) -> None:
        for way in itertools.cycle(WAYS_TO_STOP):
            if time.monotonic() > end_s:
                return
            self.docker(*way, name)
            self.docker("start", name)

    def test_nothing_false_is_reported(self) -> None:
        """The grace time excuses recent leases, but none that is an hour old."""
        older = with_older_leases(self.docker.read_lease_file(), HOUR_S)
        self.docker.replace_lease_file(older)
        names = self.docker("ps", "--format", "{{.Names}}").split()
        self.assertEqual(len(names), 20)
        end_s = time.monotonic() + CHURN_S
        threads = []
        for name in names:
            thread = threading.Thread(target=self.come_and_go, args=(name, end_s))
            thread.start()
            threads.append(thread)

        reports = []
        while any(thread.is_alive() for thread in threads):
            reports.append(self.docker.check(grace_s=60))
        self.assertEqual([report for report in reports if report], [])
        self.assertGreater(len(reports), 1)
        self.assert_found_and_fixed()


class LostFileTest(DockerCase):
    """The lease file is lost while networks and containers live, and Docker cannot be reached."""

    OLD = ("web", "old")
    NEW = ("new0", "new1", "new2", "new3")
    RANGE = ipaddress.ip_network("10.9.64.0/18")

    def setUp(self) -> None:
        super().setUp()
        ipv4 = ("--subnet", "10.9.0.0/16", "--ip-range", str(self.RANGE))
        self.docker.network("web", "--ipv6", *ipv4, "--subnet", "fd00:9::/64")
        self.docker.network("old", "--ipv6", "--ipam-opt", "gipam.v4ab=17")
        commands = []
        for network in self.OLD:
            commands += [run_on(network, f"{network}{number}") for number in range(4)]
        self.docker.at_once(*commands)
        self.addCleanup(self.docker.stop, "gipam")
        self.docker.replace_lease_file("", BLIND, number=signal.SIGKILL)

    def test_what_docker_holds_is_adopted_from_its_requests_and_the_routes(self) -> None:
        for number, network in enumerate(self.NEW):
            self.docker.container(f"more{number}", "web")
            self.docker.network(network, "--ipv6")
        self.docker("restart", "web0", "web1", "old0", "old1")
        self.docker("stop", "web2", "old2")
        self.docker("start", "web2", "old2")
        self.assert_no_address_is_twice(24)
        self.assert_no_subnets_overlap()

        address = ipaddress.ip_address(self.docker.address("web0", "web"))
        self.assertIn(address, self.RANGE)
        self.assert_reaches("web0", self.docker.address("web3", "web"))
        self.assert_reaches("old0", self.docker.address("old3", "old", v6=True))

    def assert_no_subnets_overlap(self) -> None:
        texts = self.docker.subnets(*self.OLD, *self.NEW)
        subnets = [ipaddress.ip_network(text) for text in texts]
        self.assertEqual(len(subnets), 12)
        for subnet, other in itertools.combinations(subnets, 2):
            self.assertFalse(subnet.overlaps(other), (subnet, other))


class ImportTest(DockerCase):
    """gipam starts with no lease file, an old one or a sound one, whatever the state of dockerd."""

    NETWORKS = ("web", "lan", "six")

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.docker.start)
        self.addCleanup(self.docker.stop, "gipam", number=signal.SIGKILL)
        self.docker.network("web", "--ipv6")
        self.docker.network("lan", "--subnet", "10.9.0.0/24", "--ip-range", "10.9.0.64/26")
        self.docker.network("six", "--ipv6", "--subnet", "fd00:7::/64")
        # dockerd requests the addresses of restarting containers again, but none of this network.
        self.docker.network("idle", "--ipv6")
        for name in self.NETWORKS:
            self.docker.container("in-" + name, name, "--restart", "always")

    def lose_file(self) -> None:
        """Kill gipam and remove every file that it has written."""
        self.docker.stop("gipam", number=signal.SIGKILL)
        for name in glob.glob(self.docker.leases + "*"):
            os.unlink(name)

    def has_logged(self, text: str) -> bool:
        assert self.docker.gipam is not None
        return text in self.docker.gipam.read_log()

    def assert_imported(self) -> None:
        """Check that gipam holds all addresses in use, and that new containers get none of them."""
        wait_until("the end of the import", self.is_import_done)
        self.assert_agreement()
        for name in self.NETWORKS:
            self.docker.container("new-" + name, name)
        self.docker.network("new", "--ipv6")
        self.assert_agreement(10)

    def test_file_is_lost_with_docker_alive(self) -> None:
        before = self.docker.held_by_gipam()
        self.lose_file()
        self.docker.start_gipam()
        held = self.docker.held_by_gipam()
        self.assertEqual(held, before, "imported before anything is served")
        self.assert_imported()

    def test_file_is_lost_with_docker_down(self) -> None:
        self.docker.stop("dockerd", number=signal.SIGKILL)
        self.lose_file()
        self.docker.start_gipam()
        self.assertEqual(self.docker.held_by_gipam(), {})
        self.docker.start_dockerd()
        self.assert_imported()

    def test_file_is_lost_with_docker_starting(self) -> None:
        """dockerd waits for gipam, so gipam cannot import anything before it serves."""
        self.docker.stop("dockerd", number=signal.SIGKILL)
        self.lose_file()
        self.docker.start_dockerd(wait=False)
        path = self.docker.path(DOCKER_SOCKET)
        wait_until("the socket of dockerd", os.path.exists, path)
        self.docker.start_gipam()
        self.docker.wait_for_dockerd()
        self.assert_imported()

    def test_gipam_is_killed_in_the_middle_of_the_import(self) -> None:
        """gipam dies in each of the import's requests; earlier ones are on disk."""
        for count in (1, 2, 3):
            with self.subTest(count=count):
                self.lose_file()
                program = ("python3", "-c", KILLED_IN_IMPORT, str(count))
                arguments = self.docker.command()[1:]
                gipam = self.docker.spawn(*program, *arguments)
                gipam.process.wait(DOCKER_DEADLINE_S)
                self.docker.start_gipam()
                wait_until("the end of the import", self.is_import_done)
                self.assert_agreement(5)
        self.assert_imported()

    def test_backup_of_an_hour_ago_is_restored(self) -> None:
        backup = with_older_leases(self.docker.read_lease_file(), HOUR_S)
        self.docker.network("late", "--ipv6", containers=("late",))
        self.docker("network", "connect", "lan", "late")
        self.docker.replace_lease_file(backup)
        wait_until("the end of the import", self.is_import_done)
        self.assert_agreement(8)
        self.docker("rm", "-f", "late")
        self.docker("network", "rm", "late")
        self.assert_imported()

    def test_stopped_container_with_a_fixed_address_keeps_it_after_the_import(self) -> None:
        """In a network of five addresses, of which it is the first to be released."""
        fixed = "10.90.0.2"
        self.docker.network("small", "--subnet", "10.90.0.0/29")
        self.docker.container("fixed", "small", "--ip", fixed)
        others = ("c3", "c4", "c5", "c6")
        for name in others:
            self.docker.container(name, "small")
        self.lose_file()
        self.docker.start_gipam()
        for name in ("fixed", *others):
            self.docker("stop", "-t", "0", name)
        for name in others:
            # Before Docker 29, a new MAC address makes it another owner.
            self.docker("start", name)
        self.docker("start", "fixed")
        self.assertEqual(self.docker.address("fixed", "small"), fixed)

    def test_adoption_is_cut_short_by_a_crash_before_its_checkpoint(self) -> None:
        """The crash leaves the pools of restarted containers held, but not the other containers."""
        # In the upper half of the range: a gipam that cannot reach Docker starts in the lower half.
        self.docker.container("other", "lan", "--ip", "10.9.0.120")
        self.lose_file()
        self.docker.start_gipam(BLIND)
        self.docker("restart", "-t", "0", "in-lan")
        held = self.docker.held_by_gipam()
        self.assertNotIn(self.docker.address("other", "lan"), held["10.9.0.0/24"])

        self.docker.stop("gipam", number=signal.SIGKILL)
        self.docker.start_gipam()
        wait_until("the end of the import", self.is_import_done)
        self.assert_agreement(6)
        self.docker("rm", "-f", "other")
        self.assert_imported()

    def start_on_small_disk(self) -> str:
        """Start gipam without a lease file on a disk of 64 kB; return its path outside."""
        self.addCleanup(setattr, self.docker, "leases", self.docker.leases)
        self.lose_file()
        disk = self.docker.disk + "/small"
        self.docker.run_lines(f"mkdir {disk}; mount -t tmpfs -o size=64k tmpfs {disk}")
        self.docker.leases = disk + "/leases.json"
        self.docker.start_gipam(BLIND)
        return self.docker.path(disk)

    def fill(self, disk: str) -> None:
        """Fill the disk, and the last page of the journal but for a pool and at most one lease."""
        client = Client(self.docker.path(SOCKET))
        self.addCleanup(client.close)
        client.release_pool(client.request_pool()[0])
        lease_file = pathlib.Path(disk, "leases.json")
        journal = pathlib.Path(disk, "leases.json.journal.1")

        def has_checkpoint() -> bool:
            return b'"Journal"' in lease_file.read_bytes()

        wait_until("the first checkpoint", has_checkpoint)
        with open(f"{disk}/filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(512))
        while -len(journal.read_bytes().rstrip(b"\0")) % PAGE_BYTES > 430:
            client.release_pool(client.request_pool()[0])

    def test_adoption_is_cut_short_by_a_full_disk(self) -> None:
        """As soon as the disk has space, the import completes what the adoption began."""
        self.docker.container("other", "lan", "--ip", "10.9.0.120")
        disk = self.start_on_small_disk()
        self.fill(disk)
        self.assert_refused("No space left", "restart", "-t", "0", "other")
        held = self.docker.held_by_gipam()
        self.assertEqual(held.keys(), {"10.9.0.0/24"})
        self.assertLessEqual(held["10.9.0.0/24"], {"10.9.0.64"})

        self.docker.stop("gipam", number=signal.SIGKILL)
        self.docker.start_gipam()
        wait_until("an import in vain", self.has_logged, "not compared with Docker yet")
        self.assertFalse(self.is_import_done())
        os.unlink(f"{disk}/filler")
        wait_until("the end of the import", self.is_import_done)
        self.docker("start", "other")
        self.assert_agreement(6)
        self.docker("rm", "-f", "other")
        self.assert_imported()

    def test_sound_file_stays_as_it_is_and_the_log_has_one_line(self) -> None:
        before = self.docker.held_by_gipam()
        file = self.docker.read_lease_file()
        wait_until("the end of the import", self.is_import_done)
        assert self.docker.gipam is not None
        log = self.docker.gipam.read_log()
        lines = [line for line in log.splitlines() if "Docker" in line]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn("compared with Docker: nothing is missing", lines[0])
        self.assertEqual(self.docker.held_by_gipam(), before)
        self.assertEqual(self.docker.read_lease_file(), file)


if __name__ == "__main__":
    sys.exit(main())
