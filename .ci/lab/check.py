"""`gipam.py check` and lost lease files beside a real dockerd: `python3 .ci/lab/check.py`.

What crashes leave behind is made, found, mended, and not found again.
"""

from __future__ import annotations

import contextlib
import glob
import ipaddress
import itertools
import json
import os
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from typing import Any

from engine import DOCKER, ROUTED, SOCKET, DockerCase, endpoint_addresses
from machines import DOCKER_DEADLINE_S, main, until

from test_gipam import ENDPOINT, Client, FakeDocker, wait_until

BLIND = "DOCKER_HOST=tcp://192.0.2.1:1"  # gipam cannot ask Docker
CHURN_S = 60.0
# gipam that is killed in a request of its import: count, the path of gipam.py, arguments.
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
WAYS = (("restart", "-t", "0"), ("stop", "-t", "0"), ("kill",))


class Between(socketserver.BaseRequestHandler):
    """Stands between dockerd and gipam, and kills dockerd instead of handing a reply on."""

    server: BetweenServer

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as gipam:
            gipam.connect(self.server.gipam)
            asked, other = b"", {self.request: gipam, gipam: self.request}
            while True:
                for side in select.select(list(other), [], [])[0]:
                    data = side.recv(65536)
                    asked = asked + data if side is self.request else asked
                    if side is gipam and self.server.fatal in asked:
                        self.server.fatal = b"no more"
                        self.server.docker.stop("dockerd", number=signal.SIGKILL)
                        return
                    if not data:
                        return
                    with contextlib.suppress(BrokenPipeError):  # who asked has gone
                        other[side].sendall(data)
                    asked = asked if side is self.request else b""


class BetweenServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    fatal = b"no method"

    def __init__(self, test: DockerCase) -> None:
        self.docker, path = test.docker, test.docker.path(SOCKET)
        self.gipam = path + ".real"
        os.rename(path, self.gipam)
        test.addCleanup(os.rename, self.gipam, path)
        super().__init__(path, Between)
        test.addCleanup(self.docker.stop, "dockerd")
        test.addCleanup(self.server_close)
        test.addCleanup(self.shutdown)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class CheckTest(DockerCase):
    def leaked(self, container: str, network: str, v6: bool = False) -> str:
        """Return what `check` will say of a container's address, should it leak."""
        return self.leaked_address(self.docker.address(container, network, v6), network,
                                   self.docker.endpoint(container, network)["MacAddress"])

    @staticmethod
    def leaked_address(address: str, network: str, owner: str = "02:42:00:00:00:09") -> str:
        return f"leaked_address: address {address} of network {network} is reserved for {owner}, but nothing uses it"

    @staticmethod
    def leaked_pool(subnet: str) -> str:
        return f"leaked_pool: subnet {subnet} is held with 1 lease, but no network uses it"

    def test_fake_docker_has_the_shapes_of_this_one(self) -> None:
        """What the self-check builds upon."""
        self.docker.network("web", "--ipv6")
        self.docker.network("lan", "--subnet", "10.9.0.0/24", "--ip-range", "10.9.0.64/26", "--aux-address", "a=10.9.0.7")
        self.docker.container("one", "web")
        self.docker("network", "connect", "lan", "one")
        self.docker("create", "--name", "created", "--network", "lan", "bb")
        client = Client(self.docker.path("/run/docker.sock"))
        self.addCleanup(client.close)
        networks, containers = (client.post(path, b"", "GET")[1]
                                for path in ("/networks", "/containers/json?all=1"))
        web, lan = (next(it for it in networks if it["Name"] == name) for name in ("web", "lan"))
        one, created = (next(it for it in containers if it["Names"] == ["/" + name]) for name in ("one", "created"))
        subnets = dict(zip((False, True), map(ipaddress.ip_network, self.docker.subnets("web"))))

        def grant(method: str, **arguments: Any) -> Any:
            """What gipam granted to the real network."""
            subnet = subnets[arguments.get("V6") or arguments.get("PoolID") == "6"]
            if method == "IpamDriver.RequestPool":
                return {"PoolID": str(subnet.version), "Pool": str(subnet)}
            return {"Address": f"{subnet[1]}/{subnet.prefixlen}"}

        fake = FakeDocker(self, os.path.join(self.docker.disk, "fake.sock"), grant, DOCKER)
        fake.make_network("web", "4", "6")
        fake.start("one", "web")
        built, fake_one = fake.networks["web"], fake.containers["one"]
        self.assertEqual(set(web) ^ set(built), set())
        self.assertEqual({key: web["IPAM"][key] for key in ("Driver", "Options")}, {"Driver": "gipam", "Options": {}})
        self.assertEqual(web["IPAM"]["Config"], built["IPAM"]["Config"])
        self.assertEqual(lan["IPAM"]["Config"], [{
            "Subnet": "10.9.0.0/24", "IPRange": "10.9.0.64/26", "AuxiliaryAddresses": {"a": "10.9.0.7"}}])
        self.assertEqual(set(one) ^ set(fake_one), set())
        endpoints = one["NetworkSettings"]["Networks"]
        self.assertEqual(set(endpoints["web"]) ^ set(fake_one["NetworkSettings"]["Networks"]["web"]), set())
        self.assertEqual(endpoints["web"]["NetworkID"], web["Id"])
        self.assertEqual(endpoints["lan"]["Gateway"], "10.9.0.64")
        unused = created["NetworkSettings"]["Networks"]["lan"]
        self.assertEqual(unused, {**ENDPOINT, **fake.since(28, GwPriority=0), "IPAMConfig": unused["IPAMConfig"]})

    def networks_of_all_kinds(self) -> dict[str, tuple[str, ...]]:
        """Return their options: gateways shown and not, spellings, hints, families that are off."""
        wires = [*self.docker.wire(), *self.docker.wire()]
        macvlan = [("-d", "macvlan", "-o", "parent=" + wire) for wire in wires]
        lan = ("--subnet", "10.50.0.0/24")
        return {
            "plain": (), "dual": ("--ipv6",), "internal": ("--ipv6", "--internal"), "routed": ("--ipv6", *ROUTED),
            "small": ("--ipv6", "--ipam-opt", "gipam.v4ab=27", "--ipam-opt", "gipam.v6ab=80"),
            "hint": ("--subnet", "0.0.0.0/28"), "hint6": ("--ipv6", "--subnet", "::/72"), "any": ("--subnet", "0.0.0.0/0"),
            "named": ("--ipv6", "--ipam-opt", "gipam.name=named"), "six": ("--subnet", "fd00:7::/64"),
            "explicit": ("--ipv6", "--subnet", "10.2.200.0/22", "--subnet", "2001:db8:0:1ff::/64"),
            "odd": ("--ipv6", "--subnet", "FD00:0008:0::/64", "--gateway", "FD00:8:0::0F", "--aux-address",
                    "b=fd00:8:0:0::00AA"),
            "range": ("--subnet", "10.8.0.0/16", "--ip-range", "10.8.7.0/24", "--gateway", "10.8.0.9", "--aux-address",
                      "a=10.8.7.0", "--aux-address", "b=10.8.0.1", "--aux-address", "DefaultGatewayIPv4=10.8.0.77"),
            "macvlan": (*macvlan[0], "--ipv6", "--subnet", "10.51.0.0/24", "--subnet", "10.52.0.0/24",
                        "--subnet", "fd00:51::/64"),
            "low": (*macvlan[1], *lan, "--ip-range", "10.50.0.0/25"),
            "high": (*macvlan[2], *lan, "--ip-range", "10.50.0.128/25", "--gateway", "10.50.0.9"),
            "whole": (*macvlan[3], *lan, "--ip-range", "10.50.0.0/24"),
        }

    def test_no_difference_with_networks_of_all_kinds(self) -> None:
        """Nor after the lease file was lost, since all can be told from Docker, nor after crashes."""
        networks = self.networks_of_all_kinds()
        for name, options in networks.items():
            self.docker.network(name, *options)
        self.docker.network("template", "--config-only", "--subnet", "10.60.0.0/24", "--ip-range", "10.60.0.128/25")
        self.docker("network", "create", "-d", "bridge", "--config-from", "template", "made")
        self.docker.network("unused", "--config-only", "--subnet", "10.61.0.0/24")
        self.assertEqual(self.docker.held_by_gipam()["10.60.0.0/24"], {"10.60.0.128"})
        self.assertEqual(self.docker.check(), [])
        for name in networks:
            restart = ("--restart", "always") if len(name) % 2 else ()
            self.docker.container("in-" + name, name, *restart)
        self.docker("network", "connect", "dual", "in-plain")
        self.docker("stop", "in-internal")
        self.assert_agreement()
        self.assertEqual([cidr.split("/")[1] for name in ("small", "hint", "hint6")  # as their options say
                          for cidr in endpoint_addresses(self.docker.inspect("container", "in-" + name)[0])],
                         ["27", "80", "28", "24", "72"])
        before = self.docker.held_by_gipam()
        self.docker.replace_lease_file(number=signal.SIGKILL)
        self.assertEqual(self.docker.check(), [])
        self.assertEqual(self.docker.held_by_gipam(), before)
        for number, name in enumerate(("plain", "range", "low", "high")):
            self.docker.container(f"more{number}", name)
        self.docker.network("new", "--ipv6")
        self.assert_agreement()
        for _ in range(2):
            self.docker.kill_and_start()
            self.docker("start", *("in-" + name for name in networks))
            self.assert_agreement()

    def test_containers_killed_and_networks_removed_while_gipam_is_down(self) -> None:
        self.docker.network("web", containers=("one", "two", "three"))
        self.docker.network("gone")
        expected = [self.leaked("one", "web"), self.leaked("two", "web"),
                    self.leaked_pool(self.docker.subnets("gone")[0])]
        self.docker.stop("gipam", number=signal.SIGKILL)
        self.docker.at_once(("kill", "one"), ("rm", "-f", "two"), ("network", "rm", "gone"))  # 15 s for each release
        self.docker.start_gipam()
        self.assert_found_and_fixed(*expected)
        self.docker("start", "one")
        self.assert_no_address_is_twice()

    def test_lease_file_restored_from_an_old_copy(self) -> None:
        self.docker.network("web", "--ipv6", containers=("one",))
        self.docker.network("gone")
        leaked = [self.leaked("one", "web"), self.leaked("one", "web", v6=True),
                  self.leaked_pool(self.docker.subnets("gone")[0])]
        copy = self.docker.read_lease_file()
        self.docker("rm", "-f", "one")
        self.docker("network", "rm", "gone")
        self.docker.container("two", "web")
        self.docker.network("new", containers=("three",))
        self.docker.replace_lease_file(copy)
        # What is missing the start imports; what is held too much only check may release.
        wait_until("the end of the import", self.is_import_done)
        self.assert_found_and_fixed(*leaked)
        self.docker.container("four", "web")
        self.docker.container("five", "new")
        self.docker.network("newer")
        self.assert_found_and_fixed()

    def test_stopped_container_with_a_fixed_address_starts_again(self) -> None:
        """In a /30, which has no other than that and the gateway's, which Docker up to 28 does not show."""
        self.addCleanup(self.docker.stop, "gipam")
        self.docker.network("tiny", "--subnet", "10.8.0.0/30")
        self.docker.container("fixed", "tiny", "--ip", "10.8.0.2")
        for variables in ((), (BLIND,)):
            with self.subTest(variables):
                self.docker("stop", "fixed")
                self.docker.replace_lease_file("", *variables, number=signal.SIGKILL)
                self.docker("start", "fixed")
                self.assertEqual(self.docker.held_by_gipam()["10.8.0.0/30"], {"10.8.0.1", "10.8.0.2"})

    def test_gateway_of_an_empty_network_with_a_size_hint_is_no_containers(self) -> None:
        """Nothing shows its subnet until it has a container."""
        self.docker.network("hint", "--subnet", "0.0.0.0/29")
        self.docker.replace_lease_file(number=signal.SIGKILL)
        for number in range(5):
            self.docker.container(f"hint{number}", "hint")
        self.assert_refused("no available addresses", "run", "-d", "--network", "hint", "bb")
        self.assert_agreement()

    def test_dockerd_killed_between_a_reply_and_storing_it(self) -> None:
        self.docker.stop("dockerd")
        between = BetweenServer(self)
        self.docker.start_dockerd()
        self.docker.network("web", "--ipv6", containers=("one",))
        following = str(ipaddress.ip_address(self.docker.address("one", "web")) + 1)
        for command in (("run", "-d", "--network", "web", "--mac-address", "02:42:00:00:00:09", "bb"),
                        ("network", "create", "--ipam-driver", "gipam", "--subnet", "10.9.0.0/24", "lan")):
            between.fatal = b"RequestAddress"  # of the container, of the gateway
            self.assert_refused("", *command)
            until(lambda: not (self.docker.dockerd and self.docker.dockerd.is_running()), "end of dockerd")
            self.docker.start_dockerd()
        self.docker("start", "one")
        self.assert_found_and_fixed(self.leaked_address(following, "web"), self.leaked_pool("10.9.0.0/24"))
        self.docker.network("lan", "--subnet", "10.9.0.0/24")
        self.assert_found_and_fixed()

    def come_and_go(self, name: str, end: float) -> None:
        for way in itertools.cycle(WAYS):
            if time.monotonic() > end:
                return
            self.docker(*way, name)
            self.docker("start", name)

    def age_leases(self, age_s: int) -> None:
        document = json.loads(self.docker.read_lease_file())
        del document["Checksum"]  # a file that somebody has edited
        for pool in document["Allocated"]:
            for lease in pool["Leases"]:
                lease[3] -= age_s
        self.docker.replace_lease_file(json.dumps(document))

    def test_nothing_false_is_reported(self) -> None:
        """The grace time excuses what has just started, and nothing of what is an hour old by the lease file."""
        self.docker.network("web", "--ipv6")
        self.docker.network("lan", "--subnet", "10.9.0.0/24")
        self.docker.at_once(*(("run", "-d", "--name", f"c{number}", "--network", ("web", "lan")[number % 2], "bb")
                              for number in range(20)))
        self.age_leases(3600)
        end = time.monotonic() + CHURN_S
        threads = [threading.Thread(target=self.come_and_go, args=(f"c{number}", end)) for number in range(20)]
        for thread in threads:
            thread.start()
        found = []
        while any(thread.is_alive() for thread in threads):
            found.append(self.docker.check(grace_s=60))
        self.assertEqual([findings for findings in found if findings], [])
        self.assertGreater(len(found), 1)
        self.assert_found_and_fixed()


