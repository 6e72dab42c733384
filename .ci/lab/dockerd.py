"""Networks, containers, restarts, crashes and routes on a real dockerd.

To run: `python3 .ci/lab/dockerd.py`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any, Callable, NamedTuple

from engine import BASE_V4, BASE_V6, DOCKER, ROUTED, DockerCase
from machines import Router, main, works

from test_gipam import wait_until

CREATE = ("network", "create", "--ipam-driver", "gipam")
LIVE_RESTORE = "--live-restore"
ADDRESS_IN_USE = "Address already in use"


class NetworkTest(DockerCase):
    """Networks: moby daemon/libnetwork/network.go, ipamAllocate()."""

    def test_subnet_range_gateway_and_auxiliary_addresses_are_honoured(self) -> None:
        options = ("--ipam-opt unknown.to=gipam "
                   "--subnet 10.9.0.0/16 --ip-range 10.9.4.0/30 --gateway 10.9.0.9 "
                   "--aux-address inside=10.9.4.1 --aux-address outside=10.9.200.1 "
                   "--ipv6 --subnet fd00:9::/64 --ip-range fd00:9::40/126 "
                   "--gateway fd00:9::9 --aux-address inside6=fd00:9::41")
        self.docker.network("lan", *options.split(), containers=("one", "two", "three"))

        addresses = {cidr.split("/")[0] for cidr in self.docker.running_addresses()}
        self.assertEqual(addresses, {
            "10.9.4.0", "10.9.4.2", "10.9.4.3",
            "fd00:9::40", "fd00:9::42", "fd00:9::43",
        })
        self.assert_agreement()
        self.assert_refused("no available addresses", "run", "--network", "lan", "bb", "true")

        fixed = ("--ip", "10.9.77.77", "--ip6", "fd00:9::77")
        self.docker.container("static", "lan", *fixed)
        self.assertEqual(self.docker.address("static", "lan"), "10.9.77.77")

    def test_macvlan_networks_with_ranges_of_one_subnet_never_share_an_address(self) -> None:
        near, far = self.docker.wire()
        gateway = ("--gateway", "10.50.0.200")
        create = (*CREATE, "-d", "macvlan", "--subnet", "10.50.0.0/24")
        near_range = ("--ip-range", "10.50.0.0/29")
        far_options = ("--ip-range", "10.50.0.8/29", "-o", "parent=" + far)
        self.docker(*create, *near_range, "-o", "parent=" + near, *gateway, "near")
        self.assert_refused(ADDRESS_IN_USE, *create, *far_options, *gateway, "far")
        self.assert_refused("Pool overlaps", *create, *near_range, "far")

        self.docker(*create, *far_options, "far")
        self.docker.container("one", "near")
        self.docker.container("two", "far")
        self.assert_agreement()
        taken = self.docker.address("one", "near")
        self.assert_reaches("two", taken)
        run = ("run", "--network", "far", "--ip", taken, "bb", "true")
        self.assert_refused(ADDRESS_IN_USE, *run)

        self.docker("rm", "-f", "one")
        self.docker("network", "rm", "near")
        self.assert_agreement()
        self.docker.container("three", "far", "--ip", taken)
        self.assert_agreement()

    def test_simultaneous_requests_get_different_subnets_and_addresses(self) -> None:
        networks = [(*CREATE, "--ipv6", f"net{number}") for number in range(10)]
        self.docker.at_once(*networks)
        self.assert_agreement()
        self.assertEqual(len(self.docker.held_by_gipam()), 20)
        containers = [("run", "-d", "--network", "net0", "bb")] * 20
        self.docker.at_once(*containers)
        self.assert_agreement(40)


class ContainerTest(DockerCase):
    """Containers: moby daemon/libnetwork/endpoint.go, assignAddress() and releaseAddress()."""

    # Each command, and how many addresses the container has after it.
    COMMANDS = (
        ("stop one", 0),
        ("start one", 2),
        ("restart one", 2),
        ("kill one", 0),
        ("start one", 2),
        ("pause one", 2),
        ("unpause one", 2),
        ("rename one two", 2),
        ("rm -f two", 0),
    )

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("web", "--ipv6")
        self.held_by_empty_network = self.docker.held_by_gipam()

    def assert_network_is_empty(self) -> None:
        self.assert_agreement()
        self.assertEqual(self.docker.held_by_gipam(), self.held_by_empty_network)

    def test_connect_and_disconnect_of_a_running_container(self) -> None:
        options = "--ipv6 --subnet 10.9.0.0/24 --subnet fd00:9::/64"
        self.docker.network("lan", *options.split())
        self.docker.container("one", "web")
        before = self.docker.held_by_gipam()

        fixed = ("--ip", "10.9.0.77", "--ip6", "fd00:9::77")
        self.docker("network", "connect", *fixed, "lan", "one")
        self.assertEqual(self.docker.address("one", "lan"), "10.9.0.77")
        self.assertEqual(self.docker.address("one", "lan", v6=True), "fd00:9::77")
        self.assert_agreement()
        self.assert_refused("has active endpoints", "network", "rm", "lan")

        self.docker("network", "disconnect", "lan", "one")
        self.assert_agreement()
        self.assertEqual(self.docker.held_by_gipam(), before)

    def test_container_holds_addresses_while_it_runs(self) -> None:
        self.docker("run", "--name", "ends-by-itself", "--network", "web", "bb", "true")
        self.assert_network_is_empty()
        self.docker.container("one", "web")
        for command, addresses in self.COMMANDS:
            with self.subTest(command):
                self.docker(*command.split())
                self.assert_agreement(addresses)
        self.assert_network_is_empty()

    def test_start_that_fails_after_the_addresses_were_given_leaves_none(self) -> None:
        self.assert_refused("not found", "run", "--network", "web", "bb", "no-such-command")
        publish = ("-p", "127.0.0.1:8000:80")
        self.docker.container("one", "web", *publish)
        self.assert_refused("8000", "run", "--network", "web", *publish, "bb")
        self.docker("rm", "-f", "one")
        self.assert_network_is_empty()


class RefusedNetwork(NamedTuple):
    """Options of `docker network create` that must fail, and a part of Docker's error.

    {wire} is the parent of a macvlan network, {bridge} the name of a bridge that exists.
    """

    error: str
    options: str


class RefusalTest(DockerCase):
    """Networks and addresses that gipam refuses, and the releases of Docker that follow."""

    LAN = ("--subnet 10.9.0.0/24 --gateway 10.9.0.1 --aux-address router=10.9.0.5 "
           "--ipv6 --subnet fd00:9::/64 --gateway fd00:9::1 "
           "--aux-address router6=fd00:9::5")
    OVERLAPPING = (
        "--subnet 10.9.0.0/24",
        "--subnet 10.9.0.128/25",
        "--subnet 10.0.0.0/12",
        "--subnet 10.9.0.7/32",
        "--ipv6 --subnet fd00:9::/64",
        "--ipv6 --subnet fd00::/16",
        "--ipv6 --subnet fd00:9::8000/113",
    )
    OTHERS = (
        RefusedNetwork(ADDRESS_IN_USE, "--subnet 10.8.0.0/24 --gateway 10.8.0.1 "
                                       "--aux-address router=10.8.0.1"),
        # The error lists the options that there are.
        RefusedNetwork("gipam.v4ab", "--ipam-opt gipam.v4abc=26"),
        # gipam refuses the second subnet of these, the bridge driver that of the next.
        RefusedNetwork("Pool overlaps", "-d macvlan -o parent={wire} --subnet 10.8.0.0/24 "
                                        "--subnet 10.9.0.0/24"),
        RefusedNetwork("", "--subnet 10.8.0.0/24 --subnet 10.7.0.0/24"),
        # The network driver refuses these after gipam has granted both subnets.
        RefusedNetwork("", "--ipv6 -o com.docker.network.bridge.name={bridge}"),
        RefusedNetwork("", "--ipv6 -o com.docker.network.driver.mtu=x"),
        RefusedNetwork("", "--ipv6 -d macvlan -o parent=no.such.parent"),
    )
    # Docker gets these before it requests the IPv6 address that is refused.
    LEAKED = ("10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.6")

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("lan", *self.LAN.split())
        self.docker.container("one", "lan", "--ip", "10.9.0.7", "--ip6", "fd00:9::7")

    def test_address_of_another_is_refused(self) -> None:
        for address in ("10.9.0.7", "10.9.0.1", "10.9.0.5", "10.9.0.0", "10.9.0.255"):
            with self.subTest(address):
                run = ("run", "--network", "lan", "--ip", address, "bb", "true")
                self.assert_refused(ADDRESS_IN_USE, *run)
        self.assert_agreement()

    def test_ipv6_address_of_another_is_refused(self) -> None:
        """After the refusal, Docker leaks the IPv4 address that it got first; check finds it.

        moby daemon/libnetwork/network.go: createEndpoint() releases only once both are assigned.
        """
        findings = []
        used_or_reserved = ("fd00:9::7", "fd00:9::1", "fd00:9::5", "fd00:9::")
        for number, address in enumerate(used_or_reserved):
            mac = f"02:42:00:00:00:0{number}"
            findings.append(f"leaked_address: address {self.LEAKED[number]} of network lan is "
                            f"reserved for {mac}, but nothing uses it")
            with self.subTest(address):
                options = ("--network", "lan", "--ip6", address, "--mac-address", mac)
                self.assert_refused(ADDRESS_IN_USE, "run", *options, "bb", "true")

        held = self.docker.held_by_gipam()["fd00:9::/64"]
        self.assertEqual(held, {"fd00:9::1", "fd00:9::5", "fd00:9::7"})
        self.assert_found_and_fixed(*findings)

    def test_network_that_is_refused_leaves_nothing_and_does_not_hurt_the_first(self) -> None:
        lan_id = self.docker.inspect("network", "lan")[0]["Id"]
        names = {"bridge": "br-" + lan_id[:12], "wire": self.docker.wire()[0]}
        overlap = "Pool overlaps with other one on this address space"
        overlapping = [RefusedNetwork(overlap, options) for options in self.OVERLAPPING]
        before = self.docker.held_by_gipam()
        for network in (*overlapping, *self.OTHERS):
            with self.subTest(network.options):
                options = network.options.format(**names).split()
                self.assert_refused(network.error, *CREATE, *options, "other")
                if "{wire}" in network.options and DOCKER == 28:
                    self.fix_leaked_pool()
                self.assertEqual(self.docker.held_by_gipam(), before)

        self.docker("restart", "one")
        self.docker.container("two", "lan")
        self.assert_reaches("two", "10.9.0.7")
        self.assert_reaches("two", "fd00:9::7")
        self.assert_agreement(4)

    def fix_leaked_pool(self) -> None:
        """Release the leftover of 28 after a refused second subnet: a pool or nothing.

        moby libnetwork/network.go, ipamAllocateVersion(): err is shadowed, so that Docker keeps
        the first pool. The two subnets are requested in either order.
        """
        findings = "".join(self.docker.check("--fix"))
        self.assertRegex(findings, r"\A(leaked_pool: subnet 10\.8\.\S+ .*)?\Z")


class Disturbance(NamedTuple):
    """An event that disturbs gipam, dockerd or one of their containers."""

    name: str
    keeps_all_running: bool
    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()


class RestartTest(DockerCase):
    """gipam and dockerd are stopped and killed while containers run.

    A dockerd that was killed releases the endpoints that it has stored, then requests them again;
    with live-restore it requests nothing: moby daemon/libnetwork/sandbox_store.go,
    sandboxRestore().
    """

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("web", "--ipv6")
        self.docker.container("one", "web", "--restart", "always")
        self.docker.container("two", "web")
        # A dockerd with --live-restore must not serve the next test.
        self.addCleanup(self.docker.stop, "dockerd")

    def restart_gipam(self, number: int) -> None:
        self.docker.stop("gipam", number=number)
        self.docker.start_gipam()

    def restart_dockerd(self, number: int, *options: str) -> None:
        self.docker.stop("dockerd", number=number)
        self.docker.start_dockerd(*options)

    def start_dockerd_first(self) -> None:
        """Start dockerd without gipam; dockerd waits for its network's plugin, for 15 s at most."""
        self.docker.stop("dockerd", "gipam")
        self.docker.start_dockerd(wait=False)
        self.docker.start_gipam()
        self.docker.wait_for_dockerd()

    def start_gipam_late(self) -> None:
        self.docker("update", "--restart", "no", "one")
        self.docker.stop("dockerd", "gipam")
        self.docker.start_dockerd()
        self.docker.start_gipam()

    def kill_container_while_dockerd_is_down(self) -> None:
        pid = self.docker("inspect", "-f", "{{.State.Pid}}", "two")
        self.docker.stop("dockerd", number=signal.SIGKILL)
        self.docker.run("sh", "-c", "kill -9 " + pid)
        self.docker.start_dockerd(LIVE_RESTORE)
        self.assert_no_address_is_twice(2)

    def is_restarted_by_policy(self) -> bool:
        """Return whether the first container runs, if Docker is to restart it."""
        template = "{{.State.Running}} {{.HostConfig.RestartPolicy.Name}}"
        return self.docker("inspect", "-f", template, "one") != "false always"

    def assert_network_works(self) -> None:
        """Check agreement, and that containers stop, start and reach each other."""
        wait_until("the restart of the first container", self.is_restarted_by_policy)
        self.assert_agreement()
        self.docker("start", "one", "two")
        self.docker("restart", "two")
        self.docker.container("three", "web")
        self.assert_agreement(6)
        self.assert_reaches("three", self.docker.address("two", "web"))
        self.assert_reaches("three", self.docker.address("one", "web", v6=True))
        self.docker("rm", "-f", "three")

    def disturbances(self) -> tuple[Disturbance, ...]:
        """Return the disturbances, in order; each one finds the state that the last one left."""
        gipam = self.restart_gipam
        dockerd = self.restart_dockerd
        stop = signal.SIGTERM
        kill = signal.SIGKILL
        return (
            Disturbance("gipam is stopped", True, gipam, (stop,)),
            Disturbance("gipam is interrupted", True, gipam, (signal.SIGINT,)),
            Disturbance("gipam is killed", True, gipam, (kill,)),
            Disturbance("dockerd is killed", False, dockerd, (kill,)),
            Disturbance("both are killed", False, self.docker.kill_and_start),
            Disturbance("dockerd is started before gipam", False, self.start_dockerd_first),
            Disturbance("gipam is started long after dockerd", False, self.start_gipam_late),
            # The first of these still stops all containers: the option counts from then on.
            Disturbance("dockerd is stopped", False, dockerd, (stop, LIVE_RESTORE)),
            Disturbance("dockerd is stopped, live restore", True, dockerd, (stop, LIVE_RESTORE)),
            Disturbance("dockerd is killed, live restore", True, dockerd, (kill, LIVE_RESTORE)),
            Disturbance("a container dies while dockerd is down", False,
                        self.kill_container_while_dockerd_is_down),
        )

    def test_network_survives_each_disturbance(self) -> None:
        for disturbance in self.disturbances():
            with self.subTest(disturbance.name):
                addresses = self.docker.running_addresses()
                held = self.docker.held_by_gipam()
                disturbance.function(*disturbance.arguments)
                if disturbance.keeps_all_running:
                    self.assertEqual(self.docker.running_addresses(), addresses)
                    self.assertEqual(self.docker.held_by_gipam(), held)
                self.assert_network_works()

    def holds_more_than(self, subnet: str, count: int) -> bool:
        return len(self.docker.held_by_gipam()[subnet]) > count

    def begin_starts(self) -> list[subprocess.Popen[str]]:
        """Begin to start eight containers and return when gipam has granted an address."""
        subnet = self.docker.subnets("web")[0]
        count = len(self.docker.held_by_gipam()[subnet])
        commands = [self.docker.begin("run", "-d", "--network", "web", "bb") for _ in range(8)]
        wait_until("the first address", self.holds_more_than, subnet, count)
        return commands

    def test_gipam_restarted_while_containers_start_loses_no_request(self) -> None:
        for _ in range(3):
            commands = self.begin_starts()
            self.restart_gipam(signal.SIGTERM)
            for command in commands:
                self.docker.end(command)
        self.assert_agreement(4 + 3 * 8 * 2)


