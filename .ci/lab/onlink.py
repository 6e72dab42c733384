"""A host whose prefix is on the wire and not routed: -onlink, on both trees: `python3 .ci/lab/onlink.py`."""

from __future__ import annotations

import ipaddress
import re
import signal
import statistics
import sys
import time
import unittest
from typing import Callable

from engine import DockerCase
from machines import (
    FILES,
    MAKE_IMAGE,
    SUITE,
    Machine,
    Router,
    cable,
    main,
    make_tree,
    until,
    works,
)

from test_gipam import Client

V6 = "2001:db8:0:1:c00::/72"  # of the /64 that is on the wire
V4 = "10.2.0.0/16" if SUITE == "trixie" else "203.0.113.64/26"  # Docker 26 takes no part of what is on the wire
PLUG = """
ip link add eth0 type veth peer name eth0 netns outside
ip -n outside addr add 203.0.113.1/24 dev eth0; ip -n outside addr add 2001:db8:0:1::1/64 dev eth0 nodad
ip -n outside link set eth0 up; ip addr add 203.0.113.7/24 dev eth0; ip link set eth0 up
"""
ADDRESS = "ip addr add 2001:db8:0:1::7/64 dev eth0 nodad\n"  # goes when the device goes down
ROUTED = "-o com.docker.network.bridge.gateway_mode_ipv{}=routed"
OPTIONS = ["-o", "com.docker.network.bridge.enable_ip_masquerade=false"] if SUITE == "trixie" else [
    word for version in (4, 6) for word in ROUTED.format(version).split()]


def entries(said: str) -> set[str]:
    """Return the addresses of the proxy entries on a wire that gipam has made."""
    return {line.split()[0] for line in said.splitlines() if "proto 103" in line and "dev lo" not in line}


