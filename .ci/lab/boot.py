"""gipam as a service of machines that boot, by the README's commands: `python3 .ci/lab/boot.py`.

A Debian machine with systemd and Docker boots on an overlay over a tree that .ci/tree makes. gipam
is installed in it once, by the README's commands; each test then starts from a copy of that disk.
.ci/run verifies the unit itself; readme.py shows the other ways to run gipam. GIPAM_LONG=1 disturbs
it more often under load.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import unittest
from typing import Callable, Iterator

from machines import FILES, MAKE_IMAGE, Machine, main, make_tree

CONTAINERS = 5  # of each machine: web1, web2, db1, db2, lan1
LOAD_COUNT = 50  # containers that start and stop under load
DISTURBANCES = 20 if os.environ.get("GIPAM_LONG") else 3
LOST_BODY = "the request has no body: dockerd lost it in a retry"
GIPAM_PID = "$(systemctl show gipam -p MainPID --value)"
READ_IDENTITY = """python3 -B -c '
import sys
sys.path.insert(0, "/opt/gipam")
import gipam
print(gipam.read_machine_id("/var/lib/leases.json"))
'"""

# Notes are not shown, since the networks of these machines masquerade.
CHECK = "check() { python3 /opt/gipam/gipam.py check --grace 0 $* | grep -v ^note:; }; check"

# A network of each kind, and containers on them.
SET_UP = MAKE_IMAGE + """
docker network create --ipam-driver gipam spare
docker network create --ipam-driver gipam --ipv6 --ipam-opt gipam.name=web web
docker network create --ipam-driver gipam --ipv6 --ipam-opt gipam.name=db db
docker network create --ipam-driver gipam --subnet 10.9.0.0/24 --ip-range 10.9.0.128/25 lan
docker network rm spare
for name in web1 web2 db1 db2 lan1; do
    docker run -d --restart=always --network ${name%?} --name $name bb
done
"""

# Each container stops and starts again and again. A failed command is printed, each round counted.
LOAD = f"""
for n in $(seq {LOAD_COUNT - CONTAINERS}); do
    docker run -d --restart=always --network web bb > /dev/null
done
for container in $(docker ps -q); do
    {{  while [ ! -e /run/load.end ]; do
            for verb in stop start; do
                said=$(docker $verb $container 2>&1) || echo $verb: $said
            done
            echo >> /run/load
        done
        docker start $container > /dev/null  # the last start may have failed
    }} &
done
wait
"""

CREATE_NETWORK = """
docker network create --ipam-driver gipam {0} > /dev/null
docker network inspect -f '{{{{(index .IPAM.Config 0).Subnet}}}}' {0}
"""
SHORT_WATCHDOG = """
mkdir -p /run/systemd/system/gipam.service.d
printf '[Service]\\nWatchdogSec=2\\n' > /run/systemd/system/gipam.service.d/test.conf
systemctl daemon-reload
systemctl restart gipam
"""
DAMAGE_LEASE_FILE = """
systemctl stop gipam
sed -i 's/10.9.0.128/10.9.0.77/' /opt/gipam/leases.json
systemctl start gipam || true
"""
DAMAGE_JOURNAL = f"""
docker network create --ipam-driver gipam extra
docker network rm extra
sed -i '2s/request/REQUEST/' /opt/gipam/leases.json.journal.*
kill -KILL {GIPAM_PID}
"""