class RestingAddressTest(DockerCase):
    """A stopped container keeps its --ip in a network of 13 addresses that others often use up."""

    FIXED = "10.90.0.2"
    SHOW_ADDRESS = ("ip", "-o", "-4", "addr", "show", "eth0")

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("small", "--subnet", "10.90.0.0/28")
        self.docker.container("fixed", "small", "--ip", self.FIXED)
        self.docker("stop", "fixed")

    def come_and_go(self) -> str:
        """Return the address of a container that ends by itself."""
        shown = self.docker("run", "--rm", "--network", "small", "bb", *self.SHOW_ADDRESS)
        # 12: eth0    inet 10.90.0.3/28 brd 10.90.0.15 scope global eth0
        cidr = shown.split()[3]
        return cidr.partition("/")[0]

    def assert_fixed_starts(self) -> None:
        self.docker("start", "fixed")
        self.assertEqual(self.docker.address("fixed", "small"), self.FIXED)
        self.assert_agreement()

    def test_containers_that_come_and_go_do_not_get_it(self) -> None:
        addresses = [self.come_and_go() for _ in range(29)]
        self.assertNotIn(self.FIXED, addresses)
        self.assertEqual(len(set(addresses)), 12, addresses)
        self.assert_fixed_starts()

    def test_containers_that_run_at_once_do_not_get_it(self) -> None:
        run = ("run", "-d", "--network", "small", "bb")
        for _ in range(3):
            self.docker.at_once(*[run] * 12)
            addresses = self.docker.running_addresses()
            self.assertEqual(len(addresses), 12)
            self.assertNotIn(self.FIXED + "/28", addresses)
            running = self.docker("ps", "-q").split()
            self.docker("rm", "-f", *running)
        self.assert_fixed_starts()


