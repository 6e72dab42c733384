"""A host whose prefix is on-link and not routed, with -onlink: `python3 .ci/lab/onlink.py`."""

from __future__ import annotations

import ipaddress
import re
import signal
import statistics
import sys
import time
import unittest

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
    works,
)

from test_gipam import Client, wait_until

IS_DOCKER_26 = SUITE == "trixie"
V6 = "2001:db8:0:1:c00::/72"  # of the on-link /64
V4 = "203.0.113.64/26"
OPTIONS = [
    "-o", "com.docker.network.bridge.gateway_mode_ipv4=routed",
    "-o", "com.docker.network.bridge.gateway_mode_ipv6=routed",
]
if IS_DOCKER_26:
    # Docker 26 rejects a block of an on-link route, and has no mode without NAT.
    V4 = "10.2.0.0/16"
    OPTIONS = ["-o", "com.docker.network.bridge.enable_ip_masquerade=false"]
PLUG = """
ip link add eth0 type veth peer name eth0 netns outside
ip -n outside addr add 203.0.113.1/24 dev eth0
ip -n outside addr add 2001:db8:0:1::1/64 dev eth0 nodad
ip -n outside link set eth0 up; ip addr add 203.0.113.7/24 dev eth0; ip link set eth0 up
"""
ADDRESS = "ip addr add 2001:db8:0:1::7/64 dev eth0 nodad\n"  # lost when the device goes down
PING = ("ping", "-c", "1", "-W", "1")


def entries_of(text: str) -> set[str]:
    """Return the addresses of gipam's proxy entries in the output of `ip neigh`."""
    addresses = set()
    for line in text.splitlines():
        if "proto 103" in line and "dev lo" not in line:
            addresses.add(line.split()[0])
    return addresses


