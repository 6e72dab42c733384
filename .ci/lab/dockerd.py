"""Networks and containers on a real dockerd, restarts and crashes, routes: `python3 .ci/lab/dockerd.py`."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Callable

from engine import BASE_V4, BASE_V6, DOCKER, ROUTED, DockerCase
from machines import Router, main, until, works


class NetworkTest(DockerCase):
    """Networks: moby daemon/libnetwork/network.go, ipamAllocate()."""

    def test_subnet_range_gateway_and_auxiliary_addresses_are_honoured(self) -> None:
        self.docker.network(
            "lan", "--ipv6", "--ipam-opt", "unknown.to=gipam",
            "--subnet", "10.9.0.0/16", "--ip-range", "10.9.4.0/30", "--gateway", "10.9.0.9",
            "--aux-address", "inside=10.9.4.1", "--aux-address", "outside=10.9.200.1",
            "--subnet", "fd00:9::/64", "--ip-range", "fd00:9::40/126", "--gateway", "fd00:9::9",
            "--aux-address", "inside6=fd00:9::41", containers=("one", "two", "three"))
        self.assertEqual({cidr.split("/")[0] for cidr in self.docker.running_addresses()}, {
            "10.9.4.0", "10.9.4.2", "10.9.4.3", "fd00:9::40", "fd00:9::42", "fd00:9::43"})
        self.assert_agreement()
        self.assert_refused("no available addresses", "run", "--network", "lan", "bb", "true")
        self.docker.container("static", "lan", "--ip", "10.9.77.77", "--ip6", "fd00:9::77")
        self.assertEqual(self.docker.address("static", "lan"), "10.9.77.77")

    def test_macvlan_networks_with_ranges_of_one_subnet_never_share_an_address(self) -> None:
        near, far = self.docker.wire()
        create = ("network", "create", "--ipam-driver", "gipam", "-d", "macvlan", "--subnet", "10.50.0.0/24")
        near_options = ("--ip-range", "10.50.0.0/29", "-o", "parent=" + near, "--gateway", "10.50.0.200")
        far_options = ("--ip-range", "10.50.0.8/29", "-o", "parent=" + far)
        self.docker(*create, *near_options, "near")
        self.assert_refused("Address already in use", *create, *far_options, "--gateway", "10.50.0.200", "far")
        self.assert_refused("Pool overlaps", *create, "--ip-range", "10.50.0.0/29", "far")
        self.docker(*create, *far_options, "far")
        self.docker.container("one", "near")
        self.docker.container("two", "far")
        self.assert_agreement()
        taken = self.docker.address("one", "near")
        self.assert_reaches("two", taken)
        self.assert_refused("Address already in use", "run", "--network", "far", "--ip", taken, "bb", "true")
        self.docker("rm", "-f", "one")
        self.docker("network", "rm", "near")
        self.assert_agreement()
        self.docker.container("three", "far", "--ip", taken)
        self.assert_agreement()

    def test_what_is_asked_for_at_once_is_different(self) -> None:
        self.docker.at_once(*(("network", "create", "--ipam-driver", "gipam", "--ipv6", f"net{number}")
                              for number in range(10)))
        self.assert_agreement()
        self.assertEqual(len(self.docker.held_by_gipam()), 20)
        self.docker.at_once(*[("run", "-d", "--network", "net0", "bb")] * 20)
        self.assert_agreement(40)


class ContainerTest(DockerCase):
    """Containers: moby daemon/libnetwork/endpoint.go, assignAddress() and releaseAddress()."""

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("web", "--ipv6")
        self.empty = self.docker.held_by_gipam()

    def test_connect_and_disconnect_of_a_running_container(self) -> None:
        self.docker.network("lan", "--ipv6", "--subnet", "10.9.0.0/24", "--subnet", "fd00:9::/64")
        self.docker.container("one", "web")
        before = self.docker.held_by_gipam()
        self.docker("network", "connect", "--ip", "10.9.0.77", "--ip6", "fd00:9::77", "lan", "one")
        self.assertEqual(self.docker.address("one", "lan"), "10.9.0.77")
        self.assertEqual(self.docker.address("one", "lan", v6=True), "fd00:9::77")
        self.assert_agreement()
        self.assert_refused("has active endpoints", "network", "rm", "lan")
        self.docker("network", "disconnect", "lan", "one")
        self.assert_agreement()
        self.assertEqual(self.docker.held_by_gipam(), before)

    def test_container_holds_addresses_while_it_runs(self) -> None:
        self.docker("run", "--name", "ends-by-itself", "--network", "web", "bb", "true")
        self.assert_agreement()
        self.assertEqual(self.docker.held_by_gipam(), self.empty)
        self.docker.container("one", "web")
        for command, addresses in (
                ("stop one", 0), ("start one", 2), ("restart one", 2), ("kill one", 0), ("start one", 2),
                ("pause one", 2), ("unpause one", 2), ("rename one two", 2), ("rm -f two", 0)):
            with self.subTest(command):
                self.docker(*command.split())
                self.assert_agreement(addresses)
        self.assertEqual(self.docker.held_by_gipam(), self.empty)

    def test_start_that_fails_after_the_addresses_were_given_leaves_none(self) -> None:
        self.assert_refused("not found", "run", "--network", "web", "bb", "no-such-command")
        self.docker.container("one", "web", "-p", "127.0.0.1:8000:80")
        self.assert_refused("8000", "run", "--network", "web", "-p", "127.0.0.1:8000:80", "bb")
        self.docker("rm", "-f", "one")
        self.assert_agreement()
        self.assertEqual(self.docker.held_by_gipam(), self.empty)


class RefusalTest(DockerCase):
    """What gipam refuses, and what Docker gives back then."""

    LAN = ("--subnet", "10.9.0.0/24", "--gateway", "10.9.0.1", "--aux-address", "router=10.9.0.5",
           "--ipv6", "--subnet", "fd00:9::/64", "--gateway", "fd00:9::1", "--aux-address", "router6=fd00:9::5")
    USED = "Address already in use"
    NETWORKS = (  # what Docker says, and the options that lead to it
        *(("Pool overlaps with other one on this address space", options) for options in (
            "--subnet 10.9.0.0/24", "--subnet 10.9.0.128/25", "--subnet 10.0.0.0/12", "--subnet 10.9.0.7/32",
            "--ipv6 --subnet fd00:9::/64", "--ipv6 --subnet fd00::/16", "--ipv6 --subnet fd00:9::8000/113")),
        (USED, "--subnet 10.8.0.0/24 --gateway 10.8.0.1 --aux-address router=10.8.0.1"),
        ("gipam.v4ab", "--ipam-opt gipam.v4abc=26"),  # with the options that there are
        # The second subnet is refused, by gipam and by the bridge driver; what its driver does not like:
        ("Pool overlaps", "-d macvlan -o parent={wire} --subnet 10.8.0.0/24 --subnet 10.9.0.0/24"),
        ("", "--subnet 10.8.0.0/24 --subnet 10.7.0.0/24"),
        ("", "--ipv6 -o com.docker.network.bridge.name={bridge}"),
        ("", "--ipv6 -o com.docker.network.driver.mtu=x"),
        ("", "--ipv6 -d macvlan -o parent=no.such.parent"))

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("lan", *self.LAN)
        self.docker.container("one", "lan", "--ip", "10.9.0.7", "--ip6", "fd00:9::7")

    def test_address_of_another_is_refused(self) -> None:
        for address in ("10.9.0.7", "10.9.0.1", "10.9.0.5", "10.9.0.0", "10.9.0.255"):
            with self.subTest(address):
                self.assert_refused(self.USED, "run", "--network", "lan", "--ip", address, "bb", "true")
        self.assert_agreement()

    def test_ipv6_address_of_another_is_refused(self) -> None:
        """Docker then leaks the IPv4 address that it got first, and check finds it.

        moby daemon/libnetwork/network.go: createEndpoint() releases only once both are assigned.
        """
        for number, address in enumerate(("fd00:9::7", "fd00:9::1", "fd00:9::5", "fd00:9::")):
            with self.subTest(address):
                self.assert_refused(self.USED, "run", "--network", "lan", "--ip6", address, "--mac-address",
                                    f"02:42:00:00:00:0{number}", "bb", "true")
        self.assertEqual(self.docker.held_by_gipam()["fd00:9::/64"], {"fd00:9::1", "fd00:9::5", "fd00:9::7"})
        self.assert_found_and_fixed(*(
            f"leaked_address: address {address} of network lan is reserved for 02:42:00:00:00:0{number}, but nothing uses it"
            for number, address in enumerate(("10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.6"))))

    def test_network_that_is_refused_leaves_nothing_and_does_not_hurt_the_first(self) -> None:
        before = self.docker.held_by_gipam()
        names = {"bridge": "br-" + self.docker.inspect("network", "lan")[0]["Id"][:12], "wire": self.docker.wire()[0]}
        for words, options in self.NETWORKS:
            with self.subTest(options):
                self.assert_refused(words, "network", "create", "--ipam-driver", "gipam",
                                    *options.format(**names).split(), "other")
                if "{wire}" in options and DOCKER == 28:
                    # libnetwork/network.go, ipamAllocateVersion(): err is shadowed, so it keeps the first, which is either.
                    self.assertRegex("".join(self.docker.check("--fix")), r"\A(leaked_pool: subnet 10\.8\.\S+ .*)?\Z")
                self.assertEqual(self.docker.held_by_gipam(), before)
        self.docker("restart", "one")
        self.docker.container("two", "lan")
        self.assert_reaches("two", "10.9.0.7")
        self.assert_reaches("two", "fd00:9::7")
        self.assert_agreement(4)


class RestartTest(DockerCase):
    """gipam and dockerd stopped and killed under live containers.

    A dockerd that was killed releases the endpoints that it has stored, then asks anew; with
    live-restore it asks for nothing: moby daemon/libnetwork/sandbox_store.go, sandboxRestore().
    """

    def setUp(self) -> None:
        super().setUp()
        self.docker.network("web", "--ipv6")
        self.docker.container("one", "web", "--restart", "always")
        self.docker.container("two", "web")
        self.addCleanup(self.docker.stop, "dockerd")  # it may have options

    def restart(self, name: str, number: int, *options: str) -> None:
        self.docker.stop(name, number=number)
        getattr(self.docker, f"start_{name}")(*options)

    def start_dockerd_first(self) -> None:
        """It waits for the plugin of its network, for 15 s at most."""
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
        self.docker.start_dockerd("--live-restore")
        self.assert_no_address_is_twice(2)

    def wait_for_restart_policy(self) -> None:
        state = "{{.State.Running}} {{.HostConfig.RestartPolicy.Name}}"
        until(lambda: self.docker("inspect", "-f", state, "one") != "false always", "one runs again")

    def assert_network_works(self) -> None:
        """Agreement, and containers stop, start and reach each other without a double address."""
        self.wait_for_restart_policy()
        self.assert_agreement()
        self.docker("start", "one", "two")
        self.docker("restart", "two")
        self.docker.container("three", "web")
        self.assert_agreement(6)
        self.assert_reaches("three", self.docker.address("two", "web"))
        self.assert_reaches("three", self.docker.address("one", "web", v6=True))
        self.docker("rm", "-f", "three")

    def test_network_lives_on(self) -> None:
        live = "--live-restore"
        rows: tuple[tuple[str, bool, Callable[[], None]], ...] = (  # what happens; do all containers run on?
            ("gipam is stopped", True, lambda: self.restart("gipam", signal.SIGTERM)),
            ("gipam is interrupted", True, lambda: self.restart("gipam", signal.SIGINT)),
            ("gipam is killed", True, lambda: self.restart("gipam", signal.SIGKILL)),
            ("dockerd is killed", False, lambda: self.restart("dockerd", signal.SIGKILL)),
            ("both are killed", False, self.docker.kill_and_start),
            ("dockerd is started before gipam", False, self.start_dockerd_first),
            ("gipam is started long after dockerd", False, self.start_gipam_late),
            ("dockerd is stopped", False, lambda: self.restart("dockerd", signal.SIGTERM, live)),
            ("dockerd is stopped, live restore", True, lambda: self.restart("dockerd", signal.SIGTERM, live)),
            ("dockerd is killed, live restore", True, lambda: self.restart("dockerd", signal.SIGKILL, live)),
            ("a container dies meanwhile", False, self.kill_container_while_dockerd_is_down))
        for what, is_running_on, disturb in rows:
            with self.subTest(what):
                before = self.docker.running_addresses(), self.docker.held_by_gipam()
                disturb()
                if is_running_on:
                    self.assertEqual((self.docker.running_addresses(), self.docker.held_by_gipam()), before)
                self.assert_network_works()

    def begin_starts(self) -> list[subprocess.Popen[str]]:
        """Begin to start eight containers and return when the first addresses were given."""
        subnet = self.docker.subnets("web")[0]
        before = len(self.docker.held_by_gipam()[subnet])
        commands = [self.docker.begin("run", "-d", "--network", "web", "bb") for _ in range(8)]
        until(lambda: len(self.docker.held_by_gipam()[subnet]) > before, "addresses given")
        return commands

    def test_gipam_restarted_while_containers_start_loses_no_request(self) -> None:
        for _ in range(3):
            commands = self.begin_starts()
            self.restart("gipam", signal.SIGTERM)
            for command in commands:
                self.docker.end(command)
        self.assert_agreement(4 + 3 * 8 * 2)


class RestingAddressTest(DockerCase):
    """A stopped container's --ip in a network of 13 addresses, which others use up many times."""

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
            self.assertEqual(len(self.docker.running_addresses()), 12)
            self.assertNotIn(self.FIXED + "/28", self.docker.running_addresses())
            running = self.docker("ps", "-q").split()
            self.docker("rm", "-f", *running)
        self.assert_fixed_starts()


