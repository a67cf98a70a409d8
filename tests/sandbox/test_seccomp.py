"""The filter against libseccomp's own program for the same rules, both read as the kernel reads them; and by hand."""

import ctypes
import errno
import struct
import tempfile
from itertools import product

import pytest

from potstill.sandbox import seccomp

ARCHS = list(seccomp.ARCHITECTURES)
ALLOW, KILL = seccomp.ALLOW, seccomp.KILL
EDGES = (
    0,
    1,
    2,
    3,
    15,
    16,
    1030,
    1031,
    0x5401,
    0x5412,
    0x5421,
    0x80001,
    0x10000,
    0x3D0F00,
    0x10010000,
    0x53564D41,
    2**31,
    2**32,
    2**32 + 1,
    2**64 - 1,
)


def decide(program: bytes, arch: int, number: int, arguments=(0,) * 6) -> int:
    """Run a BPF program over a struct seccomp_data."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    code = list(struct.iter_unpack("<HBBI", program))
    place, accumulator, scratch = 0, 0, {}
    while True:
        kind, true, false, operand = code[place]
        place += 1
        match kind:
            case 0x20:
                accumulator = struct.unpack_from("<I", data, operand)[0]
            case 0x06:
                return operand
            case 0x05:
                place += operand
            case 0x15:
                place += true if accumulator == operand else false
            case 0x25:
                place += true if accumulator > operand else false
            case 0x35:
                place += true if accumulator >= operand else false
            case 0x54:
                accumulator &= operand
            case 0x02:
                scratch[operand] = accumulator
            case 0x60:
                accumulator = scratch[operand]
            case _:
                raise AssertionError(f"unknown instruction {kind:#x}")


class Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def theirs(arch: str) -> bytes:
    """libseccomp's program for the names in our table; it finds the numbers itself."""
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not here")
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(seccomp.ENOSYS)))
    native, wanted = lib.seccomp_arch_native(), seccomp.ARCHITECTURES[arch]
    if native & 0xFFFFFFFF != wanted:
        assert lib.seccomp_arch_add(context, ctypes.c_uint32(wanted)) == 0
        assert lib.seccomp_arch_remove(context, ctypes.c_uint32(native)) == 0
    assert lib.seccomp_attr_set(context, 2, ctypes.c_uint32(KILL)) == 0  # of another architecture

    def add(action, name, tests=()):
        number = lib.seccomp_syscall_resolve_name(name.encode())
        array = (Comparison * max(1, len(tests)))(*tests)
        assert lib.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(tests), array) == 0, name

    for group, action in (("ALLOW", ALLOW), ("REFUSE", seccomp.EPERM), ("KILL", KILL)):
        for name in seccomp.numbers(group, arch):
            add(action, name)
    for name, check in seccomp.CHECKS.items():
        for values in product(*(test.values for test in check.tests)):
            equal = zip(check.tests, values, strict=True)
            add(
                ALLOW,
                name,
                [Comparison(t.place, 4, v, 0) if t.mask is None else Comparison(t.place, 7, t.mask, v) for t, v in equal],
            )
    with tempfile.TemporaryFile() as file:
        assert lib.seccomp_export_bpf(context, file.fileno()) == 0
        lib.seccomp_release(context)
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("arch", ARCHS)
def test_decides_as_libseccomp_does(arch):
    ours, other, own = seccomp.program(arch), theirs(arch), seccomp.ARCHITECTURES[arch]
    checked = set(seccomp.numbers("CHECKED", arch).values())
    # but for -1, by which a tracer skips a call: here it ends the program
    for number in [*range(700), 1023, 1024, 0x3FFFFFFF, 0x40000000, 0x40000001, 0x40000200, 0x7FFFFFFF, 0x80000000, 2**32 - 2]:
        if number not in checked:
            assert decide(ours, own, number) == decide(other, own, number), number
    for alien in (0, 0x40000003, *seccomp.ARCHITECTURES.values()):
        if alien != own:
            assert decide(ours, alien, 0) == decide(other, alien, 0) == KILL


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", seccomp.CHECKS)
def test_arguments_as_libseccomp_does(arch, name):
    ours, other, own = seccomp.program(arch), theirs(arch), seccomp.ARCHITECTURES[arch]
    number, check = seccomp.numbers("CHECKED", arch)[name], seccomp.CHECKS[name]
    seen = set()
    values = [
        sorted({*EDGES, *(value + step for value in test.values for step in (-1, 0, 1) if value + step >= 0)})
        for test in check.tests
    ]
    for given in product(*values):
        arguments = [7] * 6
        for test, value in zip(check.tests, given, strict=True):
            arguments[test.place] = value
        decided = decide(ours, own, number, arguments)
        assert (decided == ALLOW) == (decide(other, own, number, arguments) == ALLOW), given
        assert decided in (ALLOW, check.otherwise)
        seen.add(decided)
    assert len(seen) == 2


