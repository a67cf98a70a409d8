"""Sockets of every family, and the kernel's rarer doors."""

from attack import Attack, printed, reached
from processes import LIBC

SOCKET = "import socket as s\n"


def calls(number_x86: int, number_arm: int, arguments: str, word: str) -> str:
    """A system call by its number; prints the word where the kernel grants it."""
    return (
        LIBC + "import platform\n"
        f"n = {number_x86} if platform.machine() == 'x86_64' else {number_arm}\n"
        f"buffer = ctypes.create_string_buffer(4096)\nif libc.syscall(n, {arguments}) >= 0: print('{word}')"
    )


ATTACKS = {
    "TCP": Attack(SOCKET + "s.create_connection(('127.0.0.1', $TCP))", reached("tcp")),
    "TCP over IPv6": Attack(SOCKET + "s.create_connection(('::1', $TCP6))", reached("tcp6")),
    "UDP": Attack(SOCKET + "s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'hello', ('127.0.0.1', $UDP))", reached("udp")),
    "abstract Unix socket": Attack(SOCKET + "s.socket(s.AF_UNIX).connect('\\0$ABSTRACT')", reached("abstract")),
    "Unix socket": Attack(SOCKET + "s.socket(s.AF_UNIX).connect('$UNIX')", reached("unix")),
    "listen": Attack(SOCKET + "x = s.socket(); x.bind(('127.0.0.1', 0)); x.listen(); print('BOUND')", printed("BOUND")),
    "netlink": Attack(SOCKET + "s.socket(s.AF_NETLINK, s.SOCK_RAW, 0); print('NETLINK')", printed("NETLINK")),
    # a connected pair of streams is what asyncio wakes itself by; of a pair of datagrams each end can write to any address
    "socket pair": Attack(SOCKET + "s.socketpair(s.AF_UNIX, s.SOCK_DGRAM); print('PAIR')", printed("PAIR")),
    "resolve a name": Attack(SOCKET + "print('ADDRESS', s.getaddrinfo('localhost', 80)[0][4][0])", printed("ADDRESS")),
    "a user namespace": Attack(LIBC + "if libc.unshare(0x10000000) == 0: print('UNSHARED')", printed("UNSHARED")),
    "a mount namespace": Attack(LIBC + "if libc.unshare(0x10000000 | 0x20000) == 0: print('UNSHARED')", printed("UNSHARED")),
    "io_uring": Attack(calls(425, 425, "4, buffer", "RING"), printed("RING")),
    "keyring": Attack(calls(248, 217, "b'user', b'potstill', b'x', 1, -1", "KEY"), printed("KEY")),
    "userfaultfd": Attack(calls(323, 282, "1", "FAULTS"), printed("FAULTS"), as_root=True),
    "pidfd": Attack(calls(434, 434, "$VICTIM, 0", "PIDFD"), printed("PIDFD")),
    "trace itself": Attack(LIBC + "if libc.ptrace(0, 0, 0, 0) == 0: print('TRACED')", printed("TRACED")),
    "a new mount": Attack(calls(430, 430, "b'tmpfs', 0", "MOUNT"), printed("MOUNT"), as_root=True),
    "inotify's neighbour fanotify": Attack(calls(300, 262, "0, 0", "FANOTIFY"), printed("FANOTIFY"), as_root=True),
    "handles of files": Attack(
        calls(303, 264, "-100, b'/tmp', b'\\x80' + bytes(200), buffer, 0", "HANDLE"), printed("HANDLE"), as_root=True
    ),
    "the host's name": Attack(
        "import socket as s; s.sethostname(s.gethostname()); print('NAMED')", printed("NAMED"), as_root=True
    ),
    "the old personality": Attack(
        LIBC + "if libc.personality(0x0040000) >= 0 and libc.personality(0xffffffff) == 0x40000: print('OTHER')",
        printed("OTHER"),
    ),
}