class RoutedTest(DockerCase):
    """Containers are reached without NAT, as seen on dockerd 28.5.2 and 29.1.5.

    Up to Docker 26, IPv6 is open here, without ip6tables; readme.py has it filtered.
    """

    BEYOND, BEYOND_V6, HOST = "198.51.100.2", "[2001:db8:eeee::2]", "192.0.2.7"
    CONNECT = f"""ip link set eth0 up; ip addr add {HOST}/24 dev eth0; ip addr add 2001:db8:ffff::7/64 dev eth0 nodad
        ip route add default via 192.0.2.1; ip route add default via 2001:db8:ffff::1
        ip route replace blackhole {BASE_V4}; ip -6 route replace blackhole {BASE_V6}"""
    ROUTES = f"ip route add {BASE_V4} via {HOST}; ip route add {BASE_V6} via 2001:db8:ffff::7"

    def setUp(self) -> None:
        super().setUp()
        self.router = Router()
        self.addCleanup(self.router.close)
        self.router.plug_in(self.docker.namespaces.pid)
        self.docker.run_lines(self.CONNECT)
        self.router.run_lines(self.ROUTES)
        self.docker.network("web", "--ipv6", *ROUTED)
        self.docker.container("one", "web", *(("-p", "80") if DOCKER >= 27 else ()))
        for port in ("80", "81"):
            self.docker("exec", "-d", "one", "httpd", "-f", "-p", port)

    def source_seen_outside(self, container: str, server: str) -> str:
        return self.docker("exec", container, "wget", "-q", "-O", "-", f"http://{server}/cgi-bin/who")

    def can_fetch(self, address: str, port: int = 80) -> bool:
        script = f"import socket; socket.create_connection(({address!r}, {port}), 1)"
        return works(self.router.run, "python3", "-c", script)

    def test_container_is_reached_from_outside_without_nat(self) -> None:
        """As itself in both directions: from Docker 27 on by its published port; before, a rule lets all in."""
        if DOCKER < 27:
            rule = ("DOCKER-USER", "-i", "eth0", "-d", BASE_V4, "-j", "ACCEPT")
            self.assertFalse(self.can_fetch(self.docker.address("one", "web")))
            self.docker.run("iptables", "-I", *rule)
            self.addCleanup(self.docker.run, "iptables", "-D", *rule)  # it outlives dockerd
        for server, v6 in ((self.BEYOND, False), (self.BEYOND_V6, True)):
            with self.subTest(server):
                own = self.docker.address("one", "web", v6=v6)
                self.assert_reaches("one", server.strip("[]"))
                self.router.run("ping", "-c", "1", own)
                self.assertTrue(self.can_fetch(own))
                self.assertEqual(self.can_fetch(own, 81), DOCKER < 27)
                self.assertEqual(self.source_seen_outside("one", server), own)
        self.assert_agreement()

    def test_docker_masquerades_by_default(self) -> None:
        """The control: what this class shows is not so by itself."""
        self.docker.network("hidden", containers=("two",))
        self.assertFalse(self.can_fetch(self.docker.address("two", "hidden")))
        self.assertEqual(self.source_seen_outside("two", self.BEYOND), self.HOST)


