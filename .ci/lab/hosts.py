"""Several hosts that share their prefixes through etcd, by the README's commands.

To run: `python3 .ci/lab/hosts.py`. Three hosts and a router are Debian machines that boot, on one
segment, with Docker, gipam, BIRD and a member of etcd each; the network namespace "outside" is
beyond the router. The tests follow the README's chapter on several hosts word for word, each block
where it says: on each host (sh), on the first, on the router, outside.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import unittest
from typing import Any, Iterable

from engine import DOCKER
from machines import FILES, Block, Machine, cable, main, make_tree, read_blocks, run
from readme import EQUIP

from test_gipam import sleeping_retry, wait_until

HOSTS = {"host1": 7, "host2": 8, "host3": 9}  # name: last part of its addresses
OUTSIDE = ("198.51.100.2", "2001:db8:eeee::2")
SETUP = "A routed prefix" if DOCKER >= 27 else "Docker 26 and 27"
BEFORE = ("Install", SETUP)  # needed by a host first
PART = "Several hosts"  # part of the README
ME = "me=192.0.2.7"  # stands for each host's own address

# A machine whose packages have just been installed. The image's /cgi-bin/who returns the address of
# the client; busybox has an IPv6 REMOTE_ADDR in brackets.
SET_UP = EQUIP.replace("tar c .", r"""mkdir www/cgi-bin
printf '#!/bin/sh\necho; echo $REMOTE_ADDR\n' > www/cgi-bin/who
chmod +x www/cgi-bin/who; cp -r www /; tar c .""") + r"""
systemctl enable bird etcd
""" + cable("""
number=$((6 + ${HOSTNAME#host}))
ip addr add 192.0.2.$number/24 dev eth0; ip addr add 2001:db8:ffff::$number/64 dev eth0 nodad
ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8:ffff::1
""")
CONNECT_ROUTER = """
systemctl stop docker.socket docker; iptables -P FORWARD ACCEPT; ip link del eth0
echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
ip link add eth0 type bridge; ip link set eth0 up; ip addr add 192.168.1.1/24 dev eth0
ip addr add 192.0.2.1/24 dev eth0; ip addr add 2001:db8:ffff::1/64 dev eth0 nodad
ip netns add outside; ip link add eth1 type veth peer name eth0 netns outside; ip link set eth1 up
ip addr add 198.51.100.1/24 dev eth1; ip addr add 2001:db8:eeee::1/64 dev eth1 nodad
ip -n outside link set lo up; ip -n outside link set eth0 up
ip -n outside addr add 198.51.100.2/24 dev eth0
ip -n outside addr add 2001:db8:eeee::2/64 dev eth0 nodad
ip -n outside route add default via 198.51.100.1
ip -n outside route add default via 2001:db8:eeee::1
ip netns exec outside busybox httpd -h /www
"""
CREATE = ("docker network create --ipam-driver gipam --ipv6 "
          "-o com.docker.network.bridge.enable_ip_masquerade=false ")
ADDRESSES = ("docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}} "
             "{{.GlobalIPv6Address}}{{end}}' ")


class Host(Machine):
    """A machine whose cable is plugged into a switch."""

    def __init__(self, name: str, switch: Machine | None, *lower: str) -> None:
        super().__init__(*lower)
        self.name = name
        self.switch = switch
        directory = os.path.join(self.disk, "upper", "etc")
        os.makedirs(directory)
        with open(os.path.join(directory, "hostname"), "w", encoding="ascii") as file:
            print(name, file=file)

    def follow_block(self, block: Block) -> str:
        """Run the commands of a block as they are, with the address of this host in its place."""
        return self(block.script().replace(ME, f"me=192.0.2.{HOSTS.get(self.name)}"))

    def plug_in(self, pid: str) -> None:
        """Give the host that this process starts an eth0 whose other end is in the switch."""
        make = ["nsenter", "-t", pid, "-n", "ip", "link", "add", "eth0"]
        if self.switch is None:
            run(*make, "type", "bridge")
            return

        # The kernel takes its time to remove the devices of a machine that has lost its power.
        self.switch(f"ip link del {self.name} 2> /dev/null || true")
        run(*make, "type", "veth", "peer", "name", self.name, "netns", self.switch.pid)
        self.switch(f"ip link set {self.name} master eth0 up")

    def addresses_of(self, container: str) -> list[str]:
        return self(ADDRESSES + container).split()

    def sees_all(self) -> bool:
        """Return whether this host sees all hosts as up."""
        presence = {}
        for seen in self.status()["hosts"]:
            presence[seen["host"]] = seen["is_present"]
        return presence == dict.fromkeys(HOSTS, True)

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self("gipam status --json")))


class HostsTest(unittest.TestCase):
    """The tests share the site, and each leaves it unchanged."""

    maxDiff = None
    router: Host
    hosts: dict[str, Host]
    networks: list[Block]  # of the README: network web, container web1

    @classmethod
    def setUpClass(cls) -> None:
        tree = make_tree()
        installed = Machine(tree)
        cls.addClassCleanup(installed.remove)
        installed.boot(*FILES, end="poweroff")
        installed(SET_UP)
        installed.end()
        lower = os.path.join(installed.disk, "upper")
        cls.router = cls.boot("router", None, lower, tree)
        cls.router(CONNECT_ROUTER)
        cls.hosts = {name: cls.boot(name, cls.router, lower, tree) for name in HOSTS}
        cls.follow_all()

    @classmethod
    def boot(cls, name: str, switch: Machine | None, *lower: str) -> Host:
        host = Host(name, switch, *lower)
        cls.addClassCleanup(host.remove)
        host.boot()
        return host

    @classmethod
    def follow_all(cls) -> None:
        """Follow the README: no network before etcd is there, and eviction is for a test."""
        install: list[Block] = []
        several: list[Block] = []
        cls.networks = []
        for block in read_blocks():
            if block.chapter in BEFORE and block.kind == "sh":
                is_network = "docker network create" in block.text or "docker run" in block.text
                if is_network:
                    cls.networks.append(block)
                elif "nft delete" not in block.text:
                    install.append(block)
            elif block.part == PART and block.kind.startswith("sh") and "evict" not in block.text:
                several.append(block)

        text = ""
        for block in [*install, *several, *cls.networks]:
            if block.kind == "sh router":  # "the same with another first line"
                block = block._replace(text=block.text + text.partition("\n")[2])
            text = block.text
            for machine in cls.machines_for(block.kind):
                machine.follow_block(block)
            if "ca-key" in block.text:  # "copy this to the others"
                cls.copy("/etc/etcd")

    @classmethod
    def machines_for(cls, kind: str) -> list[Host]:
        """Return the machines where the README says to run a kind of block."""
        if kind == "sh":
            return list(cls.hosts.values())
        if kind == "sh first":
            return [cls.hosts["host1"]]
        return [cls.router]

    @classmethod
    def copy(cls, path: str) -> None:
        first, *others = cls.hosts.values()
        packed = first(f"tar cz -C / .{path} | base64 -w 0")
        for host in others:
            host(f"echo {packed} | base64 -d | tar xz -C /; rm {path}/ca-key.pem")

    # -- helpers

    def assert_refused(self, host: Host, script: str, *words: str) -> None:
        """Check that Docker refuses a command in these words."""
        said = host(script, 1, 125)
        for word in words:
            self.assertIn(word, said)
        self.assertNotIn("CHANGE-ME", said)

    def assert_seen_as(self, own: Iterable[str], machine: Machine, command: str,
                       *addresses: str) -> None:
        """Check that these servers see the command's sender under its own addresses."""
        seen = set()
        for address in addresses:
            server = f"[{address}]" if ":" in address else address
            fetch = f"wget -T 1 -q -O - http://{server}/cgi-bin/who"
            machine.wait_until(f"{command} {fetch} > /run/seen 2> /dev/null")
            seen.add(machine("cat /run/seen").strip("[]").replace("::ffff:", ""))
        self.assertEqual(seen, set(own))

    def assert_all_reach_each_other(self) -> None:
        addresses = {host: host.addresses_of("web1") for host in self.hosts.values()}
        everywhere = [*itertools.chain(*addresses.values()), *OUTSIDE]
        for host, own in addresses.items():
            self.assert_seen_as(own, host, "docker exec web1", *(set(everywhere) - set(own)))
        self.assert_seen_as(OUTSIDE, self.router, "ip netns exec outside busybox", *everywhere[:-2])

    def assert_all_is_well(self) -> None:
        """Check that each host sees all hosts, agrees with Docker and etcd, and is idle."""
        for host in self.hosts.values():
            for _ in sleeping_retry("quiet"):
                etcd = host.status()["etcd"]
                if not (etcd["failure"] or etcd["due"]):
                    break
            self.assertIn("no difference", host("gipam check --grace 0"))
            # A host sees the others at its next look at etcd.
            wait_until("all to be seen", host.sees_all, deadline_s=40)
        self.assert_all_reach_each_other()

    # -- one prefix for all

    def test_all_reach_each_other_under_their_own_addresses(self) -> None:
        self.assert_all_is_well()

    def test_removed_network_takes_its_route_away(self) -> None:
        host = self.hosts["host2"]
        # Without a container, the bridge has no carrier and so no IPv6 route.
        host(CREATE + "away; docker run -d --name away1 --network away nginx")
        v4, v6 = host.subnets()["away"]
        routes = f"ip route show {v4}; ip -6 route show {v6}"
        self.router.wait_until(f"[ $({{ {routes}; }} | grep -c 'via .* proto bird') = 2 ]")
        host("docker rm -f away1; docker network rm away")
        self.router.wait_until(f'[ -z "$({routes})" ]')

    def test_subnet_of_another_host_is_refused_with_its_name(self) -> None:
        first, second, _ = self.hosts.values()
        first(CREATE + "--subnet 10.2.77.0/24 --subnet 2001:db8:0:177::/64 own")
        for subnet in ("10.2.77.0/24", "10.2.76.0/22", "10.2.77.128/25", "2001:db8:0:177::/64"):
            with self.subTest(subnet):
                create = f"{CREATE} --subnet {subnet} own"
                self.assert_refused(second, create, "Pool overlaps", "host1")
        first("docker network rm own")
        second.wait_until(CREATE + "--subnet 10.2.77.0/24 own > /dev/null 2>&1")
        second("docker network rm own")

    def test_hosts_and_claims_are_shown(self) -> None:
        claims = {}
        for name, host in self.hosts.items():
            for subnet in host.subnets()["web"]:
                claims[subnet] = [name]
        claims["192.168.1.0/24"] = list(HOSTS)
        for host in self.hosts.values():
            shown = {claim["subnet"]: claim["hosts"] for claim in host.status()["claims"]}
            self.assertEqual(shown, claims)
            said = host("gipam status")
            for name in HOSTS:
                self.assertIn(name, said)
            shown_and_logged = host("gipam config; gipam status --json; journalctl -t gipam")
            self.assertNotIn("CHANGE-ME", shown_and_logged)

    # -- one subnet on several hosts

    def test_shared_subnet_has_each_address_once(self) -> None:
        addresses = {}
        for host in self.hosts.values():
            host("docker run -d --name lan1 --network lan nginx")
            addresses[host] = host.addresses_of("lan1")[0]
        self.assertEqual(len(set(addresses.values())), len(HOSTS))
        for host, own in addresses.items():
            others = [address for address in addresses.values() if address != own]
            self.assert_seen_as([own], host, "docker exec lan1", *others, OUTSIDE[0])
        outside = "ip netns exec outside busybox"
        self.assert_seen_as(OUTSIDE[:1], self.router, outside, *addresses.values())
        for host in self.hosts.values():
            host("docker rm -f lan1")

    def test_address_of_another_host_is_refused_with_its_name(self) -> None:
        first, second, third = self.hosts.values()
        run = "docker run -d --name fixed --network lan --ip {} nginx"
        third(run.format("192.168.1.200"))
        self.assert_refused(second, run.format("192.168.1.200"), "192.168.1.200", "host3")
        second("docker rm fixed")
        self.assert_refused(second, run.format("192.168.1.1"), "192.168.1.1")
        third("docker rm -f fixed")
        start_again = f"docker rm -f fixed; {run.format('192.168.1.200')}"
        second.wait_until(f"{{ {start_again}; }} > /dev/null 2>&1")
        second("docker rm -f fixed")

    # -- etcd or a host is away

    def test_containers_start_and_stop_while_etcd_is_away(self) -> None:
        first, second, _ = self.hosts.values()
        for away, back in (("systemctl kill -s STOP etcd", "systemctl kill -s CONT etcd"),
                           ("systemctl kill -s KILL etcd; systemctl stop etcd",
                            "systemctl --no-block start etcd")):
            with self.subTest(away):
                before = {host: host.subnets() for host in self.hosts.values()}
                first("docker run -d --name lan1 --network lan nginx")
                for host in before:
                    self.addCleanup(host, back)
                    host(away)
                second("systemctl restart gipam")
                for host in before:
                    host("docker restart web1")
                first.wait_until("gipam status | grep -q unknown")
                first("docker restart lan1")  # its address is still claimed for this host
                self.assert_refused(first, CREATE + "later", "etcd does not answer", *(
                    f"https://192.0.2.{number}:2379" for number in HOSTS.values()))
                fixed = "docker run --rm --network lan --ip 192.168.1.150 nginx"
                self.assert_refused(first, fixed, "etcd does not answer")
                first("docker rm -f web1; docker network rm web")
                for host in before:
                    host(back)
                first.wait_until(CREATE + "later > /dev/null 2>&1")
                first("docker network rm later")
                for block in self.networks:  # each name has its block again
                    first.follow_block(block)
                first("docker rm -f lan1")
                self.assertEqual({host: host.subnets() for host in before}, before)
                self.assert_all_is_well()

    def test_host_that_is_switched_off_keeps_its_subnets(self) -> None:
        first, _, third = self.hosts.values()
        before = third.subnets()
        third.end()
        take = f"{CREATE} --subnet {before['web'][0]} taken"
        self.assert_refused(first, take, "Pool overlaps", "host3")
        first(CREATE + "other; docker network rm other")  # two members of etcd are enough
        third.boot()
        third.wait_for_containers()
        self.assertEqual(third.subnets(), before)
        self.assert_all_is_well()

    def test_host_that_is_gone_is_evicted_and_found_out_when_it_comes_back(self) -> None:
        first, _, third = self.hosts.values()
        evict, = (block for block in read_blocks() if block.part == PART and "evict" in block.text)
        self.assertIn("host3 is alive", first(evict.text, 2))
        v4, v6 = third.subnets()["web"]
        self.addCleanup(self.router, "ip link set host3 up")
        self.router("ip link set host3 down")  # the cable is cut
        take = f"{CREATE} --subnet {v4} --subnet {v6} taken"
        self.assert_refused(first, take, "Pool overlaps", "host3")
        check = "{ gipam check --grace 0 || true; }"
        first.wait_until(f"{check} | grep -q 'note: host3 has not been seen for'")
        first(evict.text)
        first(take)
        self.router("ip link set host3 up")
        third.wait_until(f"{check} | grep -q 'claimed_elsewhere: .* host1'")
        self.assert_refused(third, "docker restart web1", "host1")
        first("docker network rm taken")
        third.wait_until("docker start web1")

        # To host3 it looked as if etcd had lost data, so a grace period follows on all hosts.
        first.wait_until(f"{{ {CREATE}after && docker network rm after; }} > /dev/null 2>&1")
        self.assert_all_is_well()


if __name__ == "__main__":
    sys.exit(main())
