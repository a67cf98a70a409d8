"""The warm process of the backend `namespaces`: builds a small root once, then forks a child for each program.

Started as `python zygote.py GUEST CONTROL` with an empty environment. Two processes: the keeper, which waits, and the zygote,
the first process of a process namespace, whose end is the end of everything in it. Neither holds a test, an answer or an
earlier program: a program comes as a descriptor, is read by its own child, and is gone with it.
"""

import ctypes
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
NEW_MOUNTS, NEW_ALL = 0x00020000, 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
NOSUID, NODEV, BIND, RECURSIVE, SLAVE = 2, 4, 4096, 16384, 1 << 19
READ_ONLY, RECURSIVELY, DETACH = 1, 0x8000, 2
DEATH_SIGNAL, KEEP_CAPABILITIES, DROP_BOUND, NO_NEW_PRIVILEGES = 1, 8, 24, 38
SYS_ADMIN = 1 << 21  # the capability to mount and unshare
MOUNT_SETATTR, PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
USER = 65534  # whom the program runs as
DEVICES = ("null", "zero", "random", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A step that did not work: what, and why."""


def call(name, *arguments):
    """A function of the C library that returns -1 for failure."""
    arguments = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*arguments) < 0:
        told = [a.decode() for a in arguments if isinstance(a, bytes)]
        raise Failed(f"{name}({', '.join(told)}): {os.strerror(ctypes.get_errno())}")


def mount(source, target, kind, flags, options=None):
    call("mount", source, target, kind, ctypes.c_ulong(flags), options)


def protect(path, flags, deep):
    """Set mount flags: `deep` for those below too."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, -100, path, RECURSIVELY if deep else 0, ctypes.byref(attributes), 32)


def build_root(plan):
    """A read-only tree of its own, with the interpreter, libraries and four devices in it, becomes the root."""
    base = "/proc"  # any folder that is there and that nothing below is taken from
    mount("none", "/", None, RECURSIVE | SLAVE)
    mount("tmpfs", base, "tmpfs", NOSUID | NODEV, "mode=755,size=1m,nr_inodes=4096")
    os.chdir(base)
    os.mkdir("old", 0o700)
    call("syscall", PIVOT_ROOT[os.uname().machine], ".", "old")
    os.chdir("/")
    for folder in plan["folders"]:
        os.makedirs(folder, exist_ok=True)
        mount("/old" + folder, folder, None, BIND | RECURSIVE)
        protect(folder, READ_ONLY | NOSUID | NODEV, True)
    for file in plan["files"]:
        place(file)
        protect(file, READ_ONLY | NOSUID | NODEV, False)
    for name, target in plan["links"]:
        os.symlink(target, name)
    for folder in plan["hidden"]:
        mount("tmpfs", folder, "tmpfs", NOSUID | NODEV | READ_ONLY, "mode=755,size=4k")
    for name in DEVICES:
        place(f"/dev/{name}")
        protect(f"/dev/{name}", READ_ONLY | NOSUID, False)
    os.mkdir("/tmp", 0o1777)
    os.symlink("/tmp", "/dev/shm")  # where locks of `multiprocessing` are kept, which its pools of threads need
    call("umount2", "/old", DETACH)
    os.rmdir("/old")
    protect("/", READ_ONLY | NOSUID | NODEV, False)


def place(file):
    os.makedirs(os.path.dirname(file), exist_ok=True)
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o644))
    mount("/old" + file, file, None, BIND)


def drop_bound():
    """No capability can come back by any way."""
    for capability in range(64):
        if libc.prctl(DROP_BOUND, capability, 0, 0, 0) < 0:
            break
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def hold(capabilities):
    """Give up all capabilities but these, of the lower 32."""
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)(capabilities, capabilities)  # effective, permitted, inheritable; then the upper 32
    call("capset", ctypes.byref(head), ctypes.byref(sets))


def become_user():
    """From the superuser to another user for good; capabilities inside these namespaces stay."""
    call("prctl", KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)


def child(guest, job, descriptors, control):
    """In the forked child: fresh /tmp, streams, no rights, limits; returns the program."""
    os.setsid()
    call("unshare", NEW_MOUNTS)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={job['disk']},nr_inodes=16384,mode=1777")
    program, filter, *streams = descriptors
    source, rules = guest.read(program), guest.read(filter)
    streams = [high(stream) for stream in streams]  # first out of the way of 0 to 4
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    hold(0)
    guest.enter(source, rules, job["limits"], control, len(streams))
    return source


def high(fd):
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 32)


def serve(control, guest):
    """One program at a time, until the parent closes its side."""
    while True:
        words, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
        if not words:
            os._exit(0)
        if words == b"k":  # of a program that has ended by itself
            continue
        job = json.loads(words)
        pid = os.fork()
        if pid == 0:
            try:
                source = child(guest, job, descriptors, control.fileno())
            except BaseException as error:
                control.send(b"x" + repr(error).encode()[:500])
                os._exit(1)
            return source
        for fd in descriptors:
            os.close(fd)
        tell(control, pid)


def tell(control, pid):
    """Wait for a child, kill it when the parent says so, and say how it ended."""
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(ended, select.POLLIN)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if ended in ready:
            break
        if not control.recv(16):
            os._exit(0)  # takes the child along
        os.kill(pid, signal.SIGKILL)
    at = time.monotonic_ns()
    os.close(ended)
    _, status, usage = os.wait4(pid, 0)
    control.send(b"e" + json.dumps([at, status, usage.ru_utime + usage.ru_stime]).encode())


def keep(zygote, parent):
    """The keeper: lives as long as the zygote and the parent."""
    poll = select.poll()
    ended = os.pidfd_open(zygote)
    poll.register(ended, select.POLLIN)
    if parent is not None:
        poll.register(parent, select.POLLIN)
    poll.poll()
    os.kill(zygote, signal.SIGKILL)
    os.waitpid(zygote, 0)
    os._exit(0)


def start(guest, control):
    parent = os.pidfd_open(os.getppid())
    plan = json.loads(control.recv(1 << 16))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out programs go first, not who trains
    call("unshare", NEW_ALL)
    control.send(b"u")
    answer = control.recv(64)  # the parent has written who is who
    build_root(plan)
    call("sethostname", b"sandbox", 7)
    drop_bound()
    if answer == b"two":  # only the superuser may read the places that the root was built from
        become_user()
    hold(SYS_ADMIN)
    zygote = os.fork()
    if zygote:
        control.close()
        keep(zygote, parent)
    call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    os.close(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process of a namespace ignores what has no handler
    os.setsid()
    os.environ.clear()
    gc.collect()
    gc.freeze()
    control.send(b"r")
    return serve(control, guest)


def main(guest_path, fd):
    guest = type(sys)("guest")
    with open(guest_path, encoding="utf-8") as file:
        exec(compile(file.read(), guest_path, "exec"), vars(guest))
    control = socket.socket(fileno=high(int(fd)))
    os.close(int(fd))
    try:
        source = start(guest, control)
    except BaseException as error:
        control.send(b"x" + str(error).encode()[:500])
        os._exit(1)
    control.detach()
    guest.run(source)


if __name__ == "__main__":
    main(*sys.argv[1:])
