"""Helpers of the files of the lab: how they run, the README's commands, namespaces, machines.

The lab has the tests that the self-check cannot have: with dockerd, machines that boot, long runs.
Each file beside this one uses unittest and runs by itself, as root: `python3 .ci/lab/dockerd.py`,
with -v and -k. GIPAM_SUITE=trixie has dockerd 26.1.5 and Python 3.13; GIPAM_SUITE=forky, the
default, has 28.5.2 and 3.14. A missing command is a failure here, and the text names the remedy.
Ctrl-C waits for the running test. `python3 .ci/lab/machines.py COMMAND …` runs a command in a tree,
with this checkout.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from typing import Any, Callable, NamedTuple

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from test_gipam import DEADLINE_S, GIPAM, HERE, conclude, sleeping_retry, wait_until  # noqa: E402

SUITE = os.environ.get("GIPAM_SUITE") or "forky"
# dockerd waits 15 s for each network whose plugin does not answer.
DOCKER_DEADLINE_S = 90.0

# The Debian package of a command, if it has another name.
PACKAGES = {
    "etcd": "etcd-server",
    "etcdctl": "etcd-client",
    "etcdutl": "etcd-server",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "ss": "iproute2",
    "unshare": "util-linux",
}
SYSTEM_PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# === Running ======================================================================================


def require(*commands: str) -> None:
    """Fail with the remedy unless root runs this and has these commands."""
    if os.geteuid() != 0:
        raise AssertionError("the lab needs root: run it with sudo")
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        packages = {PACKAGES.get(command, command) for command in missing}
        remedy = "apt-get install " + " ".join(sorted(packages))
        raise AssertionError(f"{', '.join(sorted(missing))}: not found: {remedy}")


def main() -> int:
    """Run the tests of the started file and print the line that CI reads. A skip is a failure."""
    result = unittest.main(module="__main__", exit=False, catchbreak=True).result
    for test, reason in result.skipped:
        print(f"skipped: {test}: {reason}")
    failed = len(result.failures) + len(result.errors) + len(result.skipped)
    return conclude(max(0, result.testsRun - failed), failed, 0)


# === The README ===================================================================================


class Block(NamedTuple):
    """A fenced block of README.md: its part and chapter, the word behind the fence, the text."""

    part: str
    chapter: str
    kind: str
    text: str

    def script(self) -> str:
        """Return its commands, to be run in the directory that the project was copied to."""
        return "cd /root/gipam\n" + self.text


HEADING_OR_BLOCK = re.compile(r"^(#+) (.*)$|^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def read_blocks() -> list[Block]:
    """Return the fenced blocks of README.md in order."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()

    blocks = []
    part = ""
    chapter = ""
    for marks, title, kind, body in HEADING_OR_BLOCK.findall(text):
        if marks:
            chapter = title
            if len(marks) <= 2:
                part = title
        else:
            blocks.append(Block(part, chapter, kind, body))
    return blocks


# === Commands, namespaces and processes ===========================================================


class CommandError(Exception):
    """A command failed; str() is the command and its error output."""


def run(*command: str, env: dict[str, str] | None = None,
        for_s: float = DOCKER_DEADLINE_S) -> str:
    """Return the output of a command. Raises: CommandError, also if it takes longer than for_s."""
    try:
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                              encoding="utf-8", timeout=for_s)
    except subprocess.TimeoutExpired as error:
        raise CommandError(str(error)) from None
    if done.returncode != 0:
        raise CommandError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def works(function: Callable[..., object], *arguments: Any) -> bool:
    """Return whether a command succeeds, for example works(docker, "version")."""
    try:
        function(*arguments)
    except CommandError:
        return False
    return True


# The first process of namespaces prints its id in the caller's /proc. It also reaps, because the
# next dockerd would wait for a dead containerd that nobody has reaped.
HOLDER = "read pid rest < /proc/self/stat; %s\necho $pid; exec env --ignore-signal=CHLD cat"


