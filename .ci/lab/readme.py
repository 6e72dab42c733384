"""The commands of README.md, word for word and in order, on machines that boot: `python3 .ci/lab/readme.py`.

Each of its ways gets from a fresh machine to a container that answers outside and reaches out, over a reboot and a
power cut: a routed prefix, from "Try it" back to a host without a trace, and one address and one /64, both on Docker
28; the rules for Docker 26. What the README shows as output has to come. hosts.py has "Several hosts".
"""

from __future__ import annotations

import os
import re
import sys
import unittest

import machines
from machines import FILES, ROUTER, Block, Machine, Router, cable, main, make_tree, read_blocks

from test_gipam import HERE

# The machine lacks the image nginx. Here it listens on port 81 as well, which nobody publishes.
EQUIP = r"""
cd $(mktemp -d); mkdir bin www; cp $(command -v busybox) bin; echo 'hello from nginx' > www/index.html
for name in httpd ping sh wget; do ln -s busybox bin/$name; done
tar c . | docker import -c 'CMD ["sh", "-c", "httpd -h /www -p 81; exec httpd -f -h /www"]' -c 'STOPSIGNAL SIGKILL' - nginx
rm -r "$PWD"
"""
# The other end knows the device by its address, over boots too. udev, which is not here, sets what sysctl.d has for it.
WIRE = """ip link set eth0 address 02:00:00:00:00:07; ip addr add 192.0.2.7/24 dev eth0; ip route add default via 192.0.2.1
for name in conf neigh; do /usr/lib/systemd/systemd-sysctl --prefix=/net/ipv6/$name/eth0; done
echo 0 > /proc/sys/net/ipv6/conf/eth0/proxy_ndp  # as systemd-networkd does
"""
WIRE_V6 = "ip addr add 2001:db8:ffff::7/64 dev eth0 nodad; ip -6 route add default via 2001:db8:ffff::1\n"
FORWARD = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding\n"
ON_WIRE = ROUTER.replace("2001:db8:ffff::1/64", "2001:db8:0:1::1/64")  # one /64, not routed
OUTSIDE = ("198.51.100.2", "2001:db8:eeee::2")  # beyond the router
LIST_FILES = "find /etc /opt /usr /var/lib /root -xdev ! -path '/var/lib/docker/*' ! -path '/var/lib/containerd/*' " \
             "! -name '.*' | sort"
AGE = re.compile(r"(?<= )[0-9]+s(?= )")
WEB1 = "docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}' web1"

# It tries a port that nobody may reach, again and again, and says so when it is open.
PROBE = """if True:
    import socket
    while True:
        for family, address in ((socket.AF_INET, "10.2.0.2"), (socket.AF_INET6, "2001:db8:0:100::2")):
            with socket.socket(family) as client:
                client.settimeout(0.03)
                if client.connect_ex((address, 81)) == 0:
                    print("open:", address, flush=True)"""


def url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"


