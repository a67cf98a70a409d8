"""What happens inside a sandbox before the program: limits, the filter, the word that it starts, and then the program itself.

Started by bubblewrap as a file of its own, and read by the zygote; imports nothing of potstill and little else, since every
millisecond here is paid for each program.
"""

import os
import resource as r
import sys
import time

MAIN = "/tmp/main.py"
_NEW_PRIVILEGES, _SECCOMP, _DUMPABLE = 38, 22, 4  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_DUMPABLE


def limit(limits):
    """Set rlimits. `limits`: address space, stack, file size in bytes, descriptors, processor seconds, processes."""
    space, stack, file, descriptors, seconds, processes = limits
    r.setrlimit(r.RLIMIT_CORE, (0, 0))
    r.setrlimit(r.RLIMIT_MEMLOCK, (0, 0))
    r.setrlimit(r.RLIMIT_MSGQUEUE, (0, 0))
    r.setrlimit(r.RLIMIT_CPU, (seconds, seconds + 1))
    r.setrlimit(r.RLIMIT_NPROC, _within(processes, r.getrlimit(r.RLIMIT_NPROC)[1]))
    r.setrlimit(r.RLIMIT_FSIZE, (file, file))
    r.setrlimit(r.RLIMIT_NOFILE, (descriptors, descriptors))
    # a program may ask for more stack: address space bounds both
    hard = r.getrlimit(r.RLIMIT_STACK)[1]
    r.setrlimit(r.RLIMIT_STACK, (_within(stack, hard)[0], hard))
    r.setrlimit(r.RLIMIT_AS, (space, space))


def _within(wanted, hard):
    wanted = wanted if hard < 0 else min(wanted, hard)
    return wanted, wanted


def forbid(filter):
    """No new privileges, no core dump, and the seccomp filter: an array of struct sock_filter.

    A limit of 0 on core files does not hold back the program that the host's core_pattern names; who is not dumpable does.
    """
    # the bare module: importing ctypes takes as long as a small program runs
    import _ctypes

    start = bytes.__basicsize__ - 1  # where the data of a bytes object begins, from the object's own address
    head = (len(filter) // 8).to_bytes(8, sys.byteorder) + (id(filter) + start).to_bytes(8, sys.byteorder)
    prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # pyright: ignore[reportArgumentType]
    for arguments in ((_NEW_PRIVILEGES, 1, 0, 0, 0), (_DUMPABLE, 0, 0, 0, 0), (_SECCOMP, 2, head, 0, 0)):
        if _ctypes.call_function(prctl, arguments):
            raise OSError(f"prctl({arguments[0]}) failed")


def read(fd):
    """All of a file, from its beginning."""
    parts = []
    at = 0
    while part := os.pread(fd, 1 << 20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def run(source):
    """Run a program as the real `__main__`, as if Python had been started with its file; end the process with its status."""
    import _sitebuiltins
    import builtins

    main = type(sys)("__main__")
    vars(main).update(__file__=MAIN, __builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    sys.argv[:] = [MAIN]
    sys.path.insert(0, os.path.dirname(MAIN))
    # `site` would bring these
    builtins.exit, builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D"), _sitebuiltins.Quitter("quit", "Ctrl-D")
    builtins.help = _sitebuiltins._Helper()
    depth, frame = 0, sys._getframe()
    while frame := frame.f_back:
        depth += 1
    sys.setrecursionlimit(sys.getrecursionlimit() + depth + 1)
    del frame
    status = 0
    try:
        exec(compile(source, MAIN, "exec", dont_inherit=True), vars(main))
    except SystemExit as leaving:
        status = status_of(leaving.code)
    except BaseException as error:
        status = 1
        trace = error.__traceback__
        error.__traceback__ = trace and trace.tb_next  # without this frame
        sys.excepthook(type(error), error, error.__traceback__)
    leave(main, status)


def status_of(code):
    """What `sys.exit(code)` makes the exit status."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def leave(main, status):
    """End as the interpreter does: other threads, atexit, what `__del__` of globals has to say, buffers; then without its slow
    taking down of every module."""
    import atexit

    if threading := sys.modules.get("threading"):
        threading._shutdown()
    atexit._run_exitfuncs()
    done = flushed()
    names = vars(main)
    for name in sorted(names, key=lambda name: name[:1] != "_"):
        if name != "__builtins__":
            names[name] = None
    os._exit(status if flushed() and done else 120)


def flushed():
    """Whether both outputs took what was left for them."""
    done = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:
            done = False
    return done


def main(words):
    """From bubblewrap's command line: `control program filter talk_in talk_out limits…`, descriptors (-1 for none), numbers.

    This is the first process of its process namespace. The program is its child, so that a program that ends with the status
    128 + N and one that ends by the signal N are told apart.
    """
    import _signal  # pyright: ignore[reportMissingImports]  # "signal" would import enum: half of the time to start

    *given, talk_in, talk_out = map(int, words[:5])
    control, program, filter = given
    try:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # the first process of a namespace ignores what has no handler
        source, rules = read(program), read(filter)
        pid = os.fork()
        if pid:
            wait(pid, control)
        spare = max(*given, talk_in, talk_out, 4) + 1
        os.dup2(control, spare)
        keep = 3
        if talk_in >= 0:
            os.dup2(talk_in, spare + 1)
            os.dup2(talk_out, spare + 2)
            os.dup2(spare + 1, 3)
            os.dup2(spare + 2, 4)
            keep = 5
        enter(source, rules, [int(word) for word in words[5:]], spare, keep)
    except BaseException as error:
        os.write(control, b"x" + repr(error).encode()[:500])
        os._exit(1)
    run(source)


def wait(pid, control):
    """Say how a child ended, and end."""
    os.closerange(0, control)
    os.closerange(control + 1, 1 << 20)
    _, status, usage = os.wait4(pid, 0)
    os.write(control, b"e[%d,%d,%f]" % (time.monotonic_ns(), status, usage.ru_utime + usage.ru_stime))
    os._exit(0)


def enter(source, rules, limits, control, keep):
    """From here on the program's limits hold, and descriptors from `keep` on are closed.

    The parent hears that the program starts, and when, on a descriptor that the program never has.
    """
    import _signal  # pyright: ignore[reportMissingImports]  # "signal" would import enum: half of the time to start

    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    os.chdir(os.path.dirname(MAIN))
    with open(MAIN, "wb") as file:
        file.write(source)
    os.environ.clear()
    limit(limits)
    forbid(rules)
    os.write(control, b"s%d" % time.monotonic_ns())
    os.closerange(keep, 1 << 20)


if __name__ == "__main__":
    main(sys.argv[1:])