class OnLinkTest(DockerCase):
    """gipam is started before the device exists."""

    options = ("-unix", "-v6", V6, "-v6ab", "80", "-v4", V4, "-v4ab", "28", "-onlink", "eth0")

    def setUp(self) -> None:
        super().setUp()
        self.docker.run_lines("ip netns add outside" + PLUG + ADDRESS)
        self.addCleanup(self.docker.run_lines, "ip -n outside link del eth0; ip netns del outside")
        self.set_what_is_missing()
        self.docker.network("web", "--ipv6", *OPTIONS, containers=("two",))
        self.docker.container("one", "web", "--restart", "always")

    def set_what_is_missing(self) -> None:
        """Run the commands in the notes of check, as an operator does."""
        for line in self.missing():
            self.docker.run(*line.split())

    def missing(self) -> list[str]:
        """Return the commands of those notes of check that are about -onlink."""
        command = self.docker.command("check", "--grace", "0")
        text = self.docker.run("sh", "-c", '"$@" || true', "sh", *command)
        notes = re.findall("^note: .*-onlink eth0.*", text, re.MULTILINE)
        return [note[note.index("sysctl"):] for note in notes]

    def entries(self) -> set[str]:
        text = self.docker.run("sh", "-ec", "ip -6 neigh show proxy; ip -4 neigh show proxy")
        return entries_of(text)

    def held(self) -> set[str]:
        """Return the addresses of containers in on-link bases."""
        bases = [ipaddress.ip_network(V6)]
        if not IS_DOCKER_26:
            bases.append(ipaddress.ip_network(V4))
        addresses = set()
        for pool in self.docker.pools():
            for lease in pool["addresses"]:
                address = ipaddress.ip_address(lease["address"])
                if lease["kind"] == "endpoint" and any(address in base for base in bases):
                    addresses.add(lease["address"])
        return addresses

    def outside(self, *command: str) -> str:
        """Run a command on the router."""
        return self.docker.run("ip", "netns", "exec", "outside", *command)

    def pings(self, address: str) -> bool:
        return works(self.outside, *PING, address)

    def addresses(self, name: str) -> list[str]:
        """Return the on-link addresses of a container."""
        addresses = [self.docker.address(name, "web", v6=True)]
        if not IS_DOCKER_26:
            addresses.append(self.docker.address(name, "web"))
        return addresses

    def uses_address(self, name: str) -> bool:
        """Return whether the container has found that nobody else has its address."""
        return "tentative" not in self.docker("exec", name, "ip", "addr")

    def entries_are_right(self) -> bool:
        return self.entries() == self.held()

    def assert_answered(self) -> None:
        """Check that all containers are reached, and that the kernel has exactly their entries."""
        wait_until("the kernel has entries for the leases of gipam", self.entries_are_right)
        for name in ("one", "two"):
            for address in self.addresses(name):
                wait_until(f"{address} answers", self.pings, address)

    def router_state(self, address: str) -> str:
        """Return the router's view of a neighbour."""
        return self.outside("ip", "neigh", "show", address, "dev", "eth0")

    def is_probed(self, address: str) -> bool:
        return "PROBE" not in self.router_state(address)

    def test_first_ping_is_answered_and_the_last_one_is_not(self) -> None:
        self.docker.container("three", "web")
        wait_until("the container uses its address", self.uses_address, "three")
        addresses = self.addresses("three")
        for address in addresses:
            self.assertTrue(self.pings(address), address)
        self.assertLessEqual(set(addresses), self.entries())
        self.docker("rm", "-f", "three")
        self.outside("ip", "neigh", "flush", "dev", "eth0")
        for address in addresses:
            self.assertFalse(self.pings(address), address)
        self.assert_answered()

    def test_router_that_probes_a_neighbour_gets_an_answer(self) -> None:
        address = self.addresses("one")[0]
        wait_until(f"{address} answers", self.pings, address)
        self.outside("ip", "neigh", "change", address, "dev", "eth0", "nud", "probe")
        wait_until("the router has probed", self.is_probed, address)
        self.assertIn("REACHABLE", self.router_state(address))

    def restart(self, name: str, number: int) -> None:
        """End gipam or dockerd with a signal, and start it again."""
        self.docker.stop(name, number=number)
        self.start_both()

    def start_both(self) -> None:
        self.docker.start()
        wait_until("one runs again", works, self.docker, "exec", "one", "true")
        self.docker("start", "two")

    def rename_device(self) -> None:
        self.docker.run_lines("ip link set eth0 name wire0")
        wait_until("it answers on no other device", self.has_no_entries)
        self.docker.run_lines("ip link set wire0 name eth0")

    def has_no_entries(self) -> bool:
        return not self.entries()

    def replace_device(self) -> None:
        self.docker.run_lines("ip link del eth0")
        self.docker("restart", "one")
        self.docker.run_lines(PLUG + ADDRESS)

    def disturb(self, event: str) -> None:
        """Let one of the events happen."""
        if event == "gipam is killed":
            self.restart("gipam", signal.SIGKILL)
        elif event == "gipam is stopped":
            self.restart("gipam", signal.SIGTERM)
        elif event == "dockerd is killed":
            self.restart("dockerd", signal.SIGKILL)
        elif event == "dockerd is stopped":
            self.restart("dockerd", signal.SIGTERM)
        elif event == "both are killed":
            self.docker.kill_and_start()
            self.start_both()
        elif event == "the device goes down and up":
            self.docker.run_lines(f"ip link set eth0 down; ip link set eth0 up; {ADDRESS}")
        elif event == "the device is renamed and back":
            self.rename_device()
        elif event == "another device comes in its place":
            self.replace_device()

    EVENTS = (
        "nothing happens", "gipam is killed", "gipam is stopped", "dockerd is stopped",
        "dockerd is killed", "both are killed", "the device goes down and up",
        "the device is renamed and back", "another device comes in its place")

    def add_entry_of_another(self, address: str, *options: str) -> None:
        """Add a proxy entry on lo, which goes with the test."""
        entry = ("proxy", address, "dev", "lo")
        self.docker.run("ip", "-6", "neigh", "add", *entry, *options)
        self.addCleanup(self.docker.run, "ip", "-6", "neigh", "del", *entry)

    def test_entries_are_what_containers_hold(self) -> None:
        """Entries follow the containers at every event; those of other programs stay."""
        in_base = f"{V6[:-3]}77"
        self.add_entry_of_another(in_base)
        self.add_entry_of_another("2001:db8:5::1", "protocol", "103")
        for event in self.EVENTS:
            with self.subTest(event):
                self.disturb(event)
                self.set_what_is_missing()
                self.assert_answered()
        text = self.docker.run("ip", "-6", "neigh", "show", "proxy")
        self.assertIn(f"{in_base} dev lo", text)
        self.assertIn("2001:db8:5::1 dev lo", text)

    def test_entry_of_another_stays_though_a_container_has_had_its_address(self) -> None:
        address = "2001:db8:0:1:c88::99"
        self.docker.run("ip", "-6", "neigh", "add", "proxy", address, "dev", "eth0")
        self.docker.network("own", "--ipv6", "--subnet", "2001:db8:0:1:c88::/80", *OPTIONS)
        self.docker.container("three", "own", "--ip6", address)
        wait_until("it answers", self.pings, address)
        self.docker("rm", "-f", "three")
        text = self.docker.run("ip", "-6", "neigh", "show", "proxy")
        self.assertIn(f"{address} dev eth0", text)
        self.assertNotIn(address, self.entries())

    def test_macvlan_answers_for_itself(self) -> None:
        self.docker.network("lan", "-d", "macvlan", "-o", "parent=eth0", "--ipv6",
                            "--subnet", "2001:db8:0:1:c77::/80", "--subnet", "10.77.0.0/24")
        self.docker.container("three", "lan")
        address = self.docker.address("three", "lan", v6=True)
        self.assertIn(address, self.held())
        self.assertNotIn(address, self.entries())
        self.outside("ip", "addr", "add", "2001:db8:0:1:c77::1/80", "dev", "eth0", "nodad")
        wait_until("it answers", self.pings, address)
        self.assertNotIn(address, self.entries())

    def test_check_names_each_setting_and_is_quiet_once_all_is_set(self) -> None:
        self.assertEqual(self.missing(), [])
        self.docker.run_lines("ip link del eth0" + PLUG + ADDRESS
                              + "echo 0 > /proc/sys/net/ipv6/conf/all/proxy_ndp")
        commands = {"sysctl -w net.ipv6.conf.all.proxy_ndp=1",
                    "sysctl -w net.ipv6.neigh.eth0.proxy_delay=0"}
        if not IS_DOCKER_26:
            commands.add("sysctl -w net.ipv4.neigh.eth0.proxy_delay=0")
        self.assertEqual(set(self.missing()), commands)

    def test_start_without_the_capability_says_what_it_needs(self) -> None:
        self.docker.stop("gipam")
        text = self.docker.run("sh", "-c", '"$@" 2>&1; echo $?', "sh", "unshare", "--user",
                               "--map-root-user", *self.docker.command())
        self.docker.start_gipam()
        self.assertRegex(text, r"-onlink 'eth0' needs CAP_NET_ADMIN: "
                               r".*gipam.service.d/onlink.conf.*\n78\n$")

    def has_entries(self, count: int) -> bool:
        return len(self.entries()) == count

    def test_cost_with_a_thousand_addresses(self) -> None:
        """The cost is only printed. All entries must exist, and be deleted with their pool."""
        client = Client(self.docker.path("/run/docker/plugins/gipam.sock"))
        self.addCleanup(client.close)
        pool, subnet = client.request_pool(v6=True)
        self.docker.run_lines(f"ip link add br9 type bridge; ip link set br9 up; "
                              f"ip addr add {subnet[:-3]}1/80 dev br9 nodad")
        self.addCleanup(self.docker.run_lines, "ip link del br9")
        client.request_address(pool, gateway=True)
        before = len(self.entries())
        spent_ms: list[float] = []
        for number in range(1100):
            started_s = time.perf_counter()
            client.request_address(pool, mac=f"02:42:{number:08x}")
            spent_ms.append((time.perf_counter() - started_s) * 1000)
        self.assertEqual(len(self.entries()), before + 1100)
        first_ms = statistics.median(spent_ms[:100])
        last_ms = statistics.median(spent_ms[1000:])
        print(f"address in {first_ms:.2f} ms at first, {last_ms:.2f} with a thousand, "
              f"{max(spent_ms):.2f} at most", file=sys.stderr)
        client.release_pool(pool)
        wait_until("all entries are gone", self.has_entries, before)