class RoutedTest(DockerCase):
    """Containers are reached without NAT, as seen on dockerd 28.5.2 and 29.1.5.

    Up to Docker 26, IPv6 is open here, without ip6tables; readme.py has it filtered.
    """

    BEYOND = "198.51.100.2"
    BEYOND_V6 = "2001:db8:eeee::2"
    HOST = "192.0.2.7"
    CONNECT = f"""
ip link set eth0 up
ip addr add {HOST}/24 dev eth0
ip addr add 2001:db8:ffff::7/64 dev eth0 nodad
ip route add default via 192.0.2.1
ip route add default via 2001:db8:ffff::1
ip route replace blackhole {BASE_V4}
ip -6 route replace blackhole {BASE_V6}
"""
    ROUTES = f"""
ip route add {BASE_V4} via {HOST}
ip route add {BASE_V6} via 2001:db8:ffff::7
"""

    def setUp(self) -> None:
        super().setUp()
        self.router = Router()
        self.addCleanup(self.router.close)
        self.router.plug_in(self.docker.namespaces.pid)
        self.docker.run_lines(self.CONNECT)
        self.router.run_lines(self.ROUTES)
        self.docker.network("web", "--ipv6", *ROUTED)
        published = ("-p", "80") if DOCKER >= 27 else ()
        self.docker.container("one", "web", *published)
        for port in ("80", "81"):
            self.docker("exec", "-d", "one", "httpd", "-f", "-p", port)

    def source_seen_by(self, server: str, container: str) -> str:
        """Return the address from which a container's request reaches a server."""
        url = f"http://{server}/cgi-bin/who"
        return self.docker("exec", container, "wget", "-q", "-O", "-", url)

    def can_connect(self, address: str, port: int = 80) -> bool:
        script = f"import socket; socket.create_connection(({address!r}, {port}), 1)"
        return works(self.router.run, "python3", "-c", script)

    def test_container_is_reached_from_outside_without_nat(self) -> None:
        """From Docker 27 on, the published port is reached; before, a rule lets all traffic in."""
        if DOCKER < 27:
            rule = ("DOCKER-USER", "-i", "eth0", "-d", BASE_V4, "-j", "ACCEPT")
            self.assertFalse(self.can_connect(self.docker.address("one", "web")))
            self.docker.run("iptables", "-I", *rule)
            # The rule would outlive dockerd.
            self.addCleanup(self.docker.run, "iptables", "-D", *rule)

        own = self.docker.address("one", "web")
        own_v6 = self.docker.address("one", "web", v6=True)
        for address, beyond, server in ((own, self.BEYOND, self.BEYOND),
                                        (own_v6, self.BEYOND_V6, f"[{self.BEYOND_V6}]")):
            with self.subTest(address):
                self.assert_reaches("one", beyond)
                self.router.run("ping", "-c", "1", address)
                self.assertTrue(self.can_connect(address))
                self.assertEqual(self.can_connect(address, 81), DOCKER < 27)
                self.assertEqual(self.source_seen_by(server, "one"), address)
        self.assert_agreement()

    def test_docker_masquerades_by_default(self) -> None:
        """Without ROUTED, as a control, no claim of this class is true."""
        self.docker.network("hidden", containers=("two",))
        self.assertFalse(self.can_connect(self.docker.address("two", "hidden")))
        self.assertEqual(self.source_seen_by(self.BEYOND, "two"), self.HOST)


