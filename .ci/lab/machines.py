"""What the files of the lab share: a dockerd in namespaces of its own, and how they run.

The lab shows what needs more than the self-check: dockerd, machines that boot, long runs. Each file
beside this one is unittest and runs by itself, as root: `python3 .ci/lab/dockerd.py`, with -v and -k.
What is missing is a failure here, and named with its remedy. Ctrl-C waits for the test that runs.
"""

from __future__ import annotations

import contextlib
import glob
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any, Callable, Sequence

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from test_gipam import DEADLINE_S, GIPAM, Client, UnixConnection, conclude  # noqa: E402

BASE_V4 = "10.2.0.0/16"
BASE_V6 = "2001:db8:0:100::/56"
MASQUERADE_OFF = ("-o", "com.docker.network.bridge.enable_ip_masquerade=false")
DOCKER_DEADLINE_S = 90.0  # dockerd waits 15 s for each network whose plugin does not answer
PACKAGES = {"bash": "bash", "busybox": "busybox-static", "containerd": "containerd", "debootstrap": "debootstrap",
            "docker": "docker-cli", "docker-compose": "docker-compose", "dockerd": "docker.io",
            "etcd": "etcd-server", "etcdctl": "etcd-client", "etcdutl": "etcd-server",
            "ip": "iproute2", "iptables": "iptables", "mount": "mount", "ndppd": "ndppd", "nsenter": "util-linux",
            "openssl": "openssl", "ss": "iproute2", "sysctl": "procps", "unshare": "util-linux"}


def require(*commands: str) -> None:
    """Fail, with the remedy, unless root runs this and has these commands."""
    if os.geteuid() != 0:
        raise AssertionError("the lab needs root: run it with sudo")
    missing = sorted(command for command in commands if shutil.which(command) is None)
    if missing:
        packages = " ".join(sorted({PACKAGES[command] for command in missing}))
        raise AssertionError(f"{', '.join(missing)}: not found: apt-get install {packages}")


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Return the first true value of condition()."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s:g} s in vain: {what}")
        time.sleep(0.05)


# === Running ======================================================================================


class Result(unittest.TextTestResult):
    """Counts what passed; what is skipped fails."""

    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.failures.append((test, "skipped: " + reason))


def main() -> int:
    """Run the tests of the file that was started, and close with the line that CI reads."""
    kind: Any = Result
    runner = unittest.TextTestRunner(resultclass=kind, verbosity=1 + ("-v" in sys.argv))
    result = unittest.main(module="__main__", exit=False, catchbreak=True, testRunner=runner).result
    assert isinstance(result, Result)
    return conclude(result.passed, len(result.failures) + len(result.errors), 0)


# === dockerd ======================================================================================
#
# One dockerd and one gipam live in mount, network and process namespaces of their own, with a
# private /run and /etc/docker: everything has its usual path there, several runs do not meet, and
# all of it ends with the namespaces' first process, which ends with the test's.

FIRST_PROCESS = """
import os, signal, subprocess, sys
print(os.readlink("/proc/self"), flush=True)  # in the /proc of the caller: our pid as they see it
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass  # a dead containerd that nobody waits for would block the next dockerd
    except ChildProcessError:
        pass
os.makedirs("/etc/docker", exist_ok=True)
for command in ("mount -t proc proc /proc", "mount -t tmpfs tmpfs /run",
                "mount -t tmpfs tmpfs /etc/docker", "ip link set lo up"):
    subprocess.check_call(command.split())
signal.signal(signal.SIGCHLD, reap)
print("ready", flush=True)
sys.stdin.read()
"""


# An image with a static busybox. SIGKILL stops its containers at once: as first process busybox would
# ignore SIGTERM.
MAKE_IMAGE = """
cd $(mktemp -d); mkdir bin; cp $(command -v busybox) bin
for name in cat httpd ip nc ping sh sleep true; do ln -s busybox bin/$name; done
tar c . | docker import -c 'CMD ["sleep", "1000000"]' -c 'STOPSIGNAL SIGKILL' - bb; rm -r "$PWD"
"""


class DockerError(Exception):
    """A command failed, most often docker; str() is what it said."""


