"""The self-check for longer, a soak, full and read-only disks: `python3 .ci/lab/long.py`.

GIPAM_LONG=1 lets test_gipam.py do 25 times as often what it does at random.
"""

from __future__ import annotations

import contextlib
import glob
import os
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
from test_gipam import HERE, Load, Refused, StoreCase, Tenant, dump_state, held, recover, seeds


class SelfCheckTest(unittest.TestCase):
    def test_self_check_passes_for_longer(self) -> None:
        done = subprocess.run([sys.executable, os.path.join(HERE, "test_gipam.py")], encoding="utf-8",
                              env={**os.environ, "GIPAM_LONG": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout)


class SmallDiskTest(StoreCase):
    """A small tmpfs in a mount namespace of its own, and a real daemon on it."""

    def setUp(self) -> None:
        super().setUp()
        os.mkdir(os.path.join(self.directory, "disk"))
        mount = f"mount -t tmpfs -o size=64k tmpfs {self.directory}/disk"
        namespaces = Namespaces("--mount", setup=mount)
        self.addCleanup(namespaces.close)
        self.inside = namespaces.inside
        self.disk = f"/proc/{namespaces.pid}/root{self.directory}/disk"  # as seen from here
        self.served = self.daemon("-v4", "10.2.0.0/16", "-file",
                                  f"{self.directory}/disk/leases.json", inside=self.inside)

    def fill(self) -> None:
        """Leave no byte free."""
        with open(f"{self.disk}/filler", "ab", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(512))

    def request_until_full(self, tenant: Tenant) -> str:
        """Live on what room the last page has; return the error that ends it."""
        pool_id = next(iter(tenant.pools))
        for _ in range(1000):
            try:
                tenant.request_address(pool_id)
            except Refused as refusal:
                self.assertEqual(refusal.status, 503)
                return str(refusal)
        raise AssertionError("the disk is not full")

    def recover(self) -> State:
        """Return what a restart would find, read from a copy: a daemon keeps others off its files."""
        with tempfile.TemporaryDirectory() as directory:
            for path in glob.glob(f"{self.disk}/leases.json*"):
                shutil.copy(path, directory)
            return recover(f"{directory}/leases.json")

    def check(self, tenant: Tenant) -> None:
        self.assertEqual(held(self.recover()), {
            pool_id: sorted(addresses) for pool_id, addresses in tenant.pools.items()})

    def test_full_disk_costs_errors_and_no_lease(self) -> None:
        tenant = Tenant(self.served.start().client(), random.Random(1))
        tenant.pools[tenant.client.request_pool(pool="10.2.0.0/16")[0]] = []
        tenant.MAX_ADDRESSES = 10_000
        self.fill()
        for end_daemon in (signal.SIGKILL, signal.SIGTERM):
            error = self.request_until_full(tenant)
            self.assertRegex(error, r"cannot write .*/disk/.*journal\.\d: No space left")
            self.check(tenant)
            self.served.stop(end_daemon)
            self.check(tenant)
            tenant.client = self.served.start().client()  # also on a full disk
        self.request_until_full(tenant)
        os.unlink(f"{self.disk}/filler")
        tenant.request_address(next(iter(tenant.pools)))
        self.assertEqual(self.served.stop(), 0)
        self.check(tenant)

    def test_first_start_on_a_full_disk_names_the_file(self) -> None:
        self.fill()
        self.served.start(wait=False)
        self.assertEqual(self.served.stop(0), 1)
        self.assertRegex(self.served.read_log(), "(?m)^gipam: /.*/disk/leases.*: No space left")

    def test_read_only_disk_is_named(self) -> None:
        self.served.start().client().request_pool()
        self.served.kill()
        before = self.recover()
        remount = "mount", "-o", "remount,ro", self.directory + "/disk"
        subprocess.run([*self.inside, *remount], check=True)
        self.served.start(wait=False)
        self.assertEqual(self.served.stop(0), 1)
        self.assertRegex(self.served.read_log(), "(?m)^gipam: /.*/disk/leases.json.*: Read-only")
        self.assertEqual(dump_state(self.recover()), dump_state(before))


class SoakTest(StoreCase):
    """A real daemon under load, which folds each few dozen requests."""

    def test_nothing_grows_that_should_not(self) -> None:
        seed, clients, for_s = seeds(1)[0], 8, 120.0
        self.served = self.daemon("-v4", "10.2.0.0/16", "-v6", "2001:db8:0:100::/56",
                                  lines="gipam.MIN_CHECKPOINT_BYTES, gipam.CHECKPOINT_RETRY_S = 2000, 0.01").start()
        load = Load(self, self.served, clients, seed)
        load.start()
        figures, started = [], time.monotonic()
        while time.monotonic() < started + for_s and load.is_well():
            load.stop.wait(0.1)
            figures.append(self.measure())
        load.stop.set()
        load.join()
        early, late = figures[len(figures) // 3], figures[-1]
        with self.subTest(GIPAM_TEST_SEED=seed, replies=load.replies(), early=early, late=late):
            self.assertGreater(load.replies(), 100 * for_s)
            self.assertLess(late["kB"], 1.1 * early["kB"] + 4096)
            self.assertLessEqual(max(it["threads"] for it in figures), clients + 8)
            self.assertLessEqual(max(it["descriptors"] for it in figures), clients + 16)
            self.assertLess(max(it["bytes"] for it in figures), 1 << 22)  # two segments with room
        print(f"{load.replies()} replies in {for_s:g} s; after a third {early}, at the end {late}")

    def measure(self) -> dict[str, int]:
        """Return memory, threads and descriptors of the daemon, and the size of its files."""
        assert self.served.process
        process = f"/proc/{self.served.process.pid}"
        with open(process + "/status", encoding="ascii") as file:
            status = dict(line.split(":", 1) for line in file)
        size = 0
        for name in glob.glob(self.path + "*"):
            with contextlib.suppress(FileNotFoundError):
                size += os.path.getsize(name)
        return {"kB": int(status["VmRSS"].split()[0]), "threads": int(status["Threads"]),
                "bytes": size, "descriptors": len(os.listdir(process + "/fd"))}


if __name__ == "__main__":
    sys.exit(main())
