"""The commands of README.md, word for word and in order, on machines that boot.

To run: `python3 .ci/lab/readme.py`. Each setup gets from a fresh machine to a container that
answers outside and reaches out, over a reboot and a power cut: a routed prefix, from "Try it" back
to a host without a trace; one address and one /64, and the same with a /128; a prefix that changes;
and the rules for Docker 26. All but the last are on Docker 28. What the README shows as output has
to come. hosts.py has "Several hosts".
"""

from __future__ import annotations

import os
import re
import sys
import unittest

import machines
from machines import FILES, ROUTER, Block, Machine, Router, cable, main, make_tree, read_blocks

from test_gipam import HERE, wait_until

# The machine lacks the image nginx. Here it listens on port 81 as well, which nobody publishes.
EQUIP = r"""
cd $(mktemp -d); mkdir bin www
cp $(command -v busybox) bin; echo 'hello from nginx' > www/index.html
for name in httpd ping sh wget; do ln -s busybox bin/$name; done
tar c . | docker import -c 'CMD ["sh", "-c", "httpd -h /www -p 81; exec httpd -f -h /www"]' \
  -c 'STOPSIGNAL SIGKILL' - nginx
rm -r "$PWD"
"""
# The other end knows the device by its address, over boots too. The machine has no udev, which
# would set the values of sysctl.d for the device.
WIRE = """ip link set eth0 address 02:00:00:00:00:07
ip addr add 192.0.2.7/24 dev eth0; ip route add default via 192.0.2.1
for name in conf neigh; do /usr/lib/systemd/systemd-sysctl --prefix=/net/ipv6/$name/eth0; done
echo 0 > /proc/sys/net/ipv6/conf/eth0/proxy_ndp  # as systemd-networkd does
"""
WIRE_V6 = """ip addr add 2001:db8:ffff::7/64 dev eth0 nodad
ip -6 route add default via 2001:db8:ffff::1
"""
WIRE_128 = """ip addr add 2001:db8:0:1::7/128 dev eth0 nodad
ip -6 route add default via 2001:db8:0:1::1 dev eth0 onlink
"""
FORWARD = """echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
"""
ON_WIRE = ROUTER.replace("2001:db8:ffff::1/64", "2001:db8:0:1::1/64")  # one /64, not routed
NETWORKD = """printf '%s\\n' > /etc/systemd/network/10-eth0.network \
  '[Match]' Name=eth0 '[Network]' Address=192.0.2.7/24 Gateway=192.0.2.1
systemctl enable --now systemd-networkd
"""
OUTSIDE = ("198.51.100.2", "2001:db8:eeee::2")  # beyond the router
LIST_FILES = ("find /etc /opt /usr /var/lib /root -xdev ! -path '/var/lib/docker/*' "
              "! -path '/var/lib/containerd/*' ! -name '.*' | sort")
AGE = re.compile(r"(?<= )[0-9]+s(?= )")
WEB1 = ("docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}} "
        "{{.GlobalIPv6Address}}{{end}}' web1")
FETCH = ("curl", "-sS", "-g", "-m", "2")
HELLO = "hello from nginx"

# Tries port 81 of these addresses, which nobody may reach, again and again, and prints those where
# it is open.
PROBE = """if True:
    import socket, sys
    while True:
        for address in sys.argv[1:]:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
                client.settimeout(0.03)
                if client.connect_ex((address, 81)) == 0:
                    print("open:", address, flush=True)"""

# Runs beyond the router: answers each UDP packet, and each line of a TCP connection, with the
# address that it came from.
ECHO = """if True:
    import contextlib, socket, threading
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    tcp = socket.create_server(("::", 9), family=socket.AF_INET6)
    udp.bind(("2001:db8:eeee::2", 9))
    def serve_udp():
        while True:
            client = udp.recvfrom(9)[1]
            with contextlib.suppress(OSError):  # the router has no route any more
                udp.sendto(client[0].encode(), client)
    threading.Thread(target=serve_udp, daemon=True).start()
    while True:
        connection, client = tcp.accept()
        def serve(connection=connection, client=client):
            while connection.recv(9):
                connection.send(client[0].encode())
        threading.Thread(target=serve, daemon=True).start()"""