class SwarmTest(DockerCase):
    """A node-local network of a swarm, the kind that a v1 plugin can serve.

    moby daemon/libnetwork/cnmallocator/provider.go refuses it where managers run the IPAM.

    The node has no other network: check must see that it is of the same Docker all the same.
    """

    def test_service_on_a_node_local_network(self) -> None:
        advertised, parent = self.docker.wire()
        self.docker.run("ip", "addr", "add", "192.0.2.1/24", "dev", advertised)
        self.docker("swarm", "init", "--advertise-addr", "192.0.2.1")
        self.addCleanup(self.docker, "swarm", "leave", "--force")
        self.docker.network("here", "--config-only", "--subnet", "10.80.0.0/24", "--ip-range", "10.80.0.64/26",
                            "-o", "parent=" + parent)
        self.docker("network", "create", "-d", "macvlan", "--scope", "swarm", "--attachable",
                    "--config-from", "here", "lan")
        self.docker("service", "create", "-d", "--network", "lan", "--replicas", "2",
                    "--restart-delay", "100ms", "--name", "service", "bb")
        self.wait_for_tasks()
        self.docker.container("other", "lan")
        self.assert_agreement()
        self.docker("rm", "-f", "other")
        self.docker.stop("dockerd")
        self.assertEqual(self.docker.held_by_gipam(), {})
        self.docker.start_dockerd()
        self.wait_for_tasks()
        self.assert_agreement()
        self.docker.stop("dockerd", number=signal.SIGKILL)  # it forgets the network, unreleased
        self.docker.start_dockerd()
        self.assertRegex("\n".join(self.docker.check("--fix")), r"\Aleaked_pool: .*\Z")
        self.wait_for_tasks()
        self.assert_agreement()
        self.docker("service", "rm", "service")
        until(self.are_tasks_removed, "no task is left")

    def are_tasks_removed(self) -> bool:
        tasks = self.docker("ps", "-aq").split()
        return not tasks or works(self.docker, "rm", "-f", *tasks)  # or swarm is about to do it

    def wait_for_tasks(self) -> None:
        until(lambda: len(self.docker("ps", "-q").split()) == 2, "two tasks")


if __name__ == "__main__":
    sys.exit(main())
