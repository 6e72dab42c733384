"""A DHCPv6 server that delegates one prefix, as a home router does: `python3 delegation.py DEVICE FILE SECONDS`.

The prefix is read from FILE for each reply, so that writing another one there changes it when the client
next renews, after SECONDS. What the client had before is withdrawn in the same reply (RFC 8415, 18.3.4). The
route to the prefix leads to the client that has it. The Debian trees of the lab have no such server.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import subprocess
import sys
from typing import Iterator

SERVER_PORT = 547
SERVERS = "ff02::1:2"  # All_DHCP_Relay_Agents_and_Servers
SOLICIT, ADVERTISE, RENEW, REPLY = 1, 2, 5, 7
CLIENT_ID, SERVER_ID, IA_PD, IA_PREFIX = 1, 2, 25, 26
DUID = b"\0\3\0\1\2\0\0\0\0\1"  # of an Ethernet address
VALID_S = 600


def options(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each option's code and content."""
    while len(data) >= 4:
        code, length = struct.unpack_from("!HH", data)
        yield code, data[4:4 + length]
        data = data[4 + length:]


def option(code: int, content: bytes) -> bytes:
    return struct.pack("!HH", code, len(content)) + content


def prefix_option(prefix: ipaddress.IPv6Network, valid_s: int) -> bytes:
    header = struct.pack("!IIB", valid_s, valid_s, prefix.prefixlen)
    return option(IA_PREFIX, header + prefix.network_address.packed)


def prefixes_of(association: bytes) -> set[ipaddress.IPv6Network]:
    """Return the prefixes that a client names in its IA_PD."""
    prefixes = set()
    for code, content in options(association[12:]):
        if code == IA_PREFIX:
            prefixes.add(ipaddress.IPv6Network((content[9:25], content[8])))
    return prefixes


def delegate(association: bytes, prefix: ipaddress.IPv6Network, renew_s: int) -> bytes:
    """Return the IA_PD that gives the client this prefix and withdraws every other."""
    content = association[:4] + struct.pack("!II", renew_s, 2 * renew_s)
    content += prefix_option(prefix, VALID_S)
    for former in prefixes_of(association):
        if former != prefix and former.network_address != ipaddress.IPv6Address("::"):
            content += prefix_option(former, 0)
    return option(IA_PD, content)


def reply(message: bytes, prefix: ipaddress.IPv6Network, renew_s: int) -> bytes:
    message_type = ADVERTISE if message[0] == SOLICIT else REPLY
    answer = bytes((message_type,)) + message[1:4] + option(SERVER_ID, DUID)
    for code, content in options(message[4:]):
        if code == CLIENT_ID:
            answer += option(CLIENT_ID, content)
        elif code == IA_PD:
            answer += delegate(content, prefix, renew_s)
    return answer


def main(device: str, path: str, renew_s: int) -> None:
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.bind(("::", SERVER_PORT))
    group = socket.inet_pton(socket.AF_INET6, SERVERS) + struct.pack("@I", socket.if_nametoindex(device))
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
    while True:
        message, client = server.recvfrom(4096)
        with open(path, encoding="ascii") as file:
            prefix = ipaddress.IPv6Network(file.read().strip())

        answer = reply(message, prefix, renew_s)
        server.sendto(answer, client)
        if answer[0] == REPLY:
            gateway = client[0].partition("%")[0]
            subprocess.run(["ip", "-6", "route", "flush", "proto", "dhcp"], check=True)
            subprocess.run(["ip", "-6", "route", "add", str(prefix), "via", gateway, "dev", device, "proto", "dhcp"], check=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
