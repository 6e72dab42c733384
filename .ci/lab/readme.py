"""The commands of README.md, word for word and in order, on a machine that boots: `python3 .ci/lab/readme.py`.

Who follows the guide gets from "Try it" to a container that answers from outside, over a reboot, and
back to a host without a trace, the variants on the way. What the README shows as output has to come.
"""

from __future__ import annotations

import re
import sys
import unittest

from machines import CONNECT, FILES, Block, Machine, main, make_tree, outside, read_blocks

# The machine lacks the commands that people have, and the image nginx.
EQUIP = r"""
printf '#!/bin/sh\nexec busybox ping -W 2 "$@"\n' > /usr/local/bin/ping
printf '#!/bin/sh\nexec busybox wget -T 2 -q -O - "$1"\n' > /usr/local/bin/curl
chmod +x /usr/local/bin/*
cd $(mktemp -d); mkdir bin www; cp $(command -v busybox) bin; echo 'hello from nginx' > www/index.html
for name in httpd nc ping sh wget; do ln -s busybox bin/$name; done
tar c . | docker import -c 'CMD ["httpd", "-f", "-h", "/www"]' -c 'STOPSIGNAL SIGKILL' - nginx; rm -r "$PWD"
"""
LIST_FILES = "find /etc /opt /usr /var/lib /root -xdev ! -path '/var/lib/*/*' ! -name '.*' | sort"
LIST_RULES = "for x in iptables ip6tables; do $x -S | grep GIPAM || true; done; ip route show type blackhole; " \
             "ip -6 route show type blackhole"
AGE = re.compile(r"(?<= )[0-9]+s(?= )")
REPORTER = """if True:  # tells whoever dials the address that it sees
    import socket, sys
    with socket.create_server(("::", 7000), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        print("ready", flush=True)
        while True:
            connection, peer = server.accept()
            with connection:
                connection.sendall((peer[0].replace("::ffff:", "") + "\\n").encode())"""
WEB1 = "docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}' web1"