class Namespaces:
    """Namespaces of these kinds, e.g. "--net"; with "--pid" their processes end with them."""

    def __init__(self, *kinds: str, setup: str) -> None:
        require("ip", "mount", "nsenter", "unshare")
        command = ["unshare", *kinds]
        if "--pid" in kinds:
            command += ["--fork", "--kill-child"]
        self.holder = subprocess.Popen([*command, "sh", "-ec", HOLDER % setup], encoding="utf-8",
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.holder.stdout
        self.pid = self.holder.stdout.readline().strip()
        self.inside = ("nsenter", "-t", self.pid, *kinds, "--")
        if not self.pid:
            raise AssertionError("gets no namespaces: run it in a privileged container")

    def close(self) -> None:
        # The holder ends when it reads the end of its input.
        self.holder.communicate(timeout=DOCKER_DEADLINE_S)

    def run(self, *command: str, env: dict[str, str] | None = None) -> str:
        """Run a command in the namespaces and return its output. Raises: CommandError."""
        return run(*self.inside, *command, env=env)


def children(pid: str) -> list[str]:
    """Return the process ids of a process's children."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return file.read().split()


class Process:
    """A process whose output goes to a log file."""

    def __init__(self, log: str, *command: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        self.command = command
        with open(log, "ab") as file:
            self.log_start = file.tell()  # those before it have written there too
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file,
                                            stderr=file, env=env)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal unless the process has ended, and return the exit status."""
        self.send(number)
        return self.process.wait(DOCKER_DEADLINE_S)

    def send(self, number: int) -> None:
        """Send the signal unless the process has ended; `nsenter --pid` has it as its child."""
        if not self.is_running():
            return
        if "--pid" not in self.command:
            self.process.send_signal(number)
            return
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            for pid in children(str(self.process.pid)):
                os.kill(int(pid), number)

    def wait_until(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Wait until the function returns a true value; fail at once if the process ends."""
        command = " ".join(self.command)
        for _ in sleeping_retry(f"the start of {command}", DOCKER_DEADLINE_S):
            if function(*arguments):
                return
            if not self.is_running():
                raise AssertionError(f"{command} has ended:\n" + self.read_log()[-4000:])

    def read_log(self) -> str:
        """Return the output of this process, and of others in the same log since its start."""
        with open(self.log, "rb") as log:
            log.seek(self.log_start)
            return log.read().decode("utf-8", "replace")


# === Trees and sandboxes ==========================================================================


class Disk:
    """A disk that is written over others, which stay unchanged; making it takes 3 ms."""

    def __init__(self, *lower: str) -> None:
        self.disk = tempfile.mkdtemp(prefix="gipam-disk-", dir="/var/tmp")
        for name in ("upper", "work", "root"):
            os.mkdir(os.path.join(self.disk, name))
        layers = f"lowerdir={':'.join(lower)},upperdir={self.disk}/upper,workdir={self.disk}/work"
        self.mount = f"mount -t overlay overlay -o {layers} {self.disk}/root\n"


def make_tree(suite: str = SUITE) -> str:
    """Return the path of the Debian tree below the disks; it is made once."""
    require("bash", "debootstrap", "ip", "mount", "nsenter", "unshare")
    command = [os.path.join(HERE, ".ci", "tree"), suite]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return done.stdout.strip()


# A tree becomes the root. The checkout and the disk have the same paths in it as outside.
ENTER = """
cd {disk}/root; for name in dev sys; do mount --rbind /$name $name; done
mkdir -p .{here} .{disk}; mount -o bind,ro {here} .{here}; mount --bind {disk} .{disk}
mount -t proc proc proc; mount -t tmpfs tmpfs run
mkdir .old; pivot_root . .old; umount -l .old; cd /
ip link set lo up; mkdir -p /etc/docker
"""


class Sandbox(Disk):
    """Mount, network and process namespaces in a tree, where everything has its usual path.

    All of it ends with the first process of the namespaces, which ends with the test's process.
    """

    def __init__(self, suite: str = SUITE) -> None:
        super().__init__(make_tree(suite))
        self.env = {"PATH": SYSTEM_PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        setup = self.mount + ENTER.format(here=HERE, disk=self.disk)
        self.namespaces = Namespaces("--mount", "--net", "--pid", setup=setup)
        self.processes: list[Process] = []

    def close(self) -> None:
        self.namespaces.close()
        for process in self.processes:
            process.process.wait()
        shutil.rmtree(self.disk)

    def path(self, path: str) -> str:
        """Return the path outside of a path in the sandbox."""
        return f"/proc/{self.namespaces.pid}/root{path}"

    def spawn(self, *command: str) -> Process:
        """Start a process in the sandbox."""
        log = os.path.join(self.disk, command[0] + ".log")
        process = Process(log, *self.namespaces.inside, *command, env=self.env)
        self.processes.append(process)
        return process

    def run(self, *command: str) -> str:
        """Run a command in the sandbox and return its output. Raises: CommandError."""
        return self.namespaces.run(*command, env=self.env)

    def run_lines(self, lines: str) -> None:
        """Run a shell script in the sandbox. Raises: CommandError."""
        self.run("sh", "-ec", lines)


# An image with a static busybox. SIGKILL stops its containers at once: as first process busybox
# would ignore SIGTERM.
MAKE_IMAGE = """
cd $(mktemp -d); mkdir bin; cp $(command -v busybox) bin
for name in cat httpd ip nc ping sh sleep true wget; do ln -s busybox bin/$name; done
tar c . | docker import -c 'CMD ["sleep", "1000000"]' -c 'STOPSIGNAL SIGKILL' - bb; rm -r "$PWD"
"""


# === Machines that boot ===========================================================================

# The files that a user copies to a machine, as SOURCE:PATH.
SOURCES = (GIPAM, os.path.join(HERE, "gipam.env"), os.path.join(HERE, "gipam.service"))
FILES = [f"{path}:/root/gipam/{os.path.basename(path)}" for path in SOURCES]


def find_boot() -> str:
    """Return the script that boots a tree, which is beside this checkout."""
    paths = (os.path.join(HERE, "..", "shared", "boot-systemd"), "/work/shared/boot-systemd")
    for path in paths:
        if os.access(path, os.X_OK):
            return os.path.realpath(path)
    raise AssertionError(f"booting a machine needs {paths[-1]}")


ROUTER = r"""
ip link add lan type bridge mcast_snooping 0; ip link set lan up
ip addr add 192.0.2.1/24 dev lan; ip addr add 2001:db8:ffff::1/64 dev lan nodad
ip addr add 198.51.100.2/32 dev lo; ip addr add 2001:db8:eeee::2/128 dev lo
echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
mkdir -p www/cgi-bin
printf '#!/bin/sh\necho; echo $REMOTE_ADDR | sed "s/::ffff://; s/[][]//g"\n' > www/cgi-bin/who
chmod +x www/cgi-bin/who
busybox httpd -h /www
"""


class Router(Sandbox):
    """The router of machines: its bridge "lan" is their segment, its lo is the network beyond.

    It runs commands of a tree: curl, ping, radvd, bird. `ping -I 2001:db8:eeee::2 ADDRESS` comes
    from beyond. On each of its addresses, http://198.51.100.2/cgi-bin/who returns the address of
    the client.
    """

    def __init__(self, setup: str = ROUTER) -> None:
        super().__init__("forky")
        self.cables = 0
        self.run_lines(setup)

    def plug_in(self, pid: str, name: str = "eth0") -> None:
        """Give the machine of this process a device whose other end is in the bridge."""
        self.cables += 1
        cable_name = f"cable{self.cables}"
        peer = ("peer", "name", cable_name, "netns", self.namespaces.pid)
        run("nsenter", "-t", pid, "--net", "--", "ip", "link", "add", name, "type", "veth", *peer)
        self.run("ip", "link", "set", cable_name, "master", "lan", "up")

    def advertise(self, *prefixes: str) -> Process:
        """Start radvd: it announces this router, and these prefixes as on-link."""
        options = "AdvSendAdvert on; MinRtrAdvInterval 3; MaxRtrAdvInterval 4;"
        for prefix in prefixes:
            options += f"prefix {prefix} {{ }};"
        with open(self.path("/etc/radvd.conf"), "w", encoding="ascii") as file:
            file.write(f"interface lan {{ {options} }};\n")
        return self.spawn("radvd", "-n", "-C", "/etc/radvd.conf")


def cable(lines: str) -> str:
    """Return a script that installs a unit: at each boot it runs these lines once eth0 exists."""
    return f"""
printf %s {shlex.quote(lines)} > /usr/local/sbin/cable
wait="until ip link set eth0 up; do sleep 0.05; done 2> /dev/null"
printf '%s\\n' [Unit] DefaultDependencies=no After=local-fs.target \\
  Before=network-pre.target Wants=network-pre.target \\
  [Service] Type=oneshot RemainAfterExit=yes TimeoutStartSec=60 \\
  "ExecStart=bash -ec '$wait; . /usr/local/sbin/cable'" \\
  [Install] WantedBy=multi-user.target > /etc/systemd/system/cable.service
systemctl enable cable
"""


SHOW_STATE = ("docker ps -a; journalctl --no-pager -o cat -u docker -u gipam -p warning"
              " | cut -c 1-500 | tail -n 40")


class Machine(Disk):
    """A Debian machine with Docker, on a tree (`Machine(make_tree("forky"))`) or another's disk.

    With a router, each boot plugs the machine into it as eth0, and then runs the script of cable().
    """

    def __init__(self, *lower: str, router: Router | None = None) -> None:
        super().__init__(*lower)
        self.router = router
        self.process: subprocess.Popen[str] | None = None

    def boot(self, *files: str, end: str = "cut") -> None:
        """Copy files (SOURCE:PATH) and boot. The machine ends by poweroff, or as by a power cut."""
        command = ["unshare", "--mount", "--propagation", "private"]
        command += ["bash", "-ec", self.mount + 'exec "$0" "$@"']
        command += [find_boot(), f"{self.disk}/root", *files]
        command += ["--", "bash", "-c", "echo is up; read"]
        environment = dict(os.environ, BOOT_END=end)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        encoding="utf-8", env=environment)
        assert self.process.stdout
        self.plug_in(wait_until("systemd", self.find_init))
        if self.process.stdout.readline() != "is up\n":
            raise AssertionError("the machine did not boot")
        self.pid = self.find_init()

    def plug_in(self, pid: str) -> None:
        """Connect the machine that this process starts."""
        if self.router is not None:
            self.router.plug_in(pid)

    def find_init(self) -> str:
        """Return the id of the machine's first process, or "" while there is none."""
        if self.process is None:
            return ""
        with contextlib.suppress(OSError):
            for child in children(str(self.process.pid)):
                for init in children(child):
                    if os.readlink(f"/proc/{init}/exe").endswith("/systemd"):
                        return init
        return ""

    def end(self) -> None:
        if self.process is not None:
            # The command of the machine ends when it reads the end of its input.
            self.process.communicate(timeout=DOCKER_DEADLINE_S * 2)
            self.process = None

    def remove(self) -> None:
        self.end()
        shutil.rmtree(self.disk)

    def begin(self, script: str) -> subprocess.Popen[str]:
        """Start a bash script inside; it ends with the first command that fails."""
        command = ["nsenter", "-t", self.pid, "-a", "-r", "-w"]
        command += ["env", "-i", "HOME=/root", f"PATH={SYSTEM_PATH}"]
        command += ["bash", "-e", "-o", "pipefail", "-c", script]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, encoding="utf-8")

    def __call__(self, script: str, *expected: int) -> str:
        """Run a bash script inside and return its output; its status must be expected (0)."""
        process = self.begin(script)
        output = process.communicate(timeout=DEADLINE_S * 10)[0]
        status = process.returncode
        if status not in (expected or (0,)):
            raise AssertionError(f"exit status {status} of:\n{script}\n{output}")
        return output.strip()

    def follow(self, title: str, *numbers: int, directory: str = "/root") -> str:
        """Run the README's commands under this heading word for word: all, or these blocks."""
        blocks = [block.text for block in read_blocks()
                  if block.chapter == title and block.kind == "sh"]
        if numbers:
            blocks = [blocks[number] for number in numbers]
        return "\n".join([self(f"cd {directory}\n{text}") for text in blocks])

    def wait_until(self, condition: str) -> None:
        """Wait until a command succeeds; the loop runs inside, where it costs least."""
        deadline = f"{DEADLINE_S * 8:.0f}"
        give_up = f"[ $SECONDS -lt {deadline} ] || {{ {SHOW_STATE}; exit 1; }}"
        self(f"until {condition}; do {give_up}; sleep 0.1; done")

    def wait_for_containers(self) -> None:
        """Wait until all containers are running."""
        self.wait_until("[ $(docker ps -q | wc -l) = $(docker ps -aq | wc -l) ]")

    def addresses(self) -> list[str]:
        """Return all addresses of containers that Docker shows."""
        template = ("{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} "
                    "{{end}}")
        return self(f"docker inspect -f '{template}' $(docker ps -aq)").split()

    def subnets(self) -> dict[str, list[str]]:
        """Return the subnets of each network of gipam's, by its name."""
        template = "{{.IPAM.Driver}} {{.Name}} {{range .IPAM.Config}}{{.Subnet}} {{end}}"
        output = self(f"docker network inspect -f '{template}' $(docker network ls -q)")
        found = {}
        for line in output.splitlines():
            driver, name, *subnets = line.split()
            if driver == "gipam":
                found[name] = subnets
        return found

    def log(self, unit: str) -> str:
        return self(f"journalctl --no-pager -o cat -b -u {unit}")

    def complaints(self) -> list[str]:
        """Return dockerd's log lines about a plugin that it could not reach at first."""
        return re.findall("Unable to (?:connect to|locate) plugin.*", self.log("docker"))

    def show(self, name: str, unit: str = "gipam") -> str:
        """Return a property of a unit."""
        return self(f"systemctl show -p {name} --value {unit}")


def run_in_tree(*command: str) -> int:
    """Run a command in a tree, in the directory of this checkout; return its exit status."""
    with contextlib.closing(Sandbox()) as sandbox:
        environment = {**os.environ, **sandbox.env}
        inside = [*sandbox.namespaces.inside, "env", "-C", HERE]
        return subprocess.call([*inside, *command], env=environment)


if __name__ == "__main__":
    sys.exit(run_in_tree(*sys.argv[1:]))
