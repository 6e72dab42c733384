"""gipam as a service of machines that boot, by the README's commands: `python3 .ci/lab/boot.py`.

A Debian machine with systemd and Docker is booted on an overlay over a tree that .ci/tree makes.
gipam is installed in it once, by the README's commands; each test then has that disk to itself.
The unit itself is verified by .ci/run; readme.py shows the other ways to run it.
GIPAM_LONG=1 disturbs it longer under load.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import unittest
from typing import Callable, Iterator

from machines import FILES, MAKE_IMAGE, Machine, main, make_tree

CONTAINERS = 5  # that the machine always has: web1, web2, db1, db2 on dual-stack networks, lan1
LOAD_COUNT = 50  # containers that start and stop under load
DISTURBANCES = 20 if os.environ.get("GIPAM_LONG") else 3
LOST_BODY = "the request has no body: dockerd lost it in a retry"
CHECK = "check() { python3 /opt/gipam/gipam.py check --grace 0 $* | grep -v ^note:; }; check"  # networks masquerade here
GIPAM_PID = "$(systemctl show gipam -p MainPID --value)"

# A network of each kind, and containers on them.
SET_UP = MAKE_IMAGE + """
docker network create --ipam-driver gipam spare
docker network create --ipam-driver gipam --ipv6 --ipam-opt gipam.name=web web
docker network create --ipam-driver gipam --ipv6 --ipam-opt gipam.name=db db
docker network create --ipam-driver gipam --subnet 10.9.0.0/24 --ip-range 10.9.0.128/25 lan
docker network rm spare
for name in web1 web2 db1 db2 lan1; do docker run -d --restart=always --network ${name%?} --name $name bb; done
"""

# Each container stops and starts, over and over. A command that fails is printed, a round is counted.
LOAD = f"""
for n in $(seq {LOAD_COUNT - CONTAINERS}); do docker run -d --restart=always --network web bb > /dev/null; done
for container in $(docker ps -q); do
    {{  while [ ! -e /run/load.end ]; do
            for verb in stop start; do
                said=$(docker $verb $container 2>&1) || echo $verb: $said
            done
            echo >> /run/load
        done
        docker start $container > /dev/null  # again, should the last one have failed
    }} &
done
wait
"""

class Load:
    """All containers of a machine start and stop."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.process = machine.begin(LOAD)
        self.go_on()

    def go_on(self) -> None:
        """Wait until half as many containers as there are have stopped and started once more."""
        rounds = int(self.machine("touch /run/load; wc -l < /run/load"))
        self.machine.wait_until(f"[ $(wc -l < /run/load) -ge {rounds + LOAD_COUNT // 2} ]")

    def end(self) -> list[str]:
        """End it and return what the commands said that failed."""
        self.machine("touch /run/load.end")
        return self.process.communicate(timeout=300)[0].splitlines()