class Load:
    """All containers of a machine stop and start."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.process = machine.begin(LOAD)
        self.continue_load()

    def continue_load(self) -> None:
        """Wait until half as many stops and starts as there are containers have been done."""
        rounds = int(self.machine("touch /run/load; wc -l < /run/load"))
        self.machine.wait_until(f"[ $(wc -l < /run/load) -ge {rounds + LOAD_COUNT // 2} ]")

    def end(self) -> list[str]:
        """End the load and return the output of the commands that failed."""
        self.machine("touch /run/load.end")
        return self.process.communicate(timeout=300)[0].splitlines()


class BootTest(unittest.TestCase):
    tree: str
    installed: Machine
    subnets: dict[str, list[str]]
    shared: Machine  # for tests that restore what they change

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
        """Return a machine that is up, with gipam and all containers."""
        machine = Machine(os.path.join(cls.installed.disk, "upper"), cls.tree)
        clean_up(machine.remove)
        machine.boot(*files)
        machine.wait_for_containers()
        return machine

    def machine(self, *files: str) -> Machine:
        """Return a machine that is used by this test alone."""
        return self.boot(self.addCleanup, *files)

    @contextlib.contextmanager
    def load(self, machine: Machine, excuse: str = "nothing") -> Iterator[Load]:
        """Stop and start containers meanwhile; no command may fail, except for this reason."""
        load = Load(machine)
        try:
            yield load
        finally:
            failures = load.end()
        self.assertEqual([line for line in failures if excuse not in line], [])

    def assert_all_is_well(self, machine: Machine, *scripts: str) -> None:
        """Run these commands; check that containers run with unique addresses and all agree."""
        for script in scripts:
            machine(script)
        machine.wait_for_containers()
        addresses = machine.addresses()
        self.assertGreaterEqual(len(addresses), CONTAINERS * 2 - 1)  # lan1 has no IPv6
        self.assertEqual(len(set(addresses)), len(addresses))
        self.assertEqual(machine.subnets(), self.subnets)
        self.assertEqual(machine(CHECK), "no difference")

    # A running service.

    def test_routes_and_addresses_of_the_host_are_seen_from_inside_the_sandbox(self) -> None:
        machine = self.shared
        third = int(machine(CREATE_NETWORK.format("first")).split(".")[2])
        machine(f"ip route add blackhole 10.2.{third + 1}.0/24")
        machine(f"ip addr add 10.2.{third + 2}.9/32 dev lo")
        subnet = machine(CREATE_NETWORK.format("second"))
        self.assertEqual(subnet, f"10.2.{third + 3}.0/24")

        machine("docker network rm first second")
        machine(f"ip route del 10.2.{third + 1}.0/24; ip addr del 10.2.{third + 2}.9/32 dev lo")

    def test_stop_leaves_no_dead_socket(self) -> None:
        """`docker volume ls` would wait 15 s for a dead socket; it ignores a dangling link."""
        machine = self.shared
        link = "/run/docker/plugins/gipam.sock"
        machine("systemctl stop gipam")
        machine(f"test -h {link}; test ! -e {link}; test ! -e /run/gipam")
        machine("docker volume ls; systemctl start gipam")
        self.assert_all_is_well(machine)

    def restart_gipam(self, machine: Machine, flag: str) -> None:
        machine(f"echo GIPAM_UNIX={flag} >> /opt/gipam/.env\n"
                "systemctl reset-failed gipam docker docker.socket; systemctl restart gipam")

    def test_switching_between_socket_and_tcp_takes_one_restart(self) -> None:
        """gipam gives up the socket that systemd kept. Docker, which has its path, is stopped."""
        machine = self.shared
        stop_docker = "systemctl stop docker.socket docker"
        machine(stop_docker)
        for _ in range(3):
            for flag, has_file in (("false", "-s"), ("true", "! -e")):
                self.restart_gipam(machine, flag)
                self.assertEqual(machine.show("NRestarts"), "0")
                machine(f"test {has_file} /etc/docker/plugins/gipam.spec")

        for flag in ("false", "true"):
            self.restart_gipam(machine, flag)
            machine("systemctl start docker; docker restart -t 0 web1 lan1")
            machine.wait_for_containers()
            machine(stop_docker)
        machine("systemctl start docker")
        self.assert_all_is_well(machine)

    # Reboots.

    def assert_gipam_started_before_docker(self, machine: Machine) -> None:
        docker_start = machine.show("ExecMainStartTimestampMonotonic", "docker")
        gipam_ready = machine.show("ActiveEnterTimestampMonotonic", "gipam")
        self.assertGreater(int(docker_start), int(gipam_ready))
        self.assertEqual(machine.complaints(), [])

    def test_power_cut_brings_everything_back(self) -> None:
        machine = self.machine()
        load = Load(machine)
        machine.end()
        load.process.communicate()  # it has ended with the machine
        machine.boot(end="poweroff")
        machine.wait_for_containers()
        # gipam holds a grant of the moment of the power cut, which Docker does not know of.
        self.assert_all_is_well(machine, CHECK + " --fix")
        self.assert_gipam_started_before_docker(machine)

    def test_reboot_brings_everything_back(self) -> None:
        machine = self.machine()
        self.assert_all_is_well(machine)  # its disk comes from a poweroff
        self.assert_gipam_started_before_docker(machine)

    def test_machine_is_recognised_over_a_power_cut_and_on_a_copy_of_its_disk(self) -> None:
        """With -etcd, a machine with another identity would count as another machine."""
        machine = self.machine()
        identity = machine(READ_IDENTITY)
        in_service = f"nsenter -t {GIPAM_PID} --all --setuid 0 --setgid 0 {READ_IDENTITY}"
        # A kernel without DMI tables has no such file.
        has_product = machine("cat /sys/class/dmi/id/product_uuid 2> /dev/null || true")
        product = "[0-9a-f]{16}" if has_product else ""
        self.assertRegex(
            identity, rf"^MachineId\(machine='[0-9a-f]{{16}}', product='{product}'\)$")
        self.assertEqual(machine(in_service), identity)
        machine.end()
        machine.boot()
        self.assertEqual(machine(READ_IDENTITY), identity)
        # Another file system, with device and inode numbers of its own.
        copy = self.machine()
        self.assertEqual(copy(READ_IDENTITY), identity)

    # Restarts, crashes and hangs under load.

    def test_restarts_go_unnoticed(self) -> None:
        machine = self.machine()
        with self.load(machine) as load:
            for _ in range(DISTURBANCES):
                machine.follow("Upgrade and roll back", 0, directory="/root/gipam")
                machine("systemctl restart gipam; systemctl restart gipam")
                machine("systemctl reset-failed gipam")
                load.continue_load()
        self.assert_all_is_well(machine)
        self.assertEqual(machine.complaints(), [])

    def test_kill_fails_only_what_was_being_answered(self) -> None:
        machine = self.machine()
        with self.load(machine, LOST_BODY) as load:
            for _ in range(DISTURBANCES):
                machine(f"systemctl reset-failed gipam; kill -KILL {GIPAM_PID}")
                load.continue_load()
                self.assertEqual(machine.show("NRestarts"), "1")
        # A release may be lost, or an address be granted in a reply that nobody received.
        self.assert_all_is_well(machine, CHECK + " --fix")

    def test_hung_gipam_is_ended_by_the_watchdog(self) -> None:
        machine = self.machine()
        self.assertEqual(machine.show("WatchdogUSec"), "30s")
        machine(SHORT_WATCHDOG)
        with self.load(machine, LOST_BODY) as load:
            machine(f"kill -STOP {GIPAM_PID}")
            load.continue_load()

        log = machine.log("gipam")
        for text in ("Watchdog timeout", "most recent call first", "Failed with result 'watchdog'"):
            self.assertIn(text, log)
        self.assertEqual(machine.show("NRestarts"), "1")
        files = machine("ls /opt/gipam | grep -v leases.json")
        self.assertEqual(files, "gipam.py", "a core file?")
        self.assert_all_is_well(machine, CHECK + " --fix")

    # A damaged lease file.

    def assert_fails_once_with(self, machine: Machine, remedy: str) -> tuple[str, str]:
        """Wait until the unit has failed; return the two groups of the remedy in its message."""
        machine.wait_until("systemctl is-failed -q gipam")
        status = machine("systemctl --no-pager status gipam", 3)
        self.assertIn("status=78/CONFIG", status)
        found = re.search(remedy, status)
        assert found, status
        return found[1], found[2]

    def test_damaged_lease_file_fails_the_unit_once_and_its_message_says_the_remedy(self) -> None:
        machine = self.machine()
        machine(DAMAGE_LEASE_FILE)
        remedy = r"; or (move) (/opt/gipam/leases\.json\*) away: "
        _, path = self.assert_fails_once_with(machine, remedy)
        machine(f"mkdir -p /root/away; mv {path} /root/away; systemctl start gipam")
        self.assert_all_is_well(machine, CHECK + " --fix")

        machine(DAMAGE_JOURNAL)
        remedy = (r": (truncate -s \d+) (/opt/gipam/leases\.json\.journal\.\d+), "
                  r".* run `gipam check --fix`")
        command, path = self.assert_fails_once_with(machine, remedy)
        machine(f"{command} {path}; systemctl start gipam")
        self.assert_all_is_well(machine, CHECK + " --fix")


if __name__ == "__main__":
    sys.exit(main())