class OnLinkTest(DockerCase):
    """gipam is started before the device is there."""

    options = ("-unix", "-v6", V6, "-v6ab", "80", "-v4", V4, "-v4ab", "28", "-onlink", "eth0")

    def setUp(self) -> None:
        super().setUp()
        self.docker.run_lines("ip netns add outside" + PLUG + ADDRESS)
        self.addCleanup(self.docker.run_lines, "ip -n outside link del eth0; ip netns del outside")
        for line in self.missing():  # what check says is what an operator does
            self.docker.run(*line.split())
        self.docker.network("web", "--ipv6", *OPTIONS, containers=("two",))
        self.docker.container("one", "web", "--restart", "always")

    def missing(self) -> list[str]:
        """Return the commands of those notes of check that are about being on the wire."""
        notes = re.findall(r"^note: .*-onlink eth0.*", self.docker.run("sh", "-c", '"$@" || true', "sh", *self.docker.command(
            "check", "--grace", "0")), re.MULTILINE)
        return [note[note.index("sysctl"):] for note in notes]

    def entries(self) -> set[str]:
        return entries(self.docker.run("sh", "-ec", "ip -6 neigh show proxy; ip -4 neigh show proxy"))

    def held(self) -> set[str]:
        """Return the addresses of containers that are on the wire."""
        bases = [ipaddress.ip_network(V6), *([] if SUITE == "trixie" else [ipaddress.ip_network(V4)])]
        return {lease["address"] for pool in self.docker.pools() for lease in pool["addresses"]
                if lease["kind"] == "endpoint" and any(ipaddress.ip_address(lease["address"]) in base for base in bases)}

    def pings(self, address: str) -> bool:
        return works(self.docker.run, *["ip", "netns", "exec", "outside", "ping", "-c", "1", "-W", "1"], address)

    def addresses(self, name: str) -> list[str]:
        return [self.docker.address(name, "web", v6=v6) for v6 in (True, False) if v6 or SUITE != "trixie"]

    def wait_for_address(self, name: str) -> None:
        """Docker 26 lets the container look for its address on its network first."""
        until(lambda: "tentative" not in self.docker("exec", name, "ip", "addr"), "the container uses its address")

    def assert_answered(self) -> None:
        """All containers are reached, and the kernel has exactly their entries."""
        until(lambda: self.entries() == self.held(), "the kernel has what gipam holds")
        for address in (address for name in ("one", "two") for address in self.addresses(name)):
            until(lambda: self.pings(address), f"{address} answers")  # noqa: B023

    def test_first_ping_is_answered_and_the_last_one_is_not(self) -> None:
        self.docker.container("three", "web")
        self.wait_for_address("three")
        addresses = self.addresses("three")
        self.assertEqual([self.pings(address) for address in addresses], [True] * len(addresses))
        self.assertLessEqual(set(addresses), self.entries())
        neighbour = ("ip", "-n", "outside", "neigh")  # a router asks now and then whether it is still there
        self.docker.run(*neighbour, "change", addresses[0], "dev", "eth0", "nud", "probe")
        until(lambda: "PROBE" not in self.docker.run(*neighbour, "show", addresses[0]), "the router knows")
        self.assertIn("REACHABLE", self.docker.run(*neighbour, "show", addresses[0]))
        self.docker("rm", "-f", "three")
        self.docker.run("ip", "-n", "outside", "neigh", "flush", "dev", "eth0")
        self.assertEqual([self.pings(address) for address in addresses], [False] * len(addresses))
        self.assert_answered()

    def restart(self, name: str, number: int, *options: str) -> None:
        self.docker.stop(name, number=number)
        getattr(self.docker, f"start_{name}")(*options)
        until(lambda: works(self.docker, "exec", "one", "true"), "one runs again")
        self.docker("start", "two")

    def kill_both(self) -> None:
        self.docker.kill_and_start()
        self.restart("gipam", signal.SIGKILL)

    def rename(self) -> None:
        self.docker.run_lines("ip link set eth0 name wire0")  # entries go with it
        until(lambda: not self.entries(), "it answers on no other device")
        self.docker.run_lines("ip link set wire0 name eth0")

    def unplug(self) -> None:
        self.docker.run_lines("ip link del eth0")
        self.docker("restart", "one")
        self.docker.run_lines(PLUG + ADDRESS)

    def test_entries_are_what_containers_hold(self) -> None:
        """Whatever happens; those of others stay."""
        others = [("dev", "lo", f"{V6[:-3]}77"), ("dev", "lo", "2001:db8:5::1", "protocol", "103")]
        for other in others:
            self.docker.run("ip", "-6", "neigh", "add", "proxy", other[2], *other[:2], *other[3:])
            self.addCleanup(self.docker.run, "ip", "-6", "neigh", "del", "proxy", other[2], *other[:2])
        rows: tuple[tuple[str, Callable[[], None]], ...] = (
            ("nothing happens", lambda: None),
            ("gipam is killed", lambda: self.restart("gipam", signal.SIGKILL)),
            ("gipam is stopped", lambda: self.restart("gipam", signal.SIGTERM)),
            ("dockerd is stopped", lambda: self.restart("dockerd", signal.SIGTERM)),
            ("dockerd is killed", lambda: self.restart("dockerd", signal.SIGKILL)),
            ("both are killed", self.kill_both),
            ("the device goes down and up", lambda: self.docker.run_lines(f"ip link set eth0 down; ip link set eth0 up; {ADDRESS}")),
            ("the device is renamed and back", self.rename),
            ("another comes in its place", self.unplug))
        for what, disturb in rows:
            with self.subTest(what):
                disturb()
                for line in self.missing():  # of a new device
                    self.docker.run(*line.split())
                self.assert_answered()
        said = self.docker.run("ip", "-6", "neigh", "show", "proxy")
        self.assertIn(f"{V6[:-3]}77 dev lo", said)
        self.assertIn("2001:db8:5::1 dev lo", said)

    def test_entry_of_another_stays_though_a_container_has_had_its_address(self) -> None:
        address = "2001:db8:0:1:c88::99"
        self.docker.run("ip", "-6", "neigh", "add", "proxy", address, "dev", "eth0")
        self.docker.network("own", "--ipv6", "--subnet", "2001:db8:0:1:c88::/80", *OPTIONS)
        self.docker.container("three", "own", "--ip6", address)
        until(lambda: self.pings(address), "it answers")
        self.docker("rm", "-f", "three")
        self.assertIn(f"{address} dev eth0", self.docker.run("ip", "-6", "neigh", "show", "proxy"))
        self.assertNotIn(address, self.entries())

    def test_macvlan_answers_for_itself(self) -> None:
        self.docker("network", "create", "--ipam-driver", "gipam", "-d", "macvlan", "-o", "parent=eth0", "--ipv6",
                    "--subnet", "2001:db8:0:1:c77::/80", "--subnet", "10.77.0.0/24", "lan")
        self.docker.container("three", "lan")
        address = self.docker.address("three", "lan", v6=True)
        self.assertIn(address, self.held())
        self.assertNotIn(address, self.entries())
        self.docker.run("ip", "-n", "outside", "addr", "add", "2001:db8:0:1:c77::1/80", "dev", "eth0", "nodad")
        until(lambda: self.pings(address), "it answers")
        self.assertNotIn(address, self.entries())

    def test_check_names_each_setting_and_is_quiet_once_all_is_set(self) -> None:
        self.assertEqual(self.missing(), [])
        self.docker.run_lines("ip link del eth0" + PLUG + ADDRESS + "echo 0 > /proc/sys/net/ipv6/conf/all/proxy_ndp")
        switches = "ipv6.conf.all.proxy_ndp=1 ipv6.neigh.eth0.proxy_delay=0" + " ipv4.neigh.eth0.proxy_delay=0" * (SUITE != "trixie")
        self.assertEqual(set(self.missing()), {f"sysctl -w net.{switch}" for switch in switches.split()})

    def test_start_without_the_right_says_what_it_needs(self) -> None:
        self.docker.stop("gipam")
        done = self.docker.run("sh", "-c", '"$@" 2>&1; echo $?', "sh", "unshare", "--user", "--map-root-user",
                               *self.docker.command())
        self.docker.start_gipam()
        self.assertRegex(done, r"^gipam: -onlink 'eth0' needs CAP_NET_ADMIN: .*gipam.service.d/onlink.conf.*\n78\n$")

    def test_cost_with_a_thousand_addresses(self) -> None:
        """It is printed; what is asserted is that all are there, and go with their pool."""
        client = Client(self.docker.path("/run/docker/plugins/gipam.sock"))
        pool, subnet = client.request_pool(v6=True)
        self.docker.run_lines(f"ip link add br9 type bridge; ip addr add {subnet[:-3]}1/80 dev br9 nodad; ip link set br9 up")
        client.request_address(pool, gateway=True)
        before = len(self.entries())
        spent: list[float] = []
        for _ in range(1100):
            started_s = time.perf_counter()
            client.request_address(pool, mac=f"02:42:{len(spent):08x}")
            spent.append((time.perf_counter() - started_s) * 1e3)
        self.assertEqual(len(self.entries()), before + 1100)
        print(f"address in {statistics.median(spent[:100]):.2f} ms at first, {statistics.median(spent[1000:]):.2f} with a "
              f"thousand, {max(spent):.2f} at most", file=sys.stderr)
        client.release_pool(pool)
        client.close()
        until(lambda: len(self.entries()) == before, "all entries are gone")
        self.docker.run_lines("ip link del br9")


