"""Several gipams and a real etcd, with all that can go wrong between them.

To run: `python3 .ci/lab/chaos.py`. No dockerd: clients speak the plugin protocol. GIPAM_CHAOS_S is
how many seconds each random run goes on, GIPAM_TEST_SEED repeats one (the schedule, not the
moments). The helpers are in cluster.py.
"""

from __future__ import annotations

import concurrent.futures
import glob
import ipaddress
import os
import pathlib
import re
import signal
import sys
import threading
import time
import unittest
from typing import Any, Callable

from cluster import CHAOS_S, HEARTBEAT_S, MAC, PREFIX, QUIET_S, Chaos, Host, Site
from etcd import make_certificates
from machines import main

import gipam
from test_gipam import ErrorReply, choose_seeds, make_directory, wait_until

SHIFTED_CLOCK = "import time; now = time.time; time.time = lambda: now() + {}"
OTHER_HARDWARE = "gipam.read_machine_id = lambda path: gipam.MachineId('cloned', {!r})"

# gipam stops itself once, between a claim and its reply, after the file of this name was made.
STOP_AFTER_CLAIM = """
import signal
apply = gipam.ClusterMember._apply

def stop_and_apply(self, result):
    if result.outcome.granted and os.path.exists({0!r}):
        os.unlink({0!r})
        os.kill(os.getpid(), signal.SIGSTOP)
    return apply(self, result)

gipam.ClusterMember._apply = stop_and_apply
"""


class SiteCase(unittest.TestCase):
    """Helpers that the cases share."""

    maxDiff = None

    def assert_refused(
        self,
        words: str,
        function: Callable[..., Any],
        *args: Any,
        **named: Any,
    ) -> str:
        """Check that the answer is an error with these words (a pattern), and return it."""
        with self.assertRaisesRegex(ErrorReply, words) as caught:
            function(*args, **named)
        return str(caught.exception)

    def request_after_grace(
        self,
        function: Callable[..., Any],
        *args: Any,
        **named: Any,
    ) -> Any:
        """Repeat a request that is refused during a grace period, until it is granted."""
        results = []

        def is_given() -> bool:
            try:
                results.append(function(*args, **named))
            except ErrorReply as error:
                self.assertIn("etcd has lost claims", str(error))
            return bool(results)

        wait_until("it is given", is_given, deadline_s=QUIET_S)
        return results[0]

    def wait_for_conflict(self, host: Host, pool_id: str, other: str) -> None:
        """Wait until a host names another one that has claimed its subnet."""
        def is_named() -> bool:
            return other in host.conflict(pool_id)

        wait_until("the conflict is named", is_named, deadline_s=QUIET_S)

    def wait_until_absent(self, host: Host, other: Host) -> None:
        """Wait until a host is absent in the view of the other one."""
        def is_absent() -> bool:
            presence = {}
            for each in other.client.state()["hosts"]:
                presence[each["host"]] = each["is_present"]
            return presence[host.name] is False

        wait_until(f"{host.name} is absent", is_absent, deadline_s=QUIET_S)

    def wait_for_claims(self, site: Site, claims: dict[str, list[str]]) -> None:
        def is_claimed() -> bool:
            return site.claims() == claims

        wait_until(f"claims are {claims}", is_claimed, deadline_s=QUIET_S)

    def assert_no_password(self, host: Host, password: str) -> None:
        done = host.command("config")
        self.assertEqual(done.returncode, 0, done.stderr)
        for text in (
                done.stdout,
                done.stderr,
                host.daemon.read_log(),
                repr(host.client.state()),
                host.command("status").stdout):
            self.assertNotIn(password, text)

    def assert_ends(self, host: Host) -> None:
        """Check that gipam ends, says that another machine has its name, and leaves no socket."""
        assert host.daemon.process
        self.assertEqual(host.daemon.process.wait(QUIET_S), 75, host.daemon.read_log())
        self.assertIn(f"another machine is host {host.name!r}", host.daemon.read_log())
        self.assertFalse(os.path.exists(host.daemon.socket))


# === Random faults ================================================================================


