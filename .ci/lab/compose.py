"""Networks of `docker compose`, in the forms of the README: `python3 .ci/lab/compose.py`."""

from __future__ import annotations

import os
import sys

from engine import DockerCase
from machines import main

FIXED_MAC = '{mac_address: "02:42:00:00:00:09"}'
FIXED_ADDRESSES = '{ipv4_address: 10.2.9.10, ipv6_address: "2001:db8:0:109::10"}'
OWN_SUBNETS = """{enable_ipv6: true, ipam: {driver: gipam, config: [
  {subnet: 10.2.9.0/24}, {subnet: "2001:db8:0:109::/64"}]}}"""
DROPPED = "{enable_ipv6: true, ipam: {driver: gipam, options: {gipam.name: web}}}"
FILE = """
services:
  db: {{image: bb, networks: {{web: {service}}}}}
networks:
  web: {network}
"""


class ComposeTest(DockerCase):
    """Compose drops ipam.options (docker/compose#13785), so each form does without them."""

    def setUp(self) -> None:
        super().setUp()
        self.file = os.path.join(self.docker.disk, "compose.yaml")

    def create_service(self, service: str, network: str) -> None:
        """Create a service beside another network, so that its addresses are not the first."""
        with open(self.file, "w", encoding="utf-8") as file:
            file.write(FILE.format(service=service, network=network))
        self.docker.network("other", "--ipv6")
        self.compose("up", "-d")
        self.docker("network", "rm", "other")

    def compose(self, *words: str) -> None:
        self.docker("compose", "-p", "app", "-f", self.file, *words)

    def subnets_and_addresses(self) -> tuple[list[str], list[str]]:
        self.assert_agreement(2)
        web = self.docker("network", "ls", "-q", "-f", "name=web").split()
        return self.docker.subnets(*web), self.docker.running_addresses()

    def assert_kept(self) -> tuple[list[str], list[str]]:
        """Check that subnets and addresses stay the same whatever compose does; return them."""
        before = self.subnets_and_addresses()
        for words in (("restart",), ("up", "-d", "--force-recreate"), ("down",)):
            self.compose(*words)
            self.compose("up", "-d")
            self.assertEqual(self.subnets_and_addresses(), before, words)
        self.compose("down")
        return before

    def test_external_network_is_kept_and_found_again_by_its_name(self) -> None:
        options = ("web", "--ipv6", "--ipam-opt", "gipam.name=web")
        self.docker.network(*options, containers=["first"])
        self.create_service(FIXED_MAC, "{external: true}")
        self.docker("rm", "-f", "first")
        before = self.assert_kept()

        self.docker("network", "rm", "web")
        self.docker.kill_and_start()
        self.docker.network("meanwhile", "--ipv6")
        self.docker.network(*options)
        self.compose("up", "-d")
        self.assertEqual(self.subnets_and_addresses(), before)
        self.compose("down")

    def test_own_subnets_are_kept(self) -> None:
        for service in (FIXED_ADDRESSES, FIXED_MAC):
            with self.subTest(service):
                self.create_service(service, OWN_SUBNETS)
                subnets, _ = self.assert_kept()
                self.assertEqual(subnets, ["10.2.9.0/24", "2001:db8:0:109::/64"])

    def test_name_in_a_compose_file_does_nothing(self) -> None:
        """Once compose passes options on, this test fails, and the README can show this form."""
        self.create_service("{}", DROPPED)
        before, _ = self.subnets_and_addresses()
        self.compose("down")
        self.compose("up", "-d")
        after, _ = self.subnets_and_addresses()
        self.assertNotEqual(after, before)
        self.compose("down")


if __name__ == "__main__":
    sys.exit(main())
