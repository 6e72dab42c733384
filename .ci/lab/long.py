"""The self-check for longer, a soak, full and read-only disks: `python3 .ci/lab/long.py`.

GIPAM_LONG=1 makes test_gipam.py repeat its random tests more often.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

from machines import Namespaces, main

from gipam import State
from test_gipam import (
    HERE,
    ErrorReply,
    Load,
    StoreCase,
    Tenant,
    choose_seeds,
    dump_state,
    held,
    recover,
)

SOAK_S = 120.0
CHECKPOINT_OFTEN = "gipam.MIN_CHECKPOINT_BYTES = 2000; gipam.CHECKPOINT_RETRY_S = 0.01"


class SelfCheckTest(unittest.TestCase):
    def test_self_check_passes_for_longer(self) -> None:
        command = [sys.executable, os.path.join(HERE, "test_gipam.py")]
        done = subprocess.run(command, env=dict(os.environ, GIPAM_LONG="1"), encoding="utf-8",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout)


class SmallDiskTest(StoreCase):
    """A gipam process on a small tmpfs, which is mounted in a namespace."""

    def setUp(self) -> None:
        super().setUp()
        disk = os.path.join(self.directory, "disk")
        os.mkdir(disk)
        namespaces = Namespaces("--mount", setup=f"mount -t tmpfs -o size=64k tmpfs {disk}")
        self.addCleanup(namespaces.close)
        self.inside = namespaces.inside
        self.disk = f"/proc/{namespaces.pid}/root{disk}"  # path outside the namespace
        self.served = self.daemon("-v4", "10.2.0.0/16", "-file", f"{disk}/leases.json",
                                  inside=self.inside)

    def fill(self) -> None:
        """Fill the disk to the last byte."""
        path = f"{self.disk}/filler"
        with open(path, "ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(512))

    def request_until_full(self, tenant: Tenant) -> str:
        """Request addresses until the last page of the journal is full; return the error."""
        pool_id = next(iter(tenant.pools))
        for _ in range(1000):
            try:
                tenant.request_address(pool_id)
            except ErrorReply as error:
                self.assertEqual(error.status, 503)
                return str(error)
        raise AssertionError("the disk is not full")

    def recover(self) -> State:
        """Return the state that a restart would recover: of a copy, since the files are locked."""
        with tempfile.TemporaryDirectory() as directory:
            for path in glob.glob(f"{self.disk}/leases.json*"):
                shutil.copy(path, directory)
            return recover(f"{directory}/leases.json")

    def assert_recovers_what_is_held(self, tenant: Tenant) -> None:
        self.assertEqual(held(self.recover()), tenant.held())

    def test_full_disk_costs_errors_and_no_lease(self) -> None:
        tenant = Tenant(self.served.start().client(), random.Random(1))
        pool_id, _ = tenant.client.request_pool(pool="10.2.0.0/16")
        tenant.pools[pool_id] = []
        self.fill()
        for end_daemon in (signal.SIGKILL, signal.SIGTERM):
            error = self.request_until_full(tenant)
            self.assertRegex(error, r"cannot write .*/disk/.*journal\.\d: No space left")
            self.assert_recovers_what_is_held(tenant)
            self.served.stop(end_daemon)
            self.assert_recovers_what_is_held(tenant)
            # gipam starts on a full disk, too.
            tenant.client = self.served.start().client()

        self.request_until_full(tenant)
        os.unlink(f"{self.disk}/filler")
        tenant.request_address(pool_id)
        self.assertEqual(self.served.stop(), 0)
        self.assert_recovers_what_is_held(tenant)

    def test_first_start_on_a_full_disk_names_the_file(self) -> None:
        self.fill()
        self.served.start(wait=False)
        self.assertEqual(self.served.stop(0), 1)
        self.assertRegex(self.served.read_log(), "(?m)^gipam: /.*/disk/leases.*: No space left")

    def test_read_only_disk_is_named(self) -> None:
        self.served.start().client().request_pool()
        self.served.kill()
        before = dump_state(self.recover())
        remount = ("mount", "-o", "remount,ro", self.directory + "/disk")
        subprocess.run([*self.inside, *remount], check=True)
        self.served.start(wait=False)
        self.assertEqual(self.served.stop(0), 1)
        log = self.served.read_log()
        self.assertRegex(log, "(?m)^gipam: /.*/disk/leases.json.*: Read-only")
        self.assertEqual(dump_state(self.recover()), before)


class SoakTest(StoreCase):
    """A gipam process under load, which makes a checkpoint every few dozen requests."""

    def test_nothing_grows_that_should_not(self) -> None:
        seed = choose_seeds(1)[0]
        clients = 8
        self.served = self.daemon("-v4", "10.2.0.0/16", "-v6", "2001:db8:0:100::/56",
                                  lines=CHECKPOINT_OFTEN).start()
        load = Load(self, self.served, clients, seed)
        load.start()
        figures = []
        end_s = time.monotonic() + SOAK_S
        while time.monotonic() < end_s and load.is_well():
            load.stop.wait(0.1)
            figures.append(self.measure())
        load.stop.set()
        load.join()

        early = figures[len(figures) // 3]
        late = figures[-1]
        highest = {name: max(figure[name] for figure in figures) for name in late}
        with self.subTest(GIPAM_TEST_SEED=seed, replies=load.replies(), early=early, late=late):
            self.assertGreater(load.replies(), 100 * SOAK_S)
            self.assertLess(late["kB"], 1.1 * early["kB"] + 4096)
            self.assertLessEqual(highest["threads"], clients + 8)
            self.assertLessEqual(highest["descriptors"], clients + 16)
            self.assertLess(highest["bytes"], 1 << 22)  # two preallocated segments
        print(f"{load.replies()} replies in {SOAK_S:g} s; "
              f"after a third {early}, at the end {late}")

    def measure(self) -> dict[str, int]:
        """Return the daemon's memory, threads and descriptors, and the size of its files."""
        assert self.served.process
        process = pathlib.Path("/proc", str(self.served.process.pid))
        status = {}
        for line in (process / "status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            status[name] = value

        size = 0
        for path in glob.glob(self.path + "*"):
            with contextlib.suppress(FileNotFoundError):
                size += os.path.getsize(path)
        return {
            "kB": int(status["VmRSS"].split()[0]),
            "threads": int(status["Threads"]),
            "bytes": size,
            "descriptors": len(os.listdir(process / "fd")),
        }


if __name__ == "__main__":
    sys.exit(main())