DROP_IN = r"""
mkdir -p /etc/systemd/system/gipam.service.d
printf '%s\n' [Service] CapabilityBoundingSet=CAP_NET_ADMIN PrivateUsers=no \
    > /etc/systemd/system/gipam.service.d/onlink.conf
printf '%s\n' net.ipv6.conf.all.forwarding=1 net.ipv6.conf.all.proxy_ndp=1 \
    net.ipv6.neigh.eth0.proxy_delay=0 > /etc/sysctl.d/50-gipam.conf
sysctl --system > /dev/null; systemctl daemon-reload
systemctl reset-failed gipam; systemctl restart gipam
"""
CONFIGURE = r"""
printf '%s\n' GIPAM_V6=2001:db8:ffff:0:c00::/72 GIPAM_V6AB=80 GIPAM_ONLINK=eth0 >> /opt/gipam/.env
systemctl restart gipam || true
"""
START_CONTAINERS = f"""
docker network create --ipam-driver gipam --ipv6 {' '.join(OPTIONS)} web
for name in one two; do docker run -d --restart=always --network web --name $name bb; done
"""
ADD_ADDRESSES = """
ip addr add 192.0.2.7/24 dev eth0; ip addr add 2001:db8:ffff::7/64 dev eth0 nodad
"""
SHOW_ADDRESSES = """
docker inspect -f '{{.NetworkSettings.Networks.web.GlobalIPv6Address}}' one two
"""