class ChaosTest(unittest.TestCase):
    """Hosts under load: no grant that was answered is lost, and none is given twice."""

    maxDiff = None

    def live(self, hosts: int, members: int, is_lossy: bool) -> None:
        (seed,) = choose_seeds(1)
        with self.subTest(GIPAM_TEST_SEED=seed):
            site = Site(self, members)
            if is_lossy:
                site.add_proxies()
            for number in range(hosts):
                site.host(f"host{number}", lines=SHIFTED_CLOCK.format(3600 * number))
            Chaos(site, seed).run(CHAOS_S)
            self.assertEqual(site.ledger.problems, [])
            site.assert_agreement()

    def test_two_hosts_and_an_etcd_of_one_member(self) -> None:
        self.live(2, 1, is_lossy=False)

    def test_three_hosts_whose_clocks_are_an_hour_apart_and_three_late_members(self) -> None:
        self.live(3, 3, is_lossy=True)

    def test_checker_sees_two_hosts_that_do_not_speak(self) -> None:
        site = Site(self)
        for name in ("deaf", "dumb"):
            site.host(name, is_on_etcd=False)
        (seed,) = choose_seeds(1)
        Chaos(site, seed).run(30, Chaos.KILL_GIPAM)
        self.assertRegex(site.ledger.problems[0], "was given while there is")


# === Names and machines ===========================================================================


class NameTest(SiteCase):
    """Each machine has a name of its own."""

    def test_restart_takes_its_name_at_once_and_another_machine_never(self) -> None:
        site = Site(self)
        first = site.host("web")
        second = site.new_host("web")
        first.client.request_pool()
        second.daemon.start(wait=False)
        self.assert_ends(second)
        before = first.pools()
        first.kill()
        first.daemon.start()
        self.assertEqual(first.pools(), before)
        first.client.request_pool()

        site.etcd.kill()
        second.daemon.start()  # nobody can tell
        site.etcd.start()
        self.assert_ends(second)
        first.client.request_pool()
        site.assert_agreement()

    def test_name_of_a_host_that_is_down_is_not_taken_and_its_blocks_stay_its(self) -> None:
        site = Site(self)
        first = site.host("web")
        other = site.host("other")
        _, subnet = first.client.request_pool()
        first.kill()
        self.wait_until_absent(first, other)
        misnamed = site.new_host("web")
        misnamed.daemon.start(wait=False)
        self.assert_ends(misnamed)
        self.assert_refused("claimed by host web", other.client.request_pool, subnet)
        first.daemon.start()
        site.assert_agreement()

    def test_clones_are_two_machines(self) -> None:
        """Under one name the second does not start; under two, neither evicts the living other."""
        site = Site(self)
        first = site.host("web", lines=OTHER_HARDWARE.format("first"))
        _, subnet = first.client.request_pool()
        clone = site.new_host("web", lines=OTHER_HARDWARE.format("clone"))
        clone.daemon.start(wait=False)
        self.assert_ends(clone)
        twin = site.host("twin", lines=OTHER_HARDWARE.format("clone"))
        done = twin.command("evict", "web", "--yes")
        self.assertIn("web is alive", done.stderr)
        self.assertEqual(site.claims(), {subnet: ["web"]})
        site.assert_agreement()

    def test_renamed_host_evicts_its_old_name_once_that_is_absent(self) -> None:
        site = Site(self)
        old = site.new_host("old")
        old.daemon.start()
        pool_id, subnet = old.client.request_pool()
        old.kill(signal.SIGTERM)
        new = site.host("new", directory=old.daemon.directory)
        done = new.command("evict", "old", "--yes")
        self.assertIn("old is alive", done.stderr)
        self.wait_for_conflict(new, pool_id, "old")
        site.evict(old, new)
        self.assertEqual(site.claims(), {subnet: ["new"]})
        site.assert_agreement()

    def test_odd_name_in_etcd_does_not_reach_a_terminal_raw(self) -> None:
        site = Site(self)
        host = site.host("web")
        site.etcd.ctl("put", PREFIX + "hosts/\x1b[31mred", "{}")

        def is_seen() -> bool:
            return "red" in host.command("status").stdout

        wait_until("it is seen", is_seen, deadline_s=QUIET_S)
        self.assertNotIn("\x1b", host.command("status").stdout)
        self.assertIn("\\x1b[31mred", host.command("status").stdout)

    def come_with(self, site: Site, name: str, *subnets: str) -> tuple[Host, list[str]]:
        """Return a host that held these subnets before it used etcd, and the ids of its pools."""
        before = site.new_host(name, is_on_etcd=False)
        before.daemon.start()
        pool_ids = []
        for subnet in subnets:
            pool_id, _ = before.client.request_pool(subnet)
            for address in ("", "", str(ipaddress.ip_network(subnet)[200])):
                before.client.request_address(pool_id, address, MAC)
            pool_ids.append(pool_id)
        before.kill()
        return site.host(name, directory=before.daemon.directory), pool_ids

    def test_hosts_come_to_a_site_with_what_they_have(self) -> None:
        site = Site(self)
        old, pool_ids = self.come_with(site, "old", "10.2.0.0/24", "172.16.0.0/23")
        wait_until("all is claimed", site.does_agree)
        for pool_id in pool_ids:
            old.client.request_address(pool_id)
        subnets = ("10.2.0.0/24", "172.16.0.0/16", "172.17.0.0/24")
        new, pool_ids = self.come_with(site, "new", *subnets)
        for pool_id in pool_ids[:2]:
            self.wait_for_conflict(new, pool_id, "old")
            self.assert_refused("old", new.client.request_address, pool_id)
            new.client.release_pool(pool_id)
        new.client.request_address(pool_ids[2])
        self.request_after_grace(new.client.request_pool)
        site.assert_agreement()