class SwarmTest(DockerCase):
    """A node-local network of a swarm, the kind that a v1 plugin can serve.

    moby daemon/libnetwork/cnmallocator/provider.go refuses it where managers run the IPAM.

    The node has no other network: check must see that it is of the same Docker all the same.
    """

    def begin_swarm(self) -> None:
        """Start a swarm of this node, with a service of two tasks on a node-local network."""
        advertised, parent = self.docker.wire()
        self.docker.run("ip", "addr", "add", "192.0.2.1/24", "dev", advertised)
        self.docker("swarm", "init", "--advertise-addr", "192.0.2.1")
        self.addCleanup(self.docker, "swarm", "leave", "--force")

        subnet = ("--subnet", "10.80.0.0/24", "--ip-range", "10.80.0.64/26")
        self.docker.network("here", "--config-only", *subnet, "-o", "parent=" + parent)
        options = "-d macvlan --scope swarm --attachable --config-from here"
        self.docker("network", "create", *options.split(), "lan")
        options = "-d --network lan --replicas 2 --restart-delay 100ms --name service"
        self.docker("service", "create", *options.split(), "bb")

    def test_service_on_a_node_local_network(self) -> None:
        self.begin_swarm()
        self.wait_for_tasks()
        self.docker.container("other", "lan")
        self.assert_agreement()
        self.docker("rm", "-f", "other")

        self.docker.stop("dockerd")
        self.assertEqual(self.docker.held_by_gipam(), {})
        self.docker.start_dockerd()
        self.wait_for_tasks()
        self.assert_agreement()

        # A dockerd that is killed forgets the network without releasing it.
        self.docker.stop("dockerd", number=signal.SIGKILL)
        self.docker.start_dockerd()
        findings = "\n".join(self.docker.check("--fix"))
        self.assertRegex(findings, r"\Aleaked_pool: .*\Z")
        self.wait_for_tasks()
        self.assert_agreement()
        self.docker("service", "rm", "service")
        wait_until("the end of all tasks", self.remove_tasks)

    def remove_tasks(self) -> bool:
        """Remove the rest of the tasks; return whether none is left, for swarm may do it too."""
        tasks = self.docker("ps", "-aq").split()
        return not tasks or works(self.docker, "rm", "-f", *tasks)

    def are_two_running(self) -> bool:
        return len(self.docker("ps", "-q").split()) == 2

    def wait_for_tasks(self) -> None:
        wait_until("two tasks", self.are_two_running)


if __name__ == "__main__":
    sys.exit(main())