class ReadmeTest(unittest.TestCase):
    blocks: list[Block]
    machine: Machine

    @classmethod
    def setUpClass(cls) -> None:
        cls.blocks = read_blocks()
        cls.machine = Machine(make_tree())
        cls.addClassCleanup(cls.machine.remove)

    def setUp(self) -> None:
        self.followed: set[str] = set()

    def texts(self, chapter: str, *words: str) -> list[str]:
        """Return the blocks of a chapter that have one of these words, or all."""
        self.followed.add(chapter)
        return [block.text for block in self.blocks if block.chapter == chapter
                and any(word in block.text for word in words or ("",))]

    def follow(self, chapter: str) -> str:
        """Run the commands of this chapter, here and outside."""
        self.followed.add(chapter)
        return "\n".join(self.machine(block.script()) for block in self.blocks
                         if block.chapter == chapter and block.kind in ("sh", "sh outside"))

    def test_guide_in_order(self) -> None:
        machine = self.machine
        machine.boot(*FILES, end="poweroff")
        machine(EQUIP + CONNECT)
        before = machine(LIST_FILES)
        self.try_it()
        self.assertEqual(machine(LIST_FILES), before)
        said = self.follow("As a service")
        self.assertIn("may loop between this host and its router", said)
        for text in ("10.2.0.0/16", "Active: active (running)", " gipam[",
                     "serving on /run/gipam/gipam.sock", "no difference"):
            self.assertIn(text, said)
        self.reach_it()
        self.use_it()
        self.vary_it()
        self.uninstall(before)
        self.assertEqual({block.chapter for block in self.blocks if block.kind.startswith("sh")
                          and block.part != "Several hosts"},  # hosts.py has those
                         self.followed | {"On TCP, with TLS"})  # boot.py has that one

    def try_it(self) -> None:
        """gipam runs in one terminal, the commands in another; Ctrl-C comes where the text says so."""
        machine = self.machine
        start, use, shown, forget = self.texts("Try it")
        gipam = machine.begin("cd /root/gipam; echo $$ > /run/try.pid; exec " + start)
        machine.wait_until("[ -S /run/docker/plugins/gipam.sock ]")
        said = machine("cd /root/gipam\n" + use)
        self.assertTrue(AGE.sub("", said).endswith(AGE.sub("", shown.strip())), said)
        first, last = forget.splitlines()
        machine(first + "; kill -INT $(cat /run/try.pid)")
        self.assertIn("stopped", gipam.communicate(timeout=30)[0])
        machine("cd /root/gipam\n" + last)

    def reach_it(self) -> None:
        """A container answers outside under its own address, and only what the rules let in comes in."""
        machine = self.machine
        self.assertEqual(self.follow("Reachable from outside").count("hello from nginx"), 2)
        address = machine(WEB1)
        self.assertEqual(address, "10.2.0.2 2001:db8:0:100::2")
        self.assert_reached()
        machine.end()
        machine.boot(end="poweroff")
        machine(CONNECT)
        machine.wait_for_containers()
        routes_and_look = "".join(block.text for block in self.blocks if block.kind == "sh outside")
        self.assertEqual(machine(outside(routes_and_look)).count("hello from nginx"), 2)
        self.assertEqual(machine(WEB1), address)
        self.assert_reached()

    def assert_reached(self) -> None:
        """On the ports of the rules only; and it is seen outside under its own addresses."""
        machine = self.machine
        machine("docker exec -d web1 httpd -f -h /www -p 81")
        machine(f"ip netns exec outside python3 -c '{REPORTER}' > /dev/null 2>&1 &")
        for server, address, url in (("192.0.2.1", "10.2.0.2", "http://10.2.0.2:81/"),
                                     ("2001:db8:ffff::1", "2001:db8:0:100::2", "http://[2001:db8:0:100::2]:81/")):
            with self.subTest(address):
                machine.wait_until(f"docker exec web1 wget -q -O - {url} > /dev/null")
                with self.assertRaisesRegex(AssertionError, "timed out"):
                    machine(outside(f"curl {url}\n"))
                machine.wait_until(f'[ "$(docker exec web1 nc {server} 7000)" = {address} ]')

    def use_it(self) -> None:
        """Everyday commands, and metrics that are read from outside."""
        machine = self.machine
        address = machine(WEB1)
        make = self.texts("Reachable from outside", "docker run")
        machine("\n".join(["docker rm -f web1; docker network rm web", *make]))
        self.assertEqual(machine(WEB1), address)
        self.assertIn("10.2.0.0/16,10.7.0.0/16", self.follow("Change a prefix"))
        self.assertIn("-v4 changes from '10.2.0.0/16'", machine.log("gipam"))
        self.assertRegex(self.follow("Upgrade, and back"), r"\d+\.\d+\.\d+")
        self.assertIn("no difference", self.follow("Back up and restore"))
        self.follow("Check once a week")
        self.assertIn("no difference", machine.log("gipam-check@gipam"))
        self.follow("Watch it")
        self.assertIn("gipam_base_blocks", machine(outside("curl http://192.0.2.7:9091/metrics\n")))
        self.assertEqual(machine(WEB1), address)

    def vary_it(self) -> None:
        """The weekly check works with every variant."""
        machine, socket = self.machine, "/run/docker/plugins/gipam.sock"
        check = "docker restart web1; gipam check --grace 0 | grep -q 'no difference'"
        self.assertRegex(self.follow("Several drivers"), r"10\.3\.0\.0/24 .* office")
        for instance in ("lan", "gipam"):
            machine(f"systemctl enable --now gipam-check@{instance}.timer; systemctl start gipam-check@{instance}")
        machine("docker run --rm --network office nginx sh -c :; systemctl restart gipam@lan\n"
                "docker network rm office")
        self.assertEqual(machine("stat -c %a /run/gipam /run/gipam-lan"), "700\n700")
        machine("systemctl stop gipam@lan; test ! -e /run/gipam-lan")
        self.assertIn("failed", machine("systemctl start gipam-check@lan", 1))
        machine("systemctl start gipam@lan")
        self.follow("The lease file in /var/lib")
        machine("systemctl start gipam-check@gipam; " + check)
        self.assertEqual(machine("stat -c '%a %n' /var/lib/gipam /var/lib/gipam/leases.json"),
                         "700 /var/lib/gipam\n600 /var/lib/gipam/leases.json")
        self.follow("A socket unit")
        machine("systemctl start gipam-check@gipam; " + check)
        for action in ("restart", "stop"):  # a request starts it again
            machine(f"systemctl {action} gipam; test -S {socket}; {check}")
        machine(f"systemctl stop gipam.socket gipam; test ! -e {socket}")
        machine(f"systemctl start gipam.socket; {check}")
        self.assertEqual(machine("ls /opt/gipam"), "gipam.py\ngipam.py.old\nlan\nrules")

    def uninstall(self, before: str) -> None:
        machine = self.machine
        machine("docker rm -f $(docker ps -aq); docker network rm $(docker network ls -q --filter type=custom)")
        self.follow("Uninstall")
        left = set(machine(LIST_FILES).splitlines()) - set(before.splitlines())
        self.assertEqual(left - {"/etc/sysctl.d"}, set())
        self.assertEqual(machine("find /run -xdev | grep gipam; systemctl list-units --all | grep gipam", 1), "")
        self.assertEqual(machine(LIST_RULES), "")
        machine("docker volume ls; systemctl restart docker")
        self.assertEqual(machine.complaints(), [])


if __name__ == "__main__":
    sys.exit(main())
