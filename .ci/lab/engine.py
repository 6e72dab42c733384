"""dockerd and gipam in a sandbox, and the base class of the tests that use them."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import signal
import subprocess
import unittest
from typing import Any, Sequence

from machines import (
    DOCKER_DEADLINE_S,
    MAKE_IMAGE,
    SUITE,
    CommandError,
    Process,
    Sandbox,
    works,
)

from test_gipam import GIPAM, connect, sleeping_retry, wait_until

BASE_V4 = "10.2.0.0/16"
BASE_V6 = "2001:db8:0:100::/56"
SOCKET = "/run/docker/plugins/gipam.sock"
VERSIONS = {"trixie": 26, "forky": 28}
DOCKER = VERSIONS[SUITE]
BRIDGE = "com.docker.network.bridge."
ROUTED = ["-o", BRIDGE + "enable_ip_masquerade=false"]
if DOCKER >= 27:
    ROUTED = ["-o", BRIDGE + "gateway_mode_ipv4=routed",
              "-o", BRIDGE + "gateway_mode_ipv6=routed"]

ENDPOINT_KEYS = (
    ("IPAddress", "IPPrefixLen"),
    ("GlobalIPv6Address", "GlobalIPv6PrefixLen"),
)

# Prints a line of JSON for the bridges, and one for the network namespace of each process.
PRINT_ADDRESSES = """
ip -j addr show type bridge
for pid; do nsenter -t "$pid" -n ip -j addr; done
"""


def endpoint_addresses(container: dict[str, Any]) -> list[str]:
    """Return the addresses that `docker inspect` shows for a container, in CIDR form, sorted."""
    found = []
    for endpoint in container["NetworkSettings"]["Networks"].values():
        for address_key, length_key in ENDPOINT_KEYS:
            if endpoint[address_key]:
                found.append(f"{endpoint[address_key]}/{endpoint[length_key]}")
    return sorted(found)


def global_addresses(interfaces: list[dict[str, Any]]) -> list[str]:
    """Return the addresses in the output of `ip -j addr`, sorted CIDR texts, without docker0's."""
    found = []
    for interface in interfaces:
        if interface.get("ifname", "docker").startswith("docker"):
            continue
        for info in interface["addr_info"]:
            if info["scope"] == "global":
                found.append(f"{info['local']}/{info['prefixlen']}")
    return sorted(found)