class ServiceTest(unittest.TestCase):
    """A machine on a wire with 2001:db8:ffff::/64: the unit, its drop-in and the sysctls, over power cuts."""

    SETTINGS = """
mkdir -p /etc/systemd/system/gipam.service.d
printf '%s\\n' [Service] CapabilityBoundingSet=CAP_NET_ADMIN PrivateUsers=no > /etc/systemd/system/gipam.service.d/onlink.conf
printf '%s\\n' net.ipv6.conf.all.forwarding=1 net.ipv6.conf.all.proxy_ndp=1 net.ipv6.neigh.eth0.proxy_delay=0 \\
    > /etc/sysctl.d/50-gipam.conf
sysctl --system > /dev/null; systemctl daemon-reload; systemctl reset-failed gipam; systemctl restart gipam
"""

    def test_service_answers_after_power_cuts(self) -> None:
        router = Router()
        self.addCleanup(router.close)
        machine = Machine(make_tree(), router=router)
        self.addCleanup(machine.remove)
        machine.boot(*FILES)
        machine(cable("ip addr add 192.0.2.7/24 dev eth0; ip addr add 2001:db8:ffff::7/64 dev eth0 nodad\n"))
        machine("systemctl start cable")
        machine.follow("Install", 0, directory="/root/gipam")
        machine.follow("A routed prefix", 1)
        machine("printf '%s\\n' GIPAM_V6=2001:db8:ffff:0:c00::/72 GIPAM_V6AB=80 GIPAM_ONLINK=eth0 >> /opt/gipam/.env\n"
                "systemctl restart gipam || true")
        self.assertRegex(machine.log("gipam"), "needs CAP_NET_ADMIN: .*gipam.service.d/onlink.conf")
        self.assertEqual(machine.show("ExecMainStatus"), "78")
        machine(self.SETTINGS + MAKE_IMAGE + f"docker network create --ipam-driver gipam --ipv6 {' '.join(OPTIONS)} web\n"
                "for name in one two; do docker run -d --restart=always --network web --name $name bb; done")
        for what in ("at first", "after a power cut", "after another"):
            with self.subTest(what):
                machine.wait_for_containers()
                for name in ("one", "two"):
                    machine.wait_until(f"! docker exec {name} ip addr | grep -q tentative")
                addresses = set(machine("docker inspect -f '{{.NetworkSettings.Networks.web.GlobalIPv6Address}}' one two").split())
                self.assertEqual(entries(machine("ip -6 neigh show proxy")), addresses)
                for address in addresses:
                    until(lambda: works(router.run, "ping", "-c", "1", "-W", "1", address), address)  # noqa: B023
                self.assertNotIn("onlink", machine("python3 /opt/gipam/gipam.py check --grace 0"))
            machine.end()
            machine.boot()


if __name__ == "__main__":
    sys.exit(main())