class Inside:
    """A process in the namespaces; nsenter waits for it and ends as it ends."""

    def __init__(self, docker: Docker, name: str, *command: str) -> None:
        self.docker = docker
        self.log = os.path.join(docker.directory, name + ".log")
        self.pid_file = os.path.join(docker.directory, name + ".pid")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                docker.entering("sh", "-c", 'echo $$ > "$0"; exec "$@"', self.pid_file, *command),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=docker.env)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal, unless it has ended, and return the exit status."""
        if self.is_running():
            with contextlib.suppress(DockerError):  # it has ended just now
                self.docker.run("sh", "-c", f"kill -{number:d} $(cat {self.pid_file})")
        return self.process.wait(DOCKER_DEADLINE_S)

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Wait for the condition; fail at once if the process ends before."""
        with contextlib.suppress(AssertionError):
            until(lambda: condition() or not self.is_running(), "start", DOCKER_DEADLINE_S)
            if self.is_running():
                return
        raise AssertionError("it did not come up:\n" + self.read_log()[-4000:])

    def read_log(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()


class Docker:
    """One dockerd and one gipam in namespaces of their own."""

    def __init__(self, *options: str) -> None:
        """Make the namespaces; options are gipam's, beside its lease file, and its bases unless they say others."""
        require("busybox", "containerd", "docker", "dockerd", "ip", "iptables", "mount", "nsenter", "unshare")
        self.directory = tempfile.mkdtemp(prefix="gipam-docker-")
        self.leases = os.path.join(self.directory, "leases.json")
        self.gipam_options = ("-v6", BASE_V6, "-v4", BASE_V4, "-file", self.leases, *options)
        self.env = {name: value for name, value in os.environ.items()
                    if not name.startswith(("DOCKER_", "GIPAM_"))}
        self.first = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child",
             sys.executable, "-c", FIRST_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.first.stdin and self.first.stdout
        self.pid, is_ready = (self.first.stdout.readline().decode().strip() for _ in range(2))
        if not is_ready:
            raise AssertionError("gets no namespaces: run it on a host or in a privileged container")
        self.containerd = Inside(self, "containerd", "containerd", "--config", "/dev/null",
                                 "--root", os.path.join(self.directory, "containerd"))
        self.containerd.wait_until(lambda: os.path.exists(self.path("/run/containerd/containerd.sock")))
        self.dockerd: Inside | None = None
        self.gipam: Inside | None = None
        self.wires = 0

    def close(self) -> None:
        assert self.first.stdin and self.first.stdout
        self.first.stdin.close()  # the first process ends, and the kernel kills all others
        self.first.wait()
        self.first.stdout.close()
        for process in (self.containerd, self.dockerd, self.gipam):
            if process is not None:
                process.process.wait()
        name = os.path.basename(self.directory)
        for top in glob.glob(f"/sys/fs/cgroup/{name}") + glob.glob(f"/sys/fs/cgroup/*/{name}"):
            for path, _, _ in os.walk(top, topdown=False):
                os.rmdir(path)
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- the namespaces

    def path(self, path: str) -> str:
        """Return how a path in the namespaces is called outside."""
        return f"/proc/{self.pid}/root{path}"

    def entering(self, *command: str) -> list[str]:
        return ["nsenter", "-t", self.pid, "-m", "-n", "-p", "--", *command]

    def run(self, *command: str) -> str:
        """Run a command in the namespaces and return what it prints. Raises: DockerError."""
        done = subprocess.run(self.entering(*command), env=self.env, encoding="utf-8",
                              capture_output=True, timeout=DOCKER_DEADLINE_S)
        if done.returncode != 0:
            raise DockerError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def run_lines(self, lines: str) -> None:
        for line in lines.strip().splitlines():
            self.run(*line.split())

    def wire(self) -> tuple[str, str]:
        """Make two connected interfaces, parents for macvlan networks."""
        self.wires += 1
        near, far = f"wire{self.wires}a", f"wire{self.wires}b"
        self.run_lines(f"ip link add {near} type veth peer name {far}\nip link set {near} up\nip link set {far} up")
        return near, far

    # -- dockerd and gipam

    def start_dockerd(self, *options: str, wait: bool = True) -> None:
        self.dockerd = Inside(
            self, "dockerd", "dockerd", "--data-root", os.path.join(self.directory, "data"),
            "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent",
            "/" + os.path.basename(self.directory), *options)
        if wait:
            self.wait_for_dockerd()

    def wait_for_dockerd(self) -> None:
        assert self.dockerd is not None
        self.dockerd.wait_until(lambda: self.is_answering("/run/docker.sock"))
        if "bb" not in self("images", "--format", "{{.Repository}}").split():
            self.run("sh", "-ec", MAKE_IMAGE)

    def is_answering(self, socket: str) -> bool:
        try:
            return bool(self.get("/_ping", socket))  # whatever it says
        except OSError:
            return False

    def start_gipam(self, *variables: str) -> None:
        self.gipam = Inside(self, "gipam", "env", *variables, sys.executable, GIPAM, *self.gipam_options)
        self.gipam.wait_until(lambda: self.is_answering("/run/docker/plugins/gipam.sock") if "-unix" in self.gipam_options
                              else os.path.exists(self.path("/etc/docker/plugins/gipam.spec")))

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs e.g. `gipam.py check` inside."""
        return self.entering(sys.executable, GIPAM, *self.gipam_options, *arguments)

    def run_gipam(self, *arguments: str) -> str:
        """Return what a command of gipam's prints inside."""
        return subprocess.check_output(self.command(*arguments), env=self.env, encoding="utf-8", timeout=DOCKER_DEADLINE_S)

    def check(self, *arguments: str, grace_s: int = 0) -> list[str]:
        """Return what `check` finds, as "kind: text", sorted; its exit status must agree."""
        done = subprocess.run(self.command("check", "--json", "--grace", str(grace_s), *arguments), env=self.env,
                              stdout=subprocess.PIPE, encoding="utf-8", timeout=DOCKER_DEADLINE_S)
        findings = json.loads(done.stdout)["findings"]
        if done.returncode != int(not all(finding["is_fixed"] for finding in findings)):
            raise AssertionError(f"check ends with {done.returncode} and finds {findings}")
        return sorted(f"{finding['kind']}: {finding['text']}" for finding in findings)

    def client(self, test: unittest.TestCase) -> Client:
        """Return one that asks gipam as dockerd does."""
        client = Client(self.path("/run/docker/plugins/gipam.sock"))
        test.addCleanup(client.close)
        return client

    def stop(self, *names: str, number: int = signal.SIGTERM) -> None:
        """End "dockerd", "gipam" or both with the signal."""
        for name in names:
            getattr(self, name).stop(number)

    def start(self) -> None:
        """Start what does not run: gipam first, as it is at boot."""
        if self.gipam is None or not self.gipam.is_running():
            self.start_gipam()
        if self.dockerd is None or not self.dockerd.is_running():
            self.start_dockerd()

    def kill_and_start(self) -> None:
        self.stop("gipam", "dockerd", number=signal.SIGKILL)
        self.start()

    def replace_lease_file(self, text: str = "", *variables: str, number: int = signal.SIGTERM) -> None:
        """Put another in its place, or nothing, while gipam is down."""
        self.stop("gipam", number=number)
        for name in glob.glob(self.leases + "*"):
            os.unlink(name)
        if text:
            with open(self.leases, "w", encoding="utf-8") as file:
                file.write(text)
        self.start_gipam(*variables)

    def read_lease_file(self) -> str:
        """Return it as an operator would copy it: gipam is down meanwhile, so that all is in it."""
        self.stop("gipam")
        with open(self.leases, encoding="utf-8") as file:
            text = file.read()
        self.start_gipam()
        return text

    # -- the docker command

    def cli(self, *arguments: str) -> list[str]:
        return ["docker", "-H", "unix://" + self.path("/run/docker.sock"), *arguments]

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a docker command without waiting for it."""
        return subprocess.Popen(self.cli(*arguments), stdin=subprocess.DEVNULL, env=self.env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")

    def end(self, command: subprocess.Popen[str]) -> str:
        """Return what it printed. Raises: DockerError."""
        out, err = command.communicate(timeout=DOCKER_DEADLINE_S)
        if command.returncode != 0:
            raise DockerError(err.strip())
        return out.strip()

    def __call__(self, *arguments: str) -> str:
        """Run e.g. docker("network", "create", ...). Raises: DockerError."""
        return self.end(self.begin(*arguments))

    def at_once(self, *commands: Sequence[str]) -> None:
        """Run docker commands side by side. Raises: DockerError."""
        for command in [self.begin(*words) for words in commands]:
            self.end(command)

    def inspect(self, kind: str, *names: str) -> list[dict[str, Any]]:
        return list(json.loads(self(kind, "inspect", *names))) if names else []

    def network(self, name: str, *options: str, containers: Sequence[str] = ()) -> None:
        """Create a network of gipam's, and start containers on it."""
        self("network", "create", "--ipam-driver", "gipam", *options, name)
        for container in containers:
            self.container(container, name)

    def container(self, name: str, network: str, *options: str) -> None:
        self("run", "-d", "--name", name, "--network", network, *options, "bb")

    def endpoint(self, container: str, network: str) -> dict[str, Any]:
        return dict(self.inspect("container", container)[0]["NetworkSettings"]["Networks"][network])

    def address(self, container: str, network: str, v6: bool = False) -> str:
        """Return the container's address as docker shows it; "" for none."""
        return str(self.endpoint(container, network)["GlobalIPv6Address" if v6 else "IPAddress"])

    def running_addresses(self) -> list[str]:
        """Return every address of every running container, doubles included, in CIDR form."""
        running = self.inspect("container", *self("ps", "-q").split())
        return [cidr for container in running for cidr in endpoint_addresses(container)]

    def subnets(self, *networks: str) -> list[str]:
        return [config["Subnet"] for network in self.inspect("network", *networks)
                for config in network["IPAM"]["Config"] or []]

    def remove_everything(self) -> None:
        self.start()
        containers = self("ps", "-aq").split()
        if containers:
            self("rm", "-f", *containers)
        networks = self("network", "ls", "-q", "--filter", "type=custom").split()
        for network in sorted(self.inspect("network", *networks), key=lambda it: it["ConfigOnly"]):
            self("network", "rm", network["Id"])

    # -- what each side believes: subnet -> addresses held in it

    def get(self, path: str, socket: str) -> bytes:
        """Return a page of dockerd's or gipam's."""
        connection = UnixConnection(self.path(socket), timeout_s=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def pools(self) -> list[dict[str, Any]]:
        """Return what gipam holds, by its command: a TCP socket cannot be reached from outside."""
        return list(json.loads(self.run_gipam("status", "--json", "--leases"))["pools"])

    def held_by_gipam(self) -> dict[str, set[str]]:
        held: dict[str, set[str]] = {}
        for pool in self.pools():
            held.setdefault(pool["subnet"], set()).update(lease["address"] for lease in pool["addresses"])
        return held

    def held_by_docker(self) -> tuple[dict[str, set[str]], dict[str, int]]:
        """Return Docker's view, and by subnet how many gateways it holds but does not show."""
        held: dict[str, set[str]] = {}
        hidden: dict[str, int] = {}
        for network in self.inspect("network", *self("network", "ls", "-q").split()):
            if network["IPAM"]["Driver"] != "gipam" or network["ConfigOnly"]:
                continue
            shown = self.interface_addresses(network)
            for config in network["IPAM"]["Config"] or []:
                subnet = ipaddress.ip_network(config["Subnet"])
                if subnet.network_address.is_unspecified or (subnet.version == 6 and not network["EnableIPv6"]):
                    continue  # what was asked for; what is not used
                shown += config_addresses(config)
                held.setdefault(str(subnet), set())
                if network["Driver"] != "bridge" and not config.get("Gateway"):
                    hidden[str(subnet)] = hidden.get(str(subnet), 0) + 1
            for endpoint in network["Containers"].values():
                shown += [endpoint["IPv4Address"], endpoint["IPv6Address"]]
            for cidr in filter(None, shown):
                interface = ipaddress.ip_interface(cidr)
                held.setdefault(str(interface.network), set()).add(str(interface.ip))
        return held, hidden

    def interface_addresses(self, network: dict[str, Any]) -> list[str]:
        """Return the gateways of a bridge network, which the kernel knows best."""
        if network["Driver"] != "bridge":
            return []
        name = network["Options"].get("com.docker.network.bridge.name", "br-" + network["Id"][:12])
        return addresses_of(self.run("ip", "-j", "addr", "show", name))[0]

    def disagreements(self) -> list[str]:
        """Return each difference between what Docker, gipam and the containers' kernels believe."""
        held, (used, hidden) = self.held_by_gipam(), self.held_by_docker()
        found = [f"only gipam has {subnet}" for subnet in sorted(set(held) - set(used))]
        found += [f"only docker has {subnet}" for subnet in sorted(set(used) - set(held))]
        for subnet in sorted(set(held) & set(used)):
            missing, extra = sorted(used[subnet] - held[subnet]), sorted(held[subnet] - used[subnet])
            if missing:
                found.append(f"{subnet}: gipam lacks {missing}")
            if len(extra) != hidden.get(subnet, 0):
                found.append(f"{subnet}: only gipam has {extra}")
        running = self.inspect("container", *self("ps", "-q").split())
        pids = [str(container["State"]["Pid"]) for container in running]
        script = 'for pid; do nsenter -t "$pid" -n ip -j addr show; done'
        kernel = addresses_of(self.run("sh", "-c", script, "sh", *pids))
        return found + [f"{container['Name']} has {have}, docker says {expected}"
                        for container, have in zip(running, kernel)
                        for expected in [endpoint_addresses(container)] if have != expected]


def config_addresses(config: dict[str, Any]) -> list[str]:
    """Return the gateway and the auxiliary addresses that a network shows, in CIDR form."""
    prefixlen = config["Subnet"].split("/")[1]
    bare = [config.get("Gateway") or "", *(config.get("AuxiliaryAddresses") or {}).values()]
    return [f"{address.split('/')[0]}/{prefixlen}" for address in bare if address]


def addresses_of(text: str) -> list[list[str]]:
    """Return the global addresses in each line of `ip -j addr`, sorted."""
    found = []
    for line in text.splitlines():
        infos = [info for interface in json.loads(line) for info in interface.get("addr_info", [])]
        found.append(sorted(f"{info['local']}/{info['prefixlen']}"
                            for info in infos if info["scope"] == "global"))
    return found


def endpoint_addresses(container: dict[str, Any]) -> list[str]:
    """Return what `docker inspect` shows as a container's addresses, in CIDR form, sorted."""
    return sorted(f"{settings[address]}/{settings[prefixlen]}"
                  for settings in container["NetworkSettings"]["Networks"].values()
                  for address, prefixlen in (("IPAddress", "IPPrefixLen"),
                                             ("GlobalIPv6Address", "GlobalIPv6PrefixLen"))
                  if settings[address])


class DockerCase(unittest.TestCase):
    """The tests of a class share one dockerd and one gipam; each leaves nothing behind."""

    maxDiff = None
    options: tuple[str, ...] = ("-unix",)
    docker: Docker

    @classmethod
    def setUpClass(cls) -> None:
        cls.docker = Docker(*cls.options)
        cls.addClassCleanup(cls.docker.close)

    def setUp(self) -> None:
        self.docker.start()
        self.addCleanup(self.leave_nothing_behind)
        until(self.is_import_done, "import")  # of the first start, else it would meet the test

    def is_import_done(self) -> bool:
        with open(self.docker.leases, encoding="utf-8") as file:
            return "Import" not in json.load(file)

    def leave_nothing_behind(self) -> None:
        self.docker.remove_everything()
        left_over = self.docker.held_by_gipam()
        if left_over:  # it shall not fail the next test too
            self.docker.replace_lease_file()
        self.assertEqual(left_over, {}, "left over after the last network rm")

    def assert_agreement(self, addresses: int | None = None) -> None:
        """Docker, gipam and the kernel agree, as soon as the last releases are through.

        No container or bridge has an address of another; running containers have so many.
        """
        with contextlib.suppress(AssertionError):
            until(lambda: not self.docker.disagreements(), "agreement", 10)
        self.assertEqual(self.docker.disagreements(), [])
        self.assertEqual(self.docker.check(), [])
        self.assert_no_address_is_twice(addresses)

    def assert_no_address_is_twice(self, addresses: int | None = None) -> None:
        found = self.docker.running_addresses()
        self.assertEqual(len(found), len(found) if addresses is None else addresses, found)
        bridges = self.docker("network", "ls", "-q", "-f", "driver=bridge", "-f", "type=custom").split()
        for network in self.docker.inspect("network", *bridges):
            found += self.docker.interface_addresses(network)
        found = [cidr.split("/")[0] for cidr in found]
        self.assertEqual(sorted(found), sorted(set(found)))

    def assert_found_and_mended(self, *findings: str) -> None:
        """`check` finds exactly these; --fix mends them, a second check is clean; Docker agrees."""
        self.assertEqual(self.docker.check(), sorted(findings))
        self.assertEqual(self.docker.check("--fix"), sorted(findings))
        self.assert_agreement()

    def assert_refused(self, words: str, *arguments: str) -> None:
        with self.assertRaises(DockerError) as caught:
            self.docker(*arguments)
        self.assertIn(words, str(caught.exception))

    def assert_reaches(self, container: str, address: str) -> None:
        def has_answered() -> bool:
            try:
                self.docker("exec", container, "ping", "-c", "1", "-W", "1", address)
            except DockerError:
                return False
            return True
        until(has_answered, f"{container} reaches {address}")