# what the tables must never lose, by numbers of the x86_64 kernel itself
@pytest.mark.parametrize(
    ("number", "arguments", "decision"),
    [
        (1, (), ALLOW),  # write
        (57, (), seccomp.EPERM),  # fork
        (58, (), seccomp.EPERM),  # vfork
        (56, (0x3D0F00,), ALLOW),  # clone, as pthread_create makes it
        (56, (0x1200011,), seccomp.EPERM),  # clone, as fork makes it
        (56, (0x3D0F00 | 0x10000000,), seccomp.EPERM),  # a thread in a new user namespace
        (435, (), seccomp.ENOSYS),  # clone3: the C library falls back to clone
        (59, (), seccomp.EPERM),  # execve
        (41, (2, 1), seccomp.EPERM),  # socket
        (53, (1, 1 | 0o2004000), ALLOW),  # socketpair of Unix streams
        (53, (1, 2), seccomp.EPERM),  # of datagrams
        (53, (2, 1), seccomp.EPERM),
        (44, (3, 0, 1, 0, 0), ALLOW),  # send
        (44, (3, 0, 1, 0, 0x7FFF00000000), seccomp.EPERM),  # sendto: an address above 4 GiB
        (72, (1, 1031), seccomp.EPERM),  # F_SETPIPE_SZ
        (16, (0, 0x5412), seccomp.ENOTTY),  # TIOCSTI
        (16, (0, 0x5401), ALLOW),  # isatty
        (16, (0, 0x1_0000_5401), seccomp.ENOTTY),
        (157, (4,), seccomp.EPERM),  # PR_SET_DUMPABLE
        (101, (), KILL),  # ptrace
        (165, (), KILL),  # mount
        (425, (), KILL),  # io_uring_setup
        (319, (), seccomp.EPERM),  # memfd_create
        (0x40000001, (), KILL),  # write by the x32 table
        (2**31 - 1, (), KILL),
        (335, (), seccomp.ENOSYS),
    ],
)
def test_decisions_by_hand(number, arguments, decision):
    program = seccomp.program("x86_64")
    assert decide(program, 0xC000003E, number, (*arguments, *[0] * (6 - len(arguments)))) == decision


def test_no_call_is_in_two_groups():
    groups = [
        set(seccomp.numbers(group, "x86_64")) | set(seccomp.numbers(group, "aarch64"))
        for group in ("ALLOW", "CHECKED", "REFUSE", "KILL")
    ]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert groups[1] == set(seccomp.CHECKS)


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"^no seccomp filter for riscv64; there is one for x86_64 and aarch64$"):
        seccomp.program("riscv64")


def test_kernel_takes_it(backend):
    """What the kernel answers to a call of each kind, inside."""
    from potstill.sandbox.backend import Job
    from potstill.sandbox.verdict import Limits

    source = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    source += "for n in (SOCKET, CLONE3): print(libc.syscall(n, 0, 0, 0), ctypes.get_errno())\n"
    arch = seccomp.machine()
    source = source.replace("SOCKET", str(seccomp.numbers("REFUSE", arch)["socket"])).replace("CLONE3", "435")
    ended = backend.run(Job(source), Limits())
    assert ended.stdout.decode().split() == ["-1", str(errno.EPERM), "-1", str(errno.ENOSYS)]
    ended = backend.run(
        Job(f"import ctypes; ctypes.CDLL(None).syscall({seccomp.numbers('KILL', arch)['ptrace']}, 0, 0, 0, 0)"), Limits()
    )
    assert ended.denied
    assert ended.signal == 31