class ReadmeTest(unittest.TestCase):
    blocks: list[Block] = read_blocks()
    router: Router
    machine: Machine

    def start(self, suite: str, setup: str, wire: str, *advertised: str) -> None:
        """Have a fresh machine with Docker, and a router, which may advertise itself and these prefixes."""
        self.router = Router(setup)
        self.addCleanup(self.router.close)
        if advertised:
            self.router.advertise(*advertised)
        self.machine = Machine(make_tree(suite), router=self.router)
        self.addCleanup(self.machine.remove)
        self.machine.boot(*FILES, end="poweroff")
        self.machine(EQUIP + cable(wire) + "systemctl start cable")

    def boot_again(self, end: str) -> None:
        """Shut down, or let the power fail, as boot() was told; boot, and wait for all containers."""
        self.machine.end()
        self.machine.boot(end=end)
        self.machine.wait_for_containers()

    def follow(self, chapter: str, *which: int) -> str:
        """Run the commands of this chapter, all or those blocks, on the host and outside; return what they say."""
        blocks = [block for block in self.blocks if block.chapter == chapter and block.kind.startswith("sh")]
        self.assertTrue(blocks, chapter)
        return "\n".join(self.outside(block.text) if block.kind == "sh outside" else self.machine(block.script())
                         for block in (blocks[at] for at in which or range(len(blocks))))

    def outside(self, script: str) -> str:
        return self.router.run("bash", "-ec", script)

    def quoted(self, command: str) -> str:
        """Return a command that the README has in its text."""
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            self.assertTrue(f"`{command}`" in " ".join(file.read().split()), command)
        return command

    def assert_reached(self, *addresses: str) -> None:
        """Port 80 of these answers outside, 81 does not; web1 reaches out and is seen there under the same."""
        for address in addresses:
            with self.subTest(address):
                fetch = ("curl", "-sS", "-g", "-m", "2")
                machines.until(lambda: machines.works(self.router.run, *fetch, url(address, 80)), address)  # noqa: B023
                self.assertEqual(self.router.run(*fetch, url(address, 80)), "hello from nginx\n")
                self.machine.wait_until("docker exec web1 wget -q -O - http://127.0.0.1:81/ > /dev/null")
                with self.assertRaisesRegex(machines.CommandError, "timed out|Could not connect"):
                    self.router.run(*fetch, url(address, 81))
        for address, own in zip(OUTSIDE, addresses):
            with self.subTest(address):
                who = f"docker exec web1 wget -q -T 2 -O - {url(address, 80)}cgi-bin/who"
                self.machine.wait_until(f'[ "$({who})" = {own} ]')

    def assert_at_peace(self) -> None:
        """gipam check has nothing to say, not even a note."""
        self.assertEqual(self.machine("gipam check --grace 0"), "no difference")

    # -- a routed prefix, and everything else that the guide has

    def test_routed_prefix_from_a_first_try_to_no_trace(self) -> None:
        self.start("forky", ROUTER, WIRE + WIRE_V6)
        before = self.machine(LIST_FILES)
        self.try_it()
        self.assertEqual(self.machine(LIST_FILES), before)
        self.follow("Install")
        self.assertEqual(self.follow("A routed prefix").count("hello from nginx"), 2)
        for end in ("cut", "poweroff"):  # what ends the next one
            self.assert_reached("10.2.0.2", "2001:db8:0:100::2")
            self.assert_at_peace()
            self.boot_again(end)
        self.assert_reached("10.2.0.2", "2001:db8:0:100::2")
        self.assert_free_blocks_do_not_loop()
        self.machine("ip link add whole up type bridge; ip addr add 10.2.255.1/16 dev whole; systemctl restart gipam\n"
                     "ip route get 10.2.77.7 | grep 'dev whole'; ip link del whole")  # a network may have the whole base
        self.have_one_family_alone()
        self.use_it_every_day()
        self.have_several_drivers()
        self.uninstall(before)

    def try_it(self) -> None:
        """gipam runs in one terminal, the commands in another; Ctrl-C comes where the text says so."""
        machine = self.machine
        start, use, shown = (block.text for block in self.blocks if block.chapter == "Try it")
        gipam = machine.begin("cd /root/gipam; echo $$ > /run/try.pid; exec " + start)
        machine.wait_until("[ -S /run/docker/plugins/gipam.sock ]")
        said = machine("cd /root/gipam\n" + use)
        self.assertTrue(AGE.sub("", said).endswith(AGE.sub("", shown.strip())), said)
        machine(self.quoted("docker rm -f web1; docker network rm web") + "; kill -INT $(cat /run/try.pid)")
        self.assertIn("stopped", gipam.communicate(timeout=30)[0])
        machine("cd /root/gipam; " + self.quoted("rm leases.json*"))

    def assert_free_blocks_do_not_loop(self) -> None:
        """A packet to a free block comes back from nowhere; one that loops would be told to have lived too long."""
        for address in ("10.2.77.7", "2001:db8:0:177::7"):
            said = self.outside(f"ping -c 1 -W 1 {address} || true")
            self.assertNotRegex(said, "(?i)exceeded")

    def have_one_family_alone(self) -> None:
        """The rows of "Which bases?" for who has no IPv4, or no IPv6."""
        for family, options in (("6", "--ipv6 --ipv4=false"), ("4", "")):
            self.machine(f"docker network create --ipam-driver gipam {options} "
                         f"-o com.docker.network.bridge.gateway_mode_ipv{family}=routed alone\n"
                         "docker run -d --name alone --network alone -p 80 nginx")
            address = self.machine(WEB1.replace("web1", "alone"))
            machines.until(lambda: machines.works(self.router.run, "curl", "-sfg", "-m", "2", url(address, 80)), address)  # noqa: B023
            self.machine("docker rm -f alone; docker network rm alone")

    def use_it_every_day(self) -> None:
        machine = self.machine
        address = machine(WEB1)
        machine("docker rm -f web1; docker network rm web")
        self.follow("A routed prefix", 1, 2)
        self.assertEqual(machine(WEB1), address)
        self.assertRegex(self.follow("Upgrade, and back"), r"\d+\.\d+\.\d+")
        machine(self.quoted("install -m 755 /opt/gipam/gipam.py.old /opt/gipam/gipam.py && systemctl restart gipam"))
        machine(self.quoted("tar -C /opt -czf /root/gipam.tar.gz gipam"))
        self.assertIn("no difference", self.follow("Back up and restore"))
        self.follow("Check once a week")
        self.assertIn("no difference", machine.log("gipam-check@gipam"))
        self.follow("Watch it")
        self.assertIn("gipam_base_blocks", self.outside("curl -sS http://192.0.2.7:9091/metrics"))
        self.assertEqual(machine(WEB1), address)

    def have_several_drivers(self) -> None:
        """The weekly check is each driver's own, and so are files and sockets."""
        machine = self.machine
        self.follow("Several drivers")
        self.assertRegex(machine("gipam status -socket /run/docker/plugins/lan.sock"), r"10\.3\.0\.0/24 .* office")
        machine("docker run --rm --network office nginx sh -c :; systemctl restart gipam@lan; docker network rm office\n"
                "systemctl start gipam-check@lan gipam-check@gipam")
        self.assertEqual(machine("stat -c %a /run/gipam /run/gipam@lan /opt/gipam/lan/leases.json"), "700\n700\n600")
        machine("systemctl stop gipam@lan; test ! -e /run/gipam@lan")
        self.assertIn("failed", machine("systemctl start gipam-check@lan", 1))

    def uninstall(self, before: str) -> None:
        machine = self.machine
        machine("docker rm -f $(docker ps -aq); docker network rm $(docker network ls -q --filter type=custom)")
        self.follow("Uninstall")
        left = set(machine(LIST_FILES).splitlines()) - set(before.splitlines())
        self.assertEqual(left, set())
        self.assertEqual(machine("find /run -xdev | grep gipam; systemctl list-units --all | grep gipam", 1), "")
        self.assertEqual(machine("ip route show type blackhole; ip -6 route show type blackhole"), "")
        machine("docker volume ls; systemctl restart docker")
        self.assertEqual(machine.complaints(), [])

    # -- one address and one /64

    def test_one_address_and_one_64_whose_router_advertises_itself(self) -> None:
        self.start("forky", ON_WIRE, WIRE, "2001:db8:0:1::/64")
        self.machine.wait_until("ip -6 route show default | grep -q 'proto ra'")
        self.follow("Install")
        self.assertEqual(self.follow("One IPv4 address and one /64").count("hello from nginx"), 2)
        own = ("192.0.2.7", "2001:db8:0:1:c00::2")
        for end in ("cut", "poweroff"):
            self.assert_reached(*own)
            self.assert_at_peace()
            self.boot_again(end)
        self.assert_reached(*own)
        self.machine(r"echo 0 > /proc/sys/net/ipv6/conf/all/forwarding; echo 1 > /proc/sys/net/ipv6/conf/eth0/accept_ra"
                     "\n" + FORWARD)  # the control: without accept_ra=2 the route goes, and web1 is cut off
        self.machine.wait_until('[ -z "$(ip -6 route show default)" ]')

    # -- Docker 26

    def test_rules_for_docker_26_are_never_away(self) -> None:
        """A port that they do not have is closed at shutdown, at boot, at a reload and after a mistake in them."""
        self.start("trixie", ROUTER, WIRE + WIRE_V6 + FORWARD)  # who forwards first has no filter of Docker's
        machine, own = self.machine, ("10.2.0.2", "2001:db8:0:100::2")
        self.follow("Install")
        self.follow("A routed prefix", 0)
        self.follow("Docker 26 and 27", 0, 1)
        self.follow("A routed prefix", 2, 3)
        self.assert_reached(*own)
        probe = self.router.spawn("env", "python3", "-c", PROBE)

        def assert_closed(when: str) -> None:
            machine.wait_for_containers()
            self.assert_reached(*own)
            self.assertEqual((probe.is_running(), probe.read_log()[:100]), (True, ""), when)

        for end in ("cut", "poweroff"):
            self.boot_again(end)
            assert_closed("after a boot")
            self.assertIn("-P FORWARD ACCEPT", machine("iptables -S FORWARD"))
        self.assertEqual(self.follow("A routed prefix", 4).count("hello from nginx"), 2)
        self.assert_at_peace()
        replace = self.quoted("nft -f /etc/docker/gipam.nft")
        machine(f"for _ in $(seq 50); do {replace}; done; systemctl restart docker; systemctl restart gipam")
        assert_closed("after they were replaced, and restarts")
        machine(f"cp /etc/docker/gipam.nft /root; sed -i s/dport/dprot/ /etc/docker/gipam.nft; {replace}", 1)
        assert_closed("after a mistake")
        machine.end()
        machine.boot(end="poweroff")
        machine.wait_until("systemctl is-failed -q docker")
        machine("mv /root/gipam.nft /etc/docker/gipam.nft; systemctl reset-failed docker; systemctl start docker")
        assert_closed("after a boot with the mistake")
        self.follow("Docker 26 and 27", 2)  # the control: without them the probe finds open ports
        machines.until(lambda: all(f"open: {address}\n" in probe.read_log() for address in own), "an open port")

    def test_every_chapter_is_followed(self) -> None:
        with open(__file__, encoding="utf-8") as file:
            text = file.read()
        chapters = {block.chapter for block in self.blocks if block.kind.startswith("sh") and block.part != "Several hosts"}
        self.assertEqual([chapter for chapter in chapters if f'"{chapter}"' not in text], [])


if __name__ == "__main__":
    sys.exit(main())