class BootTest(unittest.TestCase):
    tree: str
    installed: Machine
    subnets: dict[str, list[str]]
    shared: Machine  # by the tests that leave it as they found it

    @classmethod
    def setUpClass(cls) -> None:
        cls.tree = make_tree()
        cls.installed = machine = Machine(cls.tree)
        cls.addClassCleanup(machine.remove)
        machine.boot(*FILES, end="poweroff")
        machine.follow("Install", 0, directory="/root/gipam")
        machine.follow("A routed prefix", 1)
        machine(SET_UP)
        cls.subnets = machine.subnets()
        machine.end()
        cls.shared = cls.boot(cls.addClassCleanup)

    @classmethod
    def boot(cls, clean_up: Callable[[Callable[[], None]], None], *files: str) -> Machine:
        """Return a machine that is up, with gipam and everything on it."""
        machine = Machine(os.path.join(cls.installed.disk, "upper"), cls.tree)
        clean_up(machine.remove)
        machine.boot(*files)
        machine.wait_for_containers()
        return machine

    def machine(self, *files: str) -> Machine:
        """Return a machine of this test alone."""
        return self.boot(self.addCleanup, *files)

    @contextlib.contextmanager
    def load(self, machine: Machine, excuse: str = "nothing") -> Iterator[Load]:
        """Let containers start and stop; then no command has failed, but for what excuses it."""
        load = Load(machine)
        try:
            yield load
        finally:
            failures = load.end()
        self.assertEqual([said for said in failures if excuse not in said], [])

    def assert_all_is_well(self, machine: Machine, *scripts: str) -> None:
        """After these, all containers run, no address is there twice, all agree, subnets are the old ones."""
        for script in scripts:
            machine(script)
        machine.wait_for_containers()
        addresses = machine.addresses()
        self.assertGreaterEqual(len(addresses), CONTAINERS * 2 - 1)  # one has no IPv6
        self.assertEqual(len(set(addresses)), len(addresses))
        self.assertEqual(machine.subnets(), self.subnets)
        self.assertEqual(machine(CHECK), "no difference")

    # -- a service that runs

    def test_routes_and_addresses_of_the_host_are_seen_from_inside_the_sandbox(self) -> None:
        machine = self.shared
        create = "docker network create --ipam-driver gipam {0} > /dev/null; docker network inspect -f " \
                 "'{{{{(index .IPAM.Config 0).Subnet}}}}' {0}"
        third = int(machine(create.format("first")).split(".")[2])
        machine(f"ip route add blackhole 10.2.{third + 1}.0/24; ip addr add 10.2.{third + 2}.9/32 dev lo")
        self.assertEqual(machine(create.format("second")), f"10.2.{third + 3}.0/24")
        machine(f"docker network rm first second; ip route del 10.2.{third + 1}.0/24; ip addr del 10.2.{third + 2}.9/32 dev lo")

    def test_stop_leaves_no_dead_socket(self) -> None:
        """A dead socket would cost `docker volume ls` 15 s; it passes over a link to nothing."""
        machine = self.shared
        machine("systemctl stop gipam")
        machine("test -h /run/docker/plugins/gipam.sock -a ! -e /run/docker/plugins/gipam.sock -a ! -e /run/gipam")
        machine("docker volume ls; systemctl start gipam")
        self.assert_all_is_well(machine)

    def test_switching_between_socket_and_tcp_takes_one_restart(self) -> None:
        """The socket that systemd kept is given up first. Docker keeps the place that it has found: it is stopped meanwhile."""
        machine = self.shared
        machine("systemctl stop docker.socket docker")
        for flag, there in (("false", "-s"), ("true", "! -e")) * 3:
            machine(f"echo GIPAM_UNIX={flag} >> /opt/gipam/.env; systemctl reset-failed gipam; systemctl restart gipam")
            self.assertEqual(machine.show("NRestarts"), "0")
            machine(f"test {there} /etc/docker/plugins/gipam.spec")
        for flag in ("false", "true"):
            machine(f"echo GIPAM_UNIX={flag} >> /opt/gipam/.env; systemctl reset-failed gipam docker docker.socket\n"
                    "systemctl restart gipam; systemctl start docker; docker restart -t 0 web1 lan1")
            machine.wait_for_containers()
            machine("systemctl stop docker.socket docker")
        machine("systemctl start docker")
        self.assert_all_is_well(machine)

    # -- reboots

    def test_reboots_and_power_cuts_bring_everything_back(self) -> None:
        machine = self.machine()  # its disk comes from a poweroff
        for end in ("cut", "poweroff"):
            with self.subTest(end):
                if end == "cut":
                    Load(machine)
                machine.end()
                machine.boot(end="poweroff")
                machine.wait_for_containers()
                if end == "cut":  # what Docker was about to be told is held, and nobody knows
                    machine(CHECK + " --fix")
                self.assert_all_is_well(machine)
                began, ready = (int(machine.show(name, unit)) for name, unit in (
                    ("ExecMainStartTimestampMonotonic", "docker"), ("ActiveEnterTimestampMonotonic", "gipam")))
                self.assertGreater(began, ready)
                self.assertEqual(machine.complaints(), [])

    # -- restarts, crashes and hangs under load

    def test_restarts_go_unnoticed(self) -> None:
        machine = self.machine()
        with self.load(machine) as load:
            for _ in range(DISTURBANCES):
                machine.follow("Upgrade and roll back", 0, directory="/root/gipam")
                machine("systemctl restart gipam; systemctl restart gipam; systemctl reset-failed gipam")
                load.go_on()
        self.assert_all_is_well(machine)
        self.assertEqual(machine.complaints(), [])

    def test_kill_fails_only_what_was_being_answered(self) -> None:
        machine = self.machine()
        with self.load(machine, LOST_BODY) as load:
            for _ in range(DISTURBANCES):
                machine(f"systemctl reset-failed gipam; kill -KILL {GIPAM_PID}")
                load.go_on()
                self.assertEqual(machine.show("NRestarts"), "1")
        self.assert_all_is_well(machine, CHECK + " --fix")  # a release may be lost, an address be given to nobody

    def test_hung_gipam_is_ended_by_the_watchdog(self) -> None:
        machine = self.machine()
        self.assertEqual(machine.show("WatchdogUSec"), "30s")
        machine("mkdir -p /run/systemd/system/gipam.service.d; cd /run/systemd/system/gipam.service.d\n"
                "printf '[Service]\\nWatchdogSec=2\\n' > test.conf; systemctl daemon-reload; systemctl restart gipam")
        with self.load(machine, LOST_BODY) as load:
            machine(f"kill -STOP {GIPAM_PID}")
            load.go_on()
        log = machine.log("gipam")
        for text in ("Watchdog timeout", "most recent call first", "Failed with result 'watchdog'"):
            self.assertIn(text, log)
        self.assertEqual(machine.show("NRestarts"), "1")
        self.assertEqual(machine("ls /opt/gipam | grep -v leases.json"), "gipam.py")  # no core file
        self.assert_all_is_well(machine, CHECK + " --fix")

    # -- a lease file that is damaged, lost or moved

    def test_damaged_lease_file_fails_the_unit_once_and_its_message_mends_it(self) -> None:
        machine = self.machine()
        for damage, remedy in (
                ("systemctl stop gipam; sed -i 's/10.9.0.128/10.9.0.77/' /opt/gipam/leases.json; systemctl start gipam || true",
                 r"; or (move) (/opt/gipam/leases\.json\*) away: "),
                ("docker network create --ipam-driver gipam extra; docker network rm extra\n"
                 f"sed -i '2s/request/REQUEST/' /opt/gipam/leases.json.journal.*; kill -KILL {GIPAM_PID}",
                 r": (truncate -s \d+) (/opt/gipam/leases\.json\.journal\.\d+), .* run `gipam check --fix`")):
            machine(damage)
            machine.wait_until("systemctl is-failed -q gipam")
            status = machine("systemctl --no-pager status gipam", 3)
            with self.subTest(status):
                self.assertIn("status=78/CONFIG", status)
                self.assertRegex(status, remedy)
                command, path = re.findall(remedy, status)[0]
                machine(f"mkdir -p /root/away; mv {path} /root/away" if command == "move" else f"{command} {path}")
                machine("systemctl start gipam")
                self.assert_all_is_well(machine, CHECK + " --fix")


if __name__ == "__main__":
    sys.exit(main())
