"""Files, links, secrets, the environment, parents; what is written outside; what one run leaves for the next."""

# ruff: noqa: E501

from pathlib import Path

from attack import Attack, dropped, printed, printed_secret


def of_this_environment(scene, ended):
    """Of the variables that this process began with."""
    first = Path("/proc/self/environ").read_bytes().split(b"\0")[0]
    return len(first) > 4 and first in ended.stdout


def tidy_left(scene):
    for folder in ("/tmp", "/dev/shm", "/var/tmp"):
        Path(folder, f"potstill-{scene.secret}-left").unlink(missing_ok=True)


def leaves_in(folder: str) -> Attack:
    path = f"{folder}/$MARK-left"
    return Attack(
        f"open('{path}', 'w').write('LEFT OVER')",
        printed("LEFT OVER"),
        then=f"print(open('{path}').read())",
        tidy=tidy_left,
    )


TRY = "import os\ndef tried(act):\n    try: print(act())\n    except Exception as e: print(type(e).__name__)\n"

ATTACKS = {
    "read a file": Attack("print(open('$SECRET_FILE').read())", printed_secret),
    "read through a link": Attack(
        "import os; os.symlink('$SECRET_FILE', f'/tmp/link{os.getpid()}')\n"
        "try: print(open(f'/tmp/link{os.getpid()}').read())\nfinally: os.unlink(f'/tmp/link{os.getpid()}')",
        printed_secret,
    ),
    "read through the root of a process": Attack("print(open('/proc/self/root$SECRET_FILE').read())", printed_secret),
    "read through the parent's root": Attack("print(open('/proc/$PARENT/root$SECRET_FILE').read())", printed_secret),
    "climb out": Attack("import os; os.chdir('/' + '../' * 40); print(open('.' + '$SECRET_FILE').read())", printed_secret),
    "climb out by chroot": Attack(
        "import os\nos.makedirs('/tmp/$MARK-root', exist_ok=True); d = os.open('/', os.O_RDONLY)\n"
        "try: os.chroot('/tmp/$MARK-root'); os.fchdir(d); os.chdir('../' * 40); os.chroot('.')\n"
        "finally: os.path.exists('/tmp/$MARK-root') and os.rmdir('/tmp/$MARK-root')\n"
        "print(open('$SECRET_FILE').read())",
        printed_secret,
        as_root=True,
    ),
    "list the folder": Attack("import os; print(os.listdir(os.path.dirname('$SECRET_FILE')))", printed("secret.txt")),
    "read the users": Attack("print(open('/etc/passwd').read())", printed("root:")),
    "read an inherited descriptor": Attack("import os; print(os.pread($INHERITED, 100, 0))", printed_secret),
    "read every descriptor": Attack(
        "import os\nfor d in range(3, 256):\n    try: print(os.pread(d, 100, 0))\n    except OSError: pass", printed_secret
    ),
    "read the environment": Attack("import os; print(dict(os.environ))", printed_secret),
    "read the parent's environment": Attack(
        TRY + "for p in ($PARENT, os.getppid(), 1):\n    tried(lambda: open(f'/proc/{p}/environ', 'rb').read().decode())",
        of_this_environment,
    ),
    "read command lines": Attack(
        TRY + "for p in os.listdir('/proc') if os.path.isdir('/proc') else ():\n"
        "    p.isdigit() and tried(lambda: open(f'/proc/{p}/cmdline').read())",
        printed_secret,
    ),
    "read the parent's memory": Attack(
        "open('/proc/$PARENT/mem', 'rb').close(); print('MEMORY')", printed("MEMORY"), as_root=True
    ),
    "write a file": Attack("open('$DROP', 'w').write('x')", dropped),
    "make a link outside": Attack(
        "import os; os.symlink('/etc', '$DROP'); os.path.islink('$DROP') and print('LINK')",
        printed("LINK"),
        tidy=lambda scene: scene.dropped(),
    ),
    "rename out": Attack("import os; open('/tmp/$MARK', 'w').close(); os.rename('/tmp/$MARK', '$DROP')", dropped),
    "delete a file": Attack(
        "open('$DROP', 'w').close(); import os; os.unlink('$DROP'); print('GONE')",
        printed("GONE"),
        tidy=lambda scene: scene.dropped(),
    ),
    "open the library for writing": Attack(
        "import os; os.open(os.__file__, os.O_WRONLY); print('OPEN')", printed("OPEN"), as_root=True
    ),
    "open the interpreter for writing": Attack(
        "import os, sys; d = os.path.dirname(os.__file__); open(d + '/$MARK', 'w').close(); os.unlink(d + '/$MARK'); print('OPEN')",
        printed("OPEN"),
        as_root=True,
    ),
    "leave a file": leaves_in("/tmp"),
    "leave a file in shared memory": leaves_in("/dev/shm"),
    "leave a file in the other folder": leaves_in("/var/tmp"),
    "list devices": Attack("import os; print(sorted(os.listdir('/dev')))", printed("'tty'")),
    "open the terminal": Attack(
        "import os; os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY); print('TERMINAL')", printed("TERMINAL")
    ),
    "read the kernel's settings": Attack("print('KERNEL', open('/proc/sys/kernel/hostname').read())", printed("KERNEL")),
}