class Docker(Sandbox):
    """One dockerd and one gipam in a sandbox."""

    def __init__(self, *options: str) -> None:
        """Make the sandbox; options are added to gipam's, e.g. other bases."""
        super().__init__()
        self.options = options
        self.leases = os.path.join(self.disk, "leases.json")
        self.dockerd: Process | None = None
        self.gipam: Process | None = None
        self.wires = 0
        root = self.disk + "/containerd"
        containerd = self.spawn("containerd", "--config", "/dev/null", "--root", root)
        socket = self.path("/run/containerd/containerd.sock")
        containerd.wait_until(os.path.exists, socket)

    def close(self) -> None:
        name = os.path.basename(self.disk)
        super().close()
        tops = glob.glob(f"/sys/fs/cgroup/{name}")
        tops += glob.glob(f"/sys/fs/cgroup/*/{name}")
        for top in tops:
            for path, _, _ in os.walk(top, topdown=False):
                os.rmdir(path)

    def wire(self) -> tuple[str, str]:
        """Make two connected interfaces, parents for macvlan networks."""
        self.wires += 1
        near = f"wire{self.wires}a"
        far = f"wire{self.wires}b"
        self.run_lines(f"""
ip link add {near} type veth peer name {far}
ip link set {near} up
ip link set {far} up
""")
        return near, far

    # Starting and stopping dockerd and gipam.

    def start_dockerd(self, *options: str, wait: bool = True) -> None:
        name = os.path.basename(self.disk)
        self.dockerd = self.spawn("dockerd", "--data-root", self.disk + "/data",
                                  "--exec-opt", "native.cgroupdriver=cgroupfs",
                                  "--cgroup-parent", "/" + name, *options)
        if wait:
            self.wait_for_dockerd()

    def wait_for_dockerd(self) -> None:
        assert self.dockerd is not None
        self.dockerd.wait_until(works, self, "version")
        if "bb" not in self("images", "--format", "{{.Repository}}").split():
            self.run_lines(MAKE_IMAGE)

    def is_gipam_serving(self) -> bool:
        try:
            connect(self.path(SOCKET)).close()
        except OSError:
            return False
        return True

    def start_gipam(self, *variables: str) -> None:
        self.gipam = self.spawn("env", *variables, *self.command())
        self.gipam.wait_until(self.is_gipam_serving)

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of gipam, e.g. of `gipam.py check`."""
        bases = ("-v6", BASE_V6, "-v4", BASE_V4)
        command = ["python3", GIPAM, *bases, "-file", self.leases, "-unix"]
        return [*command, *self.options, *arguments]

    def check(self, *arguments: str, grace_s: int = 0) -> list[str]:
        """Return the findings of `check`, as "kind: text", sorted; its exit status must agree."""
        command = self.command("check", "--json", "--grace", str(grace_s), *arguments)
        done = subprocess.run(
            [*self.namespaces.inside, *command], stdout=subprocess.PIPE,
            env=self.env, encoding="utf-8", timeout=DOCKER_DEADLINE_S)
        findings = json.loads(done.stdout)["findings"]
        expected = 0 if all(finding["is_fixed"] for finding in findings) else 1
        if done.returncode != expected:
            raise AssertionError(f"check ends with {done.returncode} and finds {findings}")
        return sorted([f"{finding['kind']}: {finding['text']}" for finding in findings])

    def stop(self, *names: str, number: int = signal.SIGTERM) -> None:
        """Stop "dockerd", "gipam" or both with the signal."""
        for name in names:
            getattr(self, name).stop(number)

    def start(self) -> None:
        """Start dockerd and gipam if they do not run, gipam first, as at boot."""
        if self.gipam is None or not self.gipam.is_running():
            self.start_gipam()
        if self.dockerd is None or not self.dockerd.is_running():
            self.start_dockerd()

    def kill_and_start(self) -> None:
        self.stop("gipam", "dockerd", number=signal.SIGKILL)
        self.start()

    def replace_lease_file(self, text: str = "", *variables: str,
                           number: int = signal.SIGTERM) -> None:
        """Restart gipam with another lease file, or with none."""
        self.stop("gipam", number=number)
        for name in glob.glob(self.leases + "*"):
            os.unlink(name)
        if text:
            with open(self.leases, "w", encoding="utf-8") as file:
                file.write(text)
        self.start_gipam(*variables)

    def read_lease_file(self) -> str:
        """Return the complete lease file, as a copy made while gipam is stopped."""
        self.stop("gipam")
        with open(self.leases, encoding="utf-8") as file:
            text = file.read()
        self.start_gipam()
        return text

    # The docker command.

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a docker command without waiting for it."""
        return subprocess.Popen(
            [*self.namespaces.inside, "docker", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self.env, encoding="utf-8")

    def end(self, command: subprocess.Popen[str]) -> str:
        """Return the output of a command. Raises: CommandError."""
        output, error = command.communicate(timeout=DOCKER_DEADLINE_S)
        if command.returncode != 0:
            raise CommandError(error.strip())
        return output.strip()

    def __call__(self, *arguments: str) -> str:
        """Run e.g. docker("network", "create", ...). Raises: CommandError."""
        return self.end(self.begin(*arguments))

    def at_once(self, *commands: Sequence[str]) -> None:
        """Run docker commands side by side. Raises: CommandError."""
        processes = [self.begin(*words) for words in commands]
        for process in processes:
            self.end(process)

    def inspect(self, kind: str, *names: str) -> list[dict[str, Any]]:
        if not names:
            return []
        return list(json.loads(self(kind, "inspect", *names)))

    def network(self, name: str, *options: str, containers: Sequence[str] = ()) -> None:
        """Create a network of gipam's, and start containers on it."""
        self("network", "create", "--ipam-driver", "gipam", *options, name)
        for container in containers:
            self.container(container, name)

    def container(self, name: str, network: str, *options: str) -> None:
        self("run", "-d", "--name", name, "--network", network, *options, "bb")

    def endpoint(self, container: str, network: str) -> dict[str, Any]:
        inspected = self.inspect("container", container)[0]
        return dict(inspected["NetworkSettings"]["Networks"][network])

    def address(self, container: str, network: str, v6: bool = False) -> str:
        """Return the container's address that docker shows, or ""."""
        key = "GlobalIPv6Address" if v6 else "IPAddress"
        return str(self.endpoint(container, network)[key])

    def running(self) -> list[dict[str, Any]]:
        """Return the running containers; `ps` shows one that has just stopped, which has no pid."""
        ids = self("ps", "-q").split()
        running = []
        for container in self.inspect("container", *ids):
            if container["State"]["Pid"]:
                running.append(container)
        return running

    def running_addresses(self) -> list[str]:
        """Return every address of every running container, duplicates included, in CIDR form."""
        found = []
        for container in self.running():
            found += endpoint_addresses(container)
        return found

    def subnets(self, *networks: str) -> list[str]:
        found = []
        for network in self.inspect("network", *networks):
            configs = network["IPAM"]["Config"] or []
            found += [config["Subnet"] for config in configs]
        return found

    def remove_everything(self) -> None:
        """Remove all containers and networks; a network goes before the one it was copied from."""
        self.start()
        containers = self("ps", "-aq").split()
        if containers:
            self("rm", "-f", *containers)
        names = self("network", "ls", "-q", "--filter", "type=custom").split()
        networks = self.inspect("network", *names)
        for network in sorted(networks, key=lambda network: network["ConfigOnly"]):
            self("network", "rm", network["Id"])

    # Addresses that gipam, Docker and the kernel hold.

    def pools(self) -> list[dict[str, Any]]:
        """Return gipam's pools, by its command, since its TCP socket is inside the sandbox."""
        output = self.run(*self.command("status", "--json", "--leases"))
        return list(json.loads(output)["pools"])

    def held_by_gipam(self) -> dict[str, set[str]]:
        """Return the addresses that gipam holds, by subnet."""
        held: dict[str, set[str]] = {}
        for pool in self.pools():
            addresses = held.setdefault(pool["subnet"], set())
            addresses.update(lease["address"] for lease in pool["addresses"])
        return held

    def kernel_addresses(self, containers: list[dict[str, Any]]) -> list[list[str]]:
        """Return the addresses of the bridges, then of each container, sorted, in CIDR form."""
        pids = [str(container["State"]["Pid"]) for container in containers]
        output = self.run("sh", "-ec", PRINT_ADDRESSES, "sh", *pids)
        return [global_addresses(json.loads(line)) for line in output.splitlines()]

    def disagreements(self) -> list[str]:
        """Return each difference between the kernel's addresses, Docker's and gipam's."""
        running = self.running()
        bridges, *containers = self.kernel_addresses(running)
        in_containers: set[str] = set()
        differences = []
        for container, addresses in zip(running, containers):
            in_containers.update(addresses)
            shown = endpoint_addresses(container)
            if shown != addresses:
                differences.append(f"docker shows {shown} where the kernel has {addresses}")

        held = set()
        for pool in self.pools():
            prefixlen = pool["subnet"].split("/")[1]
            for lease in pool["addresses"]:
                cidr = f"{lease['address']}/{prefixlen}"
                held.add(cidr)
                if lease["kind"] == "endpoint" and cidr not in in_containers:
                    differences.append(f"only gipam has {cidr}")

        missing = in_containers.union(bridges) - held
        differences += [f"gipam lacks {cidr}" for cidr in sorted(missing)]
        return differences


class DockerCase(unittest.TestCase):
    """The tests of a class share one dockerd and one gipam; each test removes all that it made."""

    maxDiff = None
    options: tuple[str, ...] = ()
    docker: Docker

    @classmethod
    def setUpClass(cls) -> None:
        cls.docker = Docker(*cls.options)
        cls.addClassCleanup(cls.docker.close)

    def setUp(self) -> None:
        self.docker.start()
        self.addCleanup(self.leave_nothing_behind)
        # The import of the first start would otherwise run during the test.
        wait_until("the end of the import", self.is_import_done)

    def is_import_done(self) -> bool:
        assert self.docker.gipam is not None
        return " compared with Docker: " in self.docker.gipam.read_log()

    def leave_nothing_behind(self) -> None:
        self.docker.remove_everything()
        left_over = self.docker.held_by_gipam()
        if left_over:
            # Otherwise the next test would fail too.
            self.docker.replace_lease_file()
        self.assertEqual(left_over, {}, "left over after the last network rm")

    def assert_agreement(self, addresses: int | None = None) -> None:
        """Wait until Docker, gipam and the kernel agree, once the last releases have arrived.

        `check` compares networks, the kernel shows the addresses in use. No container or bridge
        has an address of another; the running containers have this number of addresses.
        """
        with contextlib.suppress(AssertionError):
            for _ in sleeping_retry("agreement", 10):
                if not self.docker.disagreements():
                    break
        self.assertEqual(self.docker.disagreements(), [])
        self.assertEqual(self.docker.check(), [])
        self.assert_no_address_is_twice(addresses)

    def assert_no_address_is_twice(self, addresses: int | None = None) -> None:
        bridges, *containers = self.docker.kernel_addresses(self.docker.running())
        found = list(itertools.chain(*containers))
        if addresses is not None:
            self.assertEqual(len(found), addresses, found)
        bare = sorted([cidr.split("/")[0] for cidr in found + bridges])
        self.assertEqual(bare, sorted(set(bare)))

    def assert_found_and_fixed(self, *findings: str) -> None:
        """Check that `check` has exactly these findings and --fix fixes them; then all agree."""
        self.assertEqual(self.docker.check(), sorted(findings))
        self.assertEqual(self.docker.check("--fix"), sorted(findings))
        self.assert_agreement()

    def assert_refused(self, words: str, *arguments: str) -> None:
        with self.assertRaises(CommandError) as caught:
            self.docker(*arguments)
        self.assertIn(words, str(caught.exception))

    def assert_reaches(self, container: str, address: str) -> None:
        ping = ("exec", container, "ping", "-c", "1", "-W", "1", address)
        wait_until(f"{container} to reach {address}", works, self.docker, *ping)