# Runs in a container: keeps a UDP flow and a TCP connection open and prints the answers on each.
FLOWS = """if True:
    import socket, time
    flows = {
        "udp": socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
        "tcp": socket.socket(socket.AF_INET6),
    }
    for flow in flows.values():
        flow.settimeout(1)
        flow.connect(("2001:db8:eeee::2", 9))
    while True:
        for name, flow in list(flows.items()):
            try:
                flow.send(b"?")
                print(name, flow.recv(99).decode(), flush=True)
            except TimeoutError:
                pass
            except OSError as error:
                print(name, type(error).__name__, flush=True)
                if name == "tcp":
                    del flows["tcp"]
        time.sleep(0.2)"""


def url(address: str, port: int) -> str:
    if ":" in address:
        return f"http://[{address}]:{port}/"
    return f"http://{address}:{port}/"


class ReadmeTest(unittest.TestCase):
    blocks: list[Block] = read_blocks()
    router: Router
    machine: Machine

    def start(self, suite: str, setup: str, wire: str, *advertised: str) -> None:
        """Start a router, which may advertise itself and prefixes, and a machine with Docker."""
        self.start_router(setup)
        if advertised:
            self.router.advertise(*advertised)
        self.start_machine(suite, cable(wire) + "systemctl start cable")

    def start_router(self, setup: str) -> None:
        self.router = Router(setup)
        self.addCleanup(self.router.close)

    def start_machine(self, suite: str, script: str) -> None:
        self.machine = Machine(make_tree(suite), router=self.router)
        self.addCleanup(self.machine.remove)
        self.machine.boot(*FILES, end="poweroff")
        self.machine(EQUIP + script)

    def boot_again(self, end: str) -> None:
        """End the machine as its last boot() said, boot, and wait for all containers."""
        self.machine.end()
        self.machine.boot(end=end)
        self.machine.wait_for_containers()

    def blocks_of(self, chapter: str, *kinds: str) -> list[Block]:
        blocks = []
        for block in self.blocks:
            if block.chapter == chapter and block.kind in kinds:
                blocks.append(block)
        self.assertTrue(blocks, chapter)
        return blocks

    def follow(self, chapter: str, *which: int) -> str:
        """Run all blocks of a chapter, or some, on the host and outside; return their output."""
        blocks = self.blocks_of(chapter, "sh", "sh outside")
        if which:
            blocks = [blocks[index] for index in which]
        outputs = []
        for block in blocks:
            if block.kind == "sh outside":
                outputs.append(self.outside(block.text))
            else:
                outputs.append(self.machine(block.script()))
        return "\n".join(outputs)

    def outside(self, script: str) -> str:
        return self.router.run("bash", "-ec", script)

    def quoted(self, command: str) -> str:
        """Return a command that the README has in its text."""
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            text = " ".join(file.read().split())
        self.assertTrue(f"`{command}`" in text, command)
        return command

    def fetch(self, address: str, port: int) -> str:
        return self.router.run(*FETCH, url(address, port))

    def wait_until_reached(self, address: str) -> None:
        wait_until(f"port 80 of {address}", machines.works, self.fetch, address, 80)

    def assert_reached(self, *addresses: str) -> None:
        """Port 80 of these addresses answers outside, 81 does not; web1 reaches out from them."""
        fetch_inside = "docker exec web1 wget -q -O - http://127.0.0.1:81/"
        for address in addresses:
            with self.subTest(address):
                self.wait_until_reached(address)
                self.assertEqual(self.fetch(address, 80), HELLO + "\n")
                self.machine.wait_until(fetch_inside + " > /dev/null")
                with self.assertRaisesRegex(machines.CommandError, "timed out|Could not connect"):
                    self.fetch(address, 81)
        for address, own in zip(OUTSIDE, addresses):
            with self.subTest(address):
                who = f"docker exec web1 wget -q -T 2 -O - {url(address, 80)}cgi-bin/who"
                self.machine.wait_until(f'[ "$({who})" = {own} ]')

    def assert_at_peace(self) -> None:
        """gipam check has nothing to say, not even a note."""
        self.assertEqual(self.machine("gipam check --grace 0"), "no difference")

    def assert_reached_over_boots(self, *addresses: str) -> None:
        """It stays so after a power cut and a reboot."""
        for end in ("cut", "poweroff"):
            self.assert_reached(*addresses)
            self.assert_at_peace()
            self.boot_again(end)
        self.assert_reached(*addresses)

    # -- a routed prefix, and everything else that the guide has

    def test_routed_prefix_from_a_first_try_to_no_trace(self) -> None:
        self.start("forky", ROUTER, WIRE + WIRE_V6)
        before = self.machine(LIST_FILES)
        self.try_it()
        self.assertEqual(self.machine(LIST_FILES), before)
        self.follow("Install")
        self.assertEqual(self.follow("A routed prefix").count(HELLO), 2)
        self.assertIn(self.quoted("0.0.0.0:0->80/tcp, [::]:0->80/tcp"), self.machine("docker ps"))
        self.assert_reached_over_boots("10.2.0.2", "2001:db8:0:100::2")
        self.assert_free_blocks_do_not_loop()
        # One network may have the whole base.
        self.machine("ip link add whole up type bridge; ip addr add 10.2.255.1/16 dev whole\n"
                     "systemctl restart gipam; ip route get 10.2.77.7 | grep 'dev whole'\n"
                     "ip link del whole")
        self.have_one_family_alone()
        self.use_it_every_day()
        self.have_several_drivers()
        self.follow("Docker 29 with nftables")
        self.uninstall(before)

    def try_it(self) -> None:
        """Run gipam in one terminal, the commands in another, and Ctrl-C where the text says so."""
        machine = self.machine
        keep, start, use, shown = self.blocks_of("Try it", "sh", "")
        machine(keep.script())
        gipam = machine.begin("cd /root/gipam; echo $$ > /run/try.pid; exec " + start.text)
        machine.wait_until("[ -S /run/docker/plugins/gipam.sock ]")
        said = AGE.sub("", machine(use.script()))
        self.assertTrue(said.endswith(AGE.sub("", shown.text.strip())), said)
        remove = self.quoted("docker rm -f web1; docker network rm web")
        machine(remove + "; kill -INT $(cat /run/try.pid)")
        self.assertIn("stopped", gipam.communicate(timeout=30)[0])
        machine("cd /root/gipam; " + self.quoted("rm leases.json*"))

    def assert_free_blocks_do_not_loop(self) -> None:
        """A packet to a free block gets no error "time exceeded", as one that loops would."""
        for address in ("10.2.77.7", "2001:db8:0:177::7"):
            said = self.outside(f"ping -c 1 -W 1 {address} || true")
            self.assertNotRegex(said, "(?i)exceeded")

    def have_one_family_alone(self) -> None:
        """The row of "Which bases?" for a host with only one family."""
        for family, options in (("6", "--ipv6 --ipv4=false"), ("4", "")):
            self.machine(f"docker network create --ipam-driver gipam {options} "
                         f"-o com.docker.network.bridge.gateway_mode_ipv{family}=routed alone\n"
                         "docker run -d --name alone --network alone -p 80 nginx")
            self.wait_until_reached(self.machine(WEB1.replace("web1", "alone")))
            self.machine("docker rm -f alone; docker network rm alone")

    def use_it_every_day(self) -> None:
        machine = self.machine
        addresses = machine(WEB1)
        machine("docker rm -f web1; docker network rm web")
        self.follow("A routed prefix", 2, 3)
        self.assertEqual(machine(WEB1), addresses)
        self.assertRegex(self.follow("Upgrade and roll back"), r"\d+\.\d+\.\d+")
        machine(self.quoted("install -m 755 /opt/gipam/gipam.py.old /opt/gipam/gipam.py && "
                            "systemctl restart gipam"))
        machine(self.quoted("tar -C /opt -czf /root/gipam.tar.gz gipam"))
        self.assertIn("no difference", self.follow("Back up and restore"))
        self.follow("Check once a week")
        self.assertIn("no difference", machine.log("gipam-check@gipam"))
        self.follow("Metrics")
        self.assertIn("gipam_base_blocks", self.outside("curl -sS http://192.0.2.7:9091/metrics"))
        self.assertEqual(machine(WEB1), addresses)

    def have_several_drivers(self) -> None:
        """The weekly check is each driver's own, and so are files and sockets."""
        machine = self.machine
        self.follow("Several drivers")
        status = machine(self.quoted("gipam status -socket /run/docker/plugins/lan.sock"))
        self.assertRegex(status, r"10\.3\.0\.0/24 .* office")
        machine("docker run --rm --network office nginx sh -c :; systemctl restart gipam@lan\n"
                "docker network rm office; systemctl start gipam-check@lan gipam-check@gipam")
        modes = machine("stat -c %a /run/gipam /run/gipam@lan /opt/gipam/lan/leases.json")
        self.assertEqual(modes, "700\n700\n600")
        machine("systemctl stop gipam@lan; test ! -e /run/gipam@lan")
        self.assertIn("failed", machine("systemctl start gipam-check@lan", 1))

    def uninstall(self, before: str) -> None:
        machine = self.machine
        machine("docker rm -f $(docker ps -aq)\n"
                "docker network rm $(docker network ls -q --filter type=custom)")
        self.follow("Uninstall")
        left = set(machine(LIST_FILES).splitlines()) - set(before.splitlines())
        self.assertEqual(left, set())
        units = "systemctl list-units --all | grep gipam"
        self.assertEqual(machine("find /run -xdev | grep gipam; " + units, 1), "")
        routes = machine("ip route show type blackhole; ip -6 route show type blackhole")
        self.assertEqual(routes, "")
        machine("docker volume ls; systemctl restart docker")
        self.assertEqual(machine.complaints(), [])

    # -- one address and one /64

    def test_one_address_and_one_64_whose_router_advertises_itself(self) -> None:
        self.start("forky", ON_WIRE, WIRE, "2001:db8:0:1::/64")
        self.machine.wait_until("ip -6 route show default | grep -q 'proto ra'")
        self.try_it()
        show = "cat /proc/sys/net/ipv6/conf/all/forwarding; ip -6 route show default"
        self.assertRegex(self.machine(show), "^1\ndefault .*proto ra")
        self.forget_what_keeps_the_route()
        self.follow("Install")
        self.assertEqual(self.follow("One IPv4 address and one /64").count(HELLO), 2)
        self.assert_reached_over_boots("192.0.2.7", "2001:db8:0:1:c00::2")
        # The control: without accept_ra=2 the route goes, and web1 is cut off.
        self.forget_what_keeps_the_route()
        self.machine(FORWARD)
        self.machine.wait_until('[ -z "$(ip -6 route show default)" ]')

    def forget_what_keeps_the_route(self) -> None:
        """Set forwarding and accept_ra back to the kernel's own values; the route stays."""
        self.machine("echo 0 > /proc/sys/net/ipv6/conf/all/forwarding\n"
                     "echo 1 > /proc/sys/net/ipv6/conf/eth0/accept_ra")

    def test_one_address_and_one_64_of_which_the_host_has_a_128(self) -> None:
        self.start("forky", ON_WIRE, WIRE + WIRE_128)
        self.follow("Install")
        self.follow("One IPv4 address and one /64", 0, 1)
        self.machine(self.quoted("echo 'ExecStartPre=+ip route replace 2001:db8:0:1:c00::/72 "
                                 "dev eth0 proto kernel' >> "
                                 "/etc/systemd/system/gipam.service.d/onlink.conf"))
        self.assertEqual(self.follow("One IPv4 address and one /64", 2, 3, 4, 5).count(HELLO), 2)
        self.assert_reached_over_boots("192.0.2.7", "2001:db8:0:1:c00::2")

    # -- a prefix that changes

    def test_prefix_that_changes(self) -> None:
        """A home router delegates one prefix after another.

        An open UDP flow goes on, a TCP connection is reset.
        """
        self.start_router(ROUTER)
        self.router.advertise("2001:db8:ffff::/64")
        self.delegate("2001:db8:0:1230::/60")
        delegation = os.path.join(HERE, ".ci", "lab", "delegation.py")
        self.router.spawn("python3", delegation, "lan", "/etc/delegated", "2")
        self.start_machine("forky", NETWORKD)
        before = self.machine(LIST_FILES)
        self.have_a_delegated_prefix()
        self.change_the_prefix()
        self.assert_reached_over_boots("192.0.2.7", "2001:db8:0:9a00::2")
        restart = "nft flush ruleset; systemctl restart docker gipam-prefix"
        self.assertEqual(self.machine(restart + "; docker start web1"), "web1")
        self.assert_reached("192.0.2.7", "2001:db8:0:9a00::2")
        self.machine("docker rm -f web1; docker network rm web")
        self.follow("A prefix that changes", 7)
        self.follow("Uninstall")
        left = set(self.machine(LIST_FILES).splitlines()) - set(before.splitlines())
        self.assertEqual(left, set())
        self.assertEqual(self.machine("nft list tables | grep gipam", 1), "")

    def delegate(self, prefix: str) -> None:
        with open(self.router.path("/etc/delegated"), "w", encoding="ascii") as file:
            file.write(prefix)

    def have_a_delegated_prefix(self) -> None:
        chapter = "A prefix that changes"
        self.follow("Install")
        self.follow(chapter, 0)
        self.machine.wait_until('[ -n "$(ip -6 route show type unreachable proto dhcp)" ]')
        (shown,) = self.blocks_of(chapter, "")
        self.assertEqual(self.follow(chapter, 1), shown.text.strip())
        self.assertEqual(self.follow(chapter, 2, 3, 4, 5, 6).count(HELLO), 1)
        self.assert_reached("192.0.2.7", "2001:db8:0:1230::2")

    def change_the_prefix(self) -> None:
        """The router delegates one of the same size, one that is too small, and a larger one.

        The log names the one that is too small, which changes nothing.
        """
        self.router.spawn("nice", "python3", "-c", ECHO)  # so named, its log is its own
        self.outside("until ss -Hltn 'sport = 9' | grep -q .; do sleep 0.05; done")
        networks = ("2001:db8:0:1230::", "2001:db8:0:5670::", "2001:db8:0:9a00::")
        addresses = [network + "2" for network in networks]
        probe = self.begin_probe("192.0.2.7", *addresses)
        enter = "nsenter -t $(docker inspect -f '{{.State.Pid}}' web1) -n"
        self.machine(f"{enter} python3 -c '{FLOWS}' > /run/flows 2>&1 &")
        self.machine.wait_until("grep -q 'udp 2001:db8:0:1230::2' /run/flows")
        self.machine.wait_until("grep -q 'tcp 2001:db8:0:1230::2' /run/flows")
        self.delegate("2001:db8:0:5670::/60")
        self.machine.wait_until("grep -q 'udp 2001:db8:0:5670::2' /run/flows")
        self.machine.wait_until("grep -q 'tcp ConnectionResetError' /run/flows")
        self.assert_reached("192.0.2.7", "2001:db8:0:5670::2")
        self.delegate("2001:db8:0:7890::/62")
        self.machine.wait_until("journalctl -u gipam-prefix | grep -q '7890::/62 is smaller than'")
        self.delegate("2001:db8:0:9a00::/56")
        self.assert_reached("192.0.2.7", "2001:db8:0:9a00::2")
        self.assert_closed(probe, "while the prefix changed")

    def begin_probe(self, *addresses: str) -> machines.Process:
        return self.router.spawn("env", "python3", "-c", PROBE, *addresses)

    def assert_closed(self, probe: machines.Process, when: str) -> None:
        self.assertEqual((probe.is_running(), probe.read_log()[:100]), (True, ""), when)

    # -- Docker 26

    def test_rules_for_docker_26_are_never_away(self) -> None:
        """An unpublished port stays closed over boots, reloads and a mistake in the rules."""
        chapter = "Docker 26 and 27"
        # A host that forwards before Docker starts gets no filter of Docker's.
        self.start("trixie", ROUTER, WIRE + WIRE_V6 + FORWARD)
        self.follow("Install")
        self.assertEqual(self.follow(chapter, 0, 1, 2, 3, 4, 5, 6).count(HELLO), 2)
        self.assert_reached("10.2.0.2", "2001:db8:0:100::2")
        self.assert_at_peace()
        probe = self.begin_probe("10.2.0.2", "2001:db8:0:100::2")
        for end in ("cut", "poweroff"):
            self.boot_again(end)
            self.assert_still_closed(probe, "after a boot")
            self.assertIn("-P FORWARD ACCEPT", self.machine("iptables -S FORWARD"))
        self.replace_rules(probe)
        self.boot_with_a_mistake(probe)
        self.follow(chapter, 7)
        # The control: without the rules the probe finds open ports.
        for address in ("10.2.0.2", "2001:db8:0:100::2"):
            wait_until("an open port", self.is_found_open, probe, address)

    def test_docker_26_with_one_address_and_one_64(self) -> None:
        """Steps 2 and 3 are those of the other chapter; the others are changed as README says."""
        self.start("trixie", ON_WIRE, WIRE, "2001:db8:0:1::/64")
        self.machine.wait_until("ip -6 route show default | grep -q 'proto ra'")
        self.follow("Install")
        self.follow("One IPv4 address and one /64", 0, 1, 2)
        rules, network, container = self.blocks_of("Docker 26 and 27", "sh")[2:5]
        lines = rules.text.replace("2001:db8:0:100::/56", "2001:db8:0:1:c00::/72").splitlines()
        self.machine("\n".join(line for line in lines if "10.2.0.0/16" not in line))
        routed = "-o com.docker.network.bridge.enable_ip_masquerade=false"
        self.machine(network.text.replace(routed, ""))
        self.machine(container.text.replace("-p 80", "-p 80:80"))
        self.assertEqual(self.follow("One IPv4 address and one /64", 5).count(HELLO), 2)
        self.assert_reached_over_boots("192.0.2.7", "2001:db8:0:1:c00::2")

    def assert_still_closed(self, probe: machines.Process, when: str) -> None:
        self.machine.wait_for_containers()
        self.assert_reached("10.2.0.2", "2001:db8:0:100::2")
        self.assert_closed(probe, when)

    def is_found_open(self, probe: machines.Process, address: str) -> bool:
        return f"open: {address}\n" in probe.read_log()

    def replace_rules(self, probe: machines.Process) -> None:
        replace = self.quoted("nft -f /etc/docker/gipam.nft")
        self.machine(f"for _ in $(seq 50); do {replace}; done\n"
                     "systemctl restart docker; systemctl restart gipam")
        self.assert_still_closed(probe, "after they were replaced, and restarts")
        self.machine("cp /etc/docker/gipam.nft /root\n"
                     f"sed -i s/dport/dprot/ /etc/docker/gipam.nft; {replace}", 1)
        self.assert_still_closed(probe, "after a mistake")

    def boot_with_a_mistake(self, probe: machines.Process) -> None:
        """Docker does not start without the rules."""
        machine = self.machine
        machine.end()
        machine.boot(end="poweroff")
        machine.wait_until("systemctl is-failed -q docker")
        machine("mv /root/gipam.nft /etc/docker/gipam.nft\n"
                "systemctl reset-failed docker; systemctl start docker")
        self.assert_still_closed(probe, "after a boot with the mistake")

    def test_every_chapter_is_followed(self) -> None:
        with open(__file__, encoding="utf-8") as file:
            text = file.read()
        for block in self.blocks:
            if block.kind.startswith("sh") and block.part != "Several hosts":
                self.assertIn(f'"{block.chapter}"', text)


if __name__ == "__main__":
    sys.exit(main())