class LostFileTest(DockerCase):
    """The lease file is lost while networks and containers live."""

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("web", "--ipv6", "--subnet", "10.9.0.0/16", "--ip-range", "10.9.64.0/18",
                            "--subnet", "fd00:9::/64")
        self.docker.network("old", "--ipv6", "--ipam-opt", "gipam.v4ab=17")
        self.docker.at_once(*(("run", "-d", "--name", f"{network}{number}", "--network", network, "bb")
                              for network in ("web", "old") for number in range(4)))

    def test_what_docker_holds_is_adopted_where_it_cannot_be_asked(self) -> None:
        """By what it releases and asks for, and by the host's routes."""
        self.addCleanup(self.docker.stop, "gipam")
        self.docker.replace_lease_file("", BLIND, number=signal.SIGKILL)
        for number in range(4):
            self.docker.container(f"more{number}", "web")
            self.docker.network(f"new{number}", "--ipv6")
        self.docker("restart", "web0", "web1", "old0", "old1")
        self.docker("stop", "web2", "old2")
        self.docker("start", "web2", "old2")
        self.assert_no_address_is_twice(24)
        found = list(map(ipaddress.ip_network, self.docker.subnets("web", "old", "new0", "new1", "new2", "new3")))
        self.assertEqual(len(found), 12)
        for one, other in itertools.combinations(found, 2):
            self.assertFalse(one.version == other.version and one.overlaps(other), (one, other))
        self.assertIn(ipaddress.ip_address(self.docker.address("web0", "web")), ipaddress.ip_network("10.9.64.0/18"))
        self.assert_reaches("web0", self.docker.address("web3", "web"))
        self.assert_reaches("old0", self.docker.address("old3", "old", v6=True))