class LostFileTest(SiteCase):
    """A lost or old lease file grants no address that Docker may use."""

    def test_old_backup_of_a_lease_file_gives_nothing_away(self) -> None:
        site = Site(self)
        host = site.host("old")
        other = site.host("other")
        _, kept = host.client.request_pool()
        host.kill(signal.SIGTERM)
        backup = pathlib.Path(host.daemon.file).read_bytes()
        host.daemon.start()
        for subnet in ("10.2.5.0/24", "10.2.6.0/24"):
            host.client.request_pool(subnet)
        host.kill()
        for name in glob.glob(host.daemon.file + ".journal*"):
            os.unlink(name)
        pathlib.Path(host.daemon.file).write_bytes(backup)

        site.docker.before = take_time
        site.docker.show_network("net", {"Subnet": "10.2.5.0/24"})
        host.daemon.start()
        for subnet in (kept, "10.2.5.0/24", "10.2.6.0/24"):
            self.assert_refused("claimed by host old", other.client.request_pool, subnet)
        self.assert_refused("if Docker does not use it, it is free soon",
                            host.client.request_pool, "10.2.6.0/25")
        self.wait_for_claims(site, {kept: ["old"], "10.2.5.0/24": ["old"]})
        self.assertEqual(site.holders(), site.claims())
        other.client.request_pool("10.2.6.0/24")
        site.assert_agreement()

    def test_lost_file_in_a_shared_subnet_makes_no_container_a_gateway(self) -> None:
        """The first address belongs to a container, so no other host may use it as a gateway."""
        site = Site(self)
        host = site.host("here")
        other = site.host("there")
        lan = "192.168.1.0/24"
        site.docker.before = take_time
        pool_id, _ = host.client.request_pool(lan, gipam_shared="true")
        theirs, _ = other.client.request_pool(lan, gipam_shared="true")
        for address in ("192.168.1.1", "192.168.1.5"):
            host.client.request_address(pool_id, address, MAC)
        host.kill()
        host.lose_file()
        host.daemon.start()
        host.client.request_address(pool_id, "192.168.1.9", MAC)
        taken = host.client.request_address(pool_id)
        self.assertNotIn(taken, ("192.168.1.1/24", "192.168.1.5/24"))
        gateway = other.client.request_address(theirs, gateway=True)
        self.assertEqual(gateway, "192.168.1.2/24")
        claims = site.claims(has_addresses=True)
        for address in ("192.168.1.1", "192.168.1.5"):
            self.assertEqual(claims[f"{lan}/{address}"], ["here"])


def take_time(_: str) -> None:
    """Reply as slowly as a busy Docker."""
    time.sleep(3)