class ServiceTest(unittest.TestCase):
    """A machine on a link with 2001:db8:ffff::/64: the unit, its drop-in and the sysctls."""

    def test_service_answers_after_power_cuts(self) -> None:
        router = Router()
        self.addCleanup(router.close)
        machine = Machine(make_tree(), router=router)
        self.addCleanup(machine.remove)
        machine.boot(*FILES)
        machine(cable(ADD_ADDRESSES))
        machine("systemctl start cable")
        machine.follow("Install", 0, directory="/root/gipam")
        machine.follow("A routed prefix", 1)

        machine(CONFIGURE)
        self.assertRegex(machine.log("gipam"), "needs CAP_NET_ADMIN: .*gipam.service.d/onlink.conf")
        self.assertEqual(machine.show("ExecMainStatus"), "78")
        machine(DROP_IN + MAKE_IMAGE + START_CONTAINERS)
        for event in ("at first", "after a power cut", "after another"):
            with self.subTest(event):
                self.assert_answered(machine, router)
            machine.end()
            machine.boot()

    def assert_answered(self, machine: Machine, router: Router) -> None:
        """Check that the router reaches both containers, and that check has no note on -onlink."""
        machine.wait_for_containers()
        for name in ("one", "two"):
            machine.wait_until(f"! docker exec {name} ip addr | grep -q tentative")
        addresses = set(machine(SHOW_ADDRESSES).split())
        self.assertEqual(entries_of(machine("ip -6 neigh show proxy")), addresses)
        for address in addresses:
            wait_until(f"{address} answers", works, router.run, *PING, address)
        self.assertNotIn("onlink", machine("python3 /opt/gipam/gipam.py check --grace 0"))


if __name__ == "__main__":
    sys.exit(main())