class ImportTest(DockerCase):
    """Starts of gipam with no lease file, an old one or a sound one, whatever dockerd does then."""

    NETWORKS = ("web", "lan", "six")

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.docker.start)
        self.addCleanup(self.docker.stop, "gipam", number=signal.SIGKILL)
        self.docker.network("web", "--ipv6")
        self.docker.network("lan", "--subnet", "10.9.0.0/24", "--ip-range", "10.9.0.64/26")
        self.docker.network("six", "--ipv6", "--subnet", "fd00:7::/64")
        # dockerd asks again for what restarts, but for nothing of this one.
        self.docker.network("idle", "--ipv6")
        for name in self.NETWORKS:
            self.docker.container("in-" + name, name, "--restart", "always")

    def lose_file(self) -> None:
        """Kill gipam and remove all that it has written."""
        self.docker.stop("gipam", number=signal.SIGKILL)
        for name in glob.glob(self.docker.leases + "*"):
            os.unlink(name)

    def assert_imported(self) -> None:
        """All is held, and what is new gets none of it."""
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
        self.assertEqual(self.docker.held_by_gipam(), before, "imported before anything is served")
        self.assert_imported()

    def test_file_is_lost_with_docker_down(self) -> None:
        self.docker.stop("dockerd", number=signal.SIGKILL)
        self.lose_file()
        self.docker.start_gipam()
        self.assertEqual(self.docker.held_by_gipam(), {})
        self.docker.start_dockerd()
        self.assert_imported()

    def test_file_is_lost_with_docker_starting(self) -> None:
        """It waits for gipam, so that asking it first would be in vain."""
        self.docker.stop("dockerd", number=signal.SIGKILL)
        self.lose_file()
        self.docker.start_dockerd(wait=False)
        socket_path = self.docker.path("/run/docker.sock")
        wait_until("the socket of dockerd", lambda: os.path.exists(socket_path))
        self.docker.start_gipam()
        self.docker.wait_for_dockerd()
        self.assert_imported()

    def test_gipam_is_killed_in_the_middle_of_the_import(self) -> None:
        """In each of its requests, of which those before are on disk."""
        for count in (1, 2, 3):
            with self.subTest(count=count):
                self.lose_file()
                gipam = self.docker.spawn("python3", "-c", KILLED_IN_IMPORT, str(count),
                                          *self.docker.command()[1:])
                gipam.process.wait(DOCKER_DEADLINE_S)
                self.docker.start_gipam()
                wait_until("the end of the import", self.is_import_done)
                self.assert_agreement(5)
        self.assert_imported()

    def test_backup_of_an_hour_ago_is_restored(self) -> None:
        document = json.loads(self.docker.read_lease_file())
        del document["Checksum"]  # a file that somebody has edited
        for pool in document["Allocated"]:
            for lease in pool["Leases"]:
                lease[3] -= 3600
        self.docker.network("late", "--ipv6", containers=("late",))
        self.docker("network", "connect", "lan", "late")
        self.docker.replace_lease_file(json.dumps(document))
        wait_until("the end of the import", self.is_import_done)
        self.assert_agreement(8)
        self.docker("rm", "-f", "late")
        self.docker("network", "rm", "late")
        self.assert_imported()

    def test_adoption_is_cut_short_by_a_crash_before_its_checkpoint(self) -> None:
        """The pools of what has restarted are held then, and none of the other containers."""
        self.docker.container("other", "lan")
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

    def test_sound_file_stays_as_it_is(self) -> None:
        """And is worth one line."""
        before = self.docker.held_by_gipam()
        file = self.docker.read_lease_file()
        wait_until("the end of the import", self.is_import_done)
        assert self.docker.gipam is not None
        lines = [line for line in self.docker.gipam.read_log().splitlines() if "Docker" in line]
        self.assertEqual(len(lines), 1, lines)
        self.assertIn("compared with Docker: nothing is missing", lines[0])
        self.assertEqual(self.docker.held_by_gipam(), before)
        self.assertEqual(self.docker.read_lease_file(), file)


if __name__ == "__main__":
    sys.exit(main())