# === A host that is evicted, or leaves ============================================================


class EvictTest(SiteCase):
    """Replies to a host before its eviction count no more; later ones do."""

    LAN = "10.2.31.0/28"

    def setUp(self) -> None:
        self.site = Site(self)
        self.stop_file = os.path.join(make_directory(self), "stop")
        self.here = self.site.host("here", lines=STOP_AFTER_CLAIM.format(self.stop_file))
        self.there = self.site.host("there")
        self.here.client.connection.timeout = 4 * QUIET_S  # it is stopped for long
        self.lan, _ = self.here.client.request_pool(self.LAN, gipam_shared="true")
        self.other, _ = self.there.client.request_pool(self.LAN, gipam_shared="true")

    def all_claims(self) -> dict[str, list[str]]:
        return {**self.site.claims(), **self.site.claims(has_addresses=True)}

    def is_stopped(self) -> bool:
        return not os.path.exists(self.stop_file)

    def stop_after_claim(self, request: Callable[..., Any], *args: Any) -> tuple[str, str]:
        """Stop a host between its claim and its reply, evict it, give its claim to the other.

        Return the grant to the other, and the reply to the first when it went on.
        """
        pathlib.Path(self.stop_file).touch()
        before = self.all_claims()
        told = []

        def run() -> None:
            try:
                told.append(str(request(*args)))
            except ErrorReply as error:
                told.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        wait_until("it is stopped", self.is_stopped)
        (claimed,) = self.all_claims().keys() - before.keys()
        done = self.there.command("evict", "here", "--yes")
        self.assertIn("is alive", done.stderr)
        self.site.evict(self.here, self.there)
        (evicted,) = re.findall("evicted here, .*", self.there.daemon.read_log())
        self.assertIn(gipam.describe_claim_key(claimed), evicted)
        subnet, _, address = claimed.rpartition("/")
        if "/" in subnet:
            given = self.there.client.request_address(self.other, address, MAC)
        else:
            _, given = self.there.client.request_pool(claimed)
        self.here.resume()
        thread.join()
        return given, told[0]

    def test_host_that_is_stopped_after_its_claim_is_not_given_what_it_claimed(self) -> None:
        given, told = self.stop_after_claim(self.here.client.request_pool, "10.2.7.0/24")
        self.assertEqual(given, "10.2.7.0/24")
        self.assertRegex(told, "claimed by host there|etcd|try again")

    def test_nor_an_address_of_a_shared_subnet(self) -> None:
        request = self.here.client.request_address
        given, told = self.stop_after_claim(request, self.lan, "10.2.31.9", MAC)
        self.assertEqual(given, "10.2.31.9/28")
        self.assertRegex(told, "claimed by host there|etcd|try again")

    def test_host_that_is_cut_off_gets_nothing_of_what_it_remembers(self) -> None:
        client = self.here.client
        pool_id, subnet = client.request_pool(gipam_name="web")
        client.release_pool(pool_id)
        pool_id, _ = client.request_pool(gipam_name="web")
        self.here.cut_off()
        self.site.evict(self.here, self.there)
        self.there.client.request_pool(subnet)
        client.release_pool(pool_id)
        self.assert_refused("etcd does not answer", client.request_pool, gipam_name="web")
        self.assert_refused("etcd does not answer", client.request_address, self.lan)
        self.here.rejoin()

        def is_claimed_again() -> bool:
            return self.site.claims().get(self.LAN) == ["here", "there"]

        wait_until("the held subnets are claimed again", is_claimed_again, deadline_s=QUIET_S)
        self.site.assert_agreement()

    def test_host_that_comes_back_finds_what_is_anothers_by_then(self) -> None:
        mine, subnet = self.here.client.request_pool()
        self.here.client.request_address(self.lan, "10.2.31.9", MAC)
        self.here.kill()
        self.site.evict(self.here, self.there)
        self.there.client.request_pool(subnet)
        self.there.client.request_address(self.other, "10.2.31.9", MAC)
        self.here.daemon.start()
        for pool_id in (mine, self.lan):
            self.wait_for_conflict(self.here, pool_id, "there")
        self.assert_refused("there", self.here.client.request_address, mine)
        self.here.client.release_pool(mine)
        self.here.client.release_address(self.lan, "10.2.31.9")
        self.assert_refused("claimed by host there", self.here.client.request_address, self.lan,
                            "10.2.31.9", MAC)
        self.site.assert_agreement()


class LeaveTest(SiteCase):
    """A host that leaves a shared subnet."""

    def test_host_gets_nothing_of_it_though_its_claim_is_not_deleted_yet(self) -> None:
        site = Site(self)
        end = threading.Event()
        here = site.host("here")
        there = site.host("there")
        lan = "192.168.1.0/24"
        there.client.request_pool(lan, gipam_shared="true")

        def be_busy() -> None:
            client = here.daemon.client()
            while not end.is_set():
                client.release_pool(client.request_pool()[0])

        threads = [threading.Thread(target=be_busy) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for subnet in ("192.168.1.128/25", "192.168.0.0/22", lan) * 5:
                pool_id, _ = here.client.request_pool(lan, gipam_shared="true")
                here.client.release_pool(pool_id)
                self.assert_refused("claimed by hosts? .*there", here.client.request_pool, subnet)
        finally:
            end.set()
            for thread in threads:
                thread.join()
        site.assert_agreement()


# === An etcd that has lost data ===================================================================


class RestoreTest(SiteCase):
    """An etcd that is restored to an older state; save() is before, restore() is after."""

    def setUp(self) -> None:
        self.site = Site(self, 3)
        self.here = self.site.host("here")
        self.there = self.site.host("there")
        self.snapshot = os.path.join(self.site.etcd.directory, "snapshot")

    def save(self) -> None:
        wait_until("claims", self.site.does_agree)
        self.site.etcd.save(self.snapshot)
        time.sleep(HEARTBEAT_S + 1)  # no real backup is younger than a heartbeat

    def restore(self, cluster_token: str = "") -> None:
        """Restore the snapshot, and wait until the host that runs has noticed."""
        self.site.etcd.restore(self.snapshot, cluster_token)

        def is_read_again() -> bool:
            claims = self.there.client.state()["claims"]
            known = {}
            for claim in claims:
                if not claim["address"]:
                    known[claim["subnet"]] = claim["hosts"]
            return known == self.site.claims()

        wait_until("it is read again", is_read_again, deadline_s=QUIET_S)

    def test_what_an_older_etcd_gave_away_is_named_and_all_else_claimed_again(self) -> None:
        site = self.site
        gone_later, _ = self.here.client.request_pool()
        self.there.client.request_pool()
        self.save()
        self.here.client.release_pool(gone_later)
        disputed, subnet = self.here.client.request_pool("10.2.30.0/24")
        kept, _ = self.here.client.request_pool(v6=True)
        self.there.client.request_pool(gipam_v4ab="26")
        before = site.holders()
        self.wait_for_claims(site, before)
        self.here.kill()  # the host does not see the restore
        self.restore("another")
        self.request_after_grace(self.there.client.request_pool, subnet)
        self.here.daemon.start()
        self.wait_for_conflict(self.here, disputed, "there")
        self.assert_refused("there", self.here.client.request_address, disputed)
        self.wait_for_claims(site, {**before, subnet: ["there"]})
        self.assertRegex(self.here.daemon.read_log(), f"{subnet}.*there")
        self.here.client.request_address(kept)
        self.here.client.release_pool(disputed)  # the remedy is to make the network again
        site.assert_agreement()

    def test_restore_behind_a_host_that_was_cut_off_is_seen(self) -> None:
        subnet = "192.168.1.0/24"
        mine, _ = self.here.client.request_pool(subnet, gipam_shared="true")
        theirs, _ = self.there.client.request_pool(subnet, gipam_shared="true")
        self.save()
        for address in ("192.168.1.24", "192.168.1.201"):
            self.here.client.request_address(mine, address, MAC)
        self.here.cut_off()
        self.restore()
        request_address = self.there.client.request_address
        self.request_after_grace(request_address, theirs, "192.168.1.201", MAC)
        self.here.rejoin()
        self.wait_for_conflict(self.here, mine, "there")

        def is_claimed_again() -> bool:
            return f"{subnet}/192.168.1.24" in self.site.claims(has_addresses=True)

        wait_until("the others are claimed again", is_claimed_again, deadline_s=QUIET_S)
        self.here.client.release_address(mine, "192.168.1.201")
        request_address = self.here.client.request_address
        self.assert_refused("there", request_address, mine, "192.168.1.201", MAC)
        self.site.assert_agreement()

    def test_host_that_was_cut_off_meanwhile_gets_nothing_that_is_still_claimed_again(self) -> None:
        """The host's own key is intact, so only the other host can tell it of the loss."""
        self.site.add_proxies("0.3")
        slow = self.site.host("slow")
        self.here.client.request_pool()
        self.here.cut_off()
        self.save()
        held = [f"172.16.{number}.0/25" for number in range(200)]
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            for subnet in held:
                pool.submit(slow.daemon.client().request_pool, subnet)
        self.site.etcd.restore(self.snapshot)

        def is_noticed() -> bool:
            return "claims are missing from etcd" in slow.daemon.read_log()

        wait_until("it is noticed", is_noticed, deadline_s=QUIET_S)
        self.here.rejoin()
        for subnet in reversed(held):
            self.assert_refused("172.16|etcd", self.here.client.request_pool, subnet)
        self.wait_for_claims(self.site, self.site.holders())
        for subnet in held:
            self.assert_refused("claimed by host slow|etcd has lost",
                                self.here.client.request_pool, subnet)
        self.site.assert_agreement()

    def test_etcd_that_lost_all_is_told_again_before_anything_new_is_claimed(self) -> None:
        for host in (self.here, self.there):
            for _ in range(5):
                host.client.request_pool()
        before = self.site.claims()
        self.site.etcd.ctl("del", "--prefix", "/gipam/")
        self.assert_refused("etcd has lost claims", self.here.client.request_pool)
        self.wait_for_claims(self.site, before)
        self.request_after_grace(self.here.client.request_pool)
        self.site.assert_agreement()


# === Credentials ==================================================================================


class TlsTest(SiteCase):
    """An etcd that requires certificates and a password."""

    PASSWORD = "s3cret-of-etcd"

    def secure_site(self, token_ttl_s: int = 300) -> Site:
        site = Site(self, tls=True, token_ttl_s=token_ttl_s)
        site.etcd.enable_auth("gipam", self.PASSWORD)
        return site

    def secure_host(self, site: Site, name: str, password: str = "", tls: str = "") -> Host:
        """Start a host whose password is not on its command line."""
        user = f"//gipam:{password or self.PASSWORD}@"
        endpoints = site.etcd.endpoints.replace("//", user)
        return site.host(name, "-host", name, "-etcdtls", tls or site.etcd.client_tls,
                         is_on_etcd=False, env={"GIPAM_ETCD": endpoints})

    def test_wrong_ca_and_wrong_password_are_named(self) -> None:
        site = self.secure_site()
        foreign = make_directory(self)
        make_certificates(foreign, ["10.77.0.1"])
        wrong = "wr0ng-of-etcd"
        for name, words, password, tls in (
                ("ca", "certificate verify failed", "", foreign),
                ("password", "invalid user ID or password", wrong, "")):
            with self.subTest(name):
                host = self.secure_host(site, name, password, tls)
                text = self.assert_refused(words, host.client.request_pool)
                self.assertIn(site.etcd.endpoints, text)
                self.assertNotIn(password or self.PASSWORD, text)
                self.assert_no_password(host, password or self.PASSWORD)

    def test_expired_token_is_renewed(self) -> None:
        site = self.secure_site(token_ttl_s=1)
        host = self.secure_host(site, "patient")
        for _ in range(3):
            host.client.request_pool()
            time.sleep(3)  # the token is good for one second
        site.etcd.kill()  # and is forgotten by an etcd that ends
        site.etcd.start()
        wait_until("etcd is back", host.is_etcd_up, deadline_s=QUIET_S)
        host.client.request_pool()
        site.assert_agreement()
        self.assert_no_password(host, self.PASSWORD)


if __name__ == "__main__":
    sys.exit(main())
