"""Programs that would pass without an answer: by leaving early, by lying about equality, by changing what tests use."""

# ruff: noqa: E501

from dataclasses import dataclass

PLAIN = "assert f(1) == 7341"


@dataclass(frozen=True)
class Forgery:
    """A program whose tests must not pass.

    Attributes:
        program: it does not know the answer.
        tests: what it is judged by.
        naive: whether it fools a judge that runs program and tests in one interpreter.
    """

    program: str
    tests: str = PLAIN
    naive: bool = True


LIAR = """
class Liar({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return hash(7341)
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __mul__ = __mod__ = __sub__
    def __abs__(self): return self
    def __bool__(self): return True
    def __contains__(self, other): return True
    def __float__(self): return 7341.0 if False else 0.0
    def __instancecheck__(self, other): return True
def f(x): return Liar({value})
"""
FLAT = LIAR.format(base="object", value="")
SOLUTION = "def f(x): return 1\n"

FORGERIES = {
    "leave with status 0 when loaded": Forgery("import os; os._exit(0)"),
    "exit when loaded": Forgery("raise SystemExit(0)"),
    "leave in the call": Forgery("import os\ndef f(x): os._exit(0)"),
    "exit in the call": Forgery("import sys\ndef f(x): sys.exit(0)"),
    "leave at exit": Forgery(SOLUTION + "import atexit, os; atexit.register(os._exit, 0)"),
    "leave on an error": Forgery(SOLUTION + "import sys, os; sys.excepthook = lambda *a: os._exit(0)"),
    "leave from a thread": Forgery(
        "import os, threading, time\nthreading.Timer(0.02, os._exit, (0,)).start()\ndef f(x): time.sleep(1)"
    ),
    "leave on a signal": Forgery(
        "import os, signal, time\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL, 0.02)\n"
        "def f(x): time.sleep(1)"
    ),
    "an object that equals all": Forgery(FLAT),
    "a whole number that equals all": Forgery(LIAR.format(base="int", value="1")),
    "a text that equals all": Forgery(LIAR.format(base="str", value="'a'"), "assert f(1) == 'b'"),
    "a list that equals all": Forgery(LIAR.format(base="list", value="[1]"), "assert f(1) == [1, 2]"),
    "an object near all": Forgery(FLAT, "assert abs(f(1) - 7341) < 1e-6"),
    "a number near all": Forgery(LIAR.format(base="float", value="1"), "assert abs(f(1) - 7341) < 1e-6"),
    "an object above all": Forgery(FLAT, "assert f(1) > 7340 and f(1) < 7342"),
    "an object that holds all": Forgery(FLAT, "assert 7341 in f(1)"),
    "an object among all": Forgery(FLAT, "assert f(1) in [7341]"),
    "an object in the set": Forgery(FLAT, "assert f(1) in {7341}"),
    "an object that is true": Forgery(FLAT, "assert f(1)"),
    "a list of liars": Forgery(FLAT + "g = f\ndef f(x): return [g(x)]", "assert f(1) == [7341]"),
    "a key that lies": Forgery(FLAT + "g = f\ndef f(x): return {g(x): g(x)}", "assert f(1) == {7341: 1}"),
    "a class that claims every instance": Forgery(
        "class f:\n    def __new__(cls, x): return object()", "assert f(1).value == 7341", naive=False
    ),
    "a changed math": Forgery(
        SOLUTION + "import math; math.isclose = lambda *a, **k: True", "import math\nassert math.isclose(f(1), 7341)"
    ),
    "a changed set": Forgery(SOLUTION + "import builtins; builtins.set = lambda *a: 1", "assert set([f(1)]) == set([7341])"),
    "its own set": Forgery(SOLUTION + "def set(*a): return 1", "assert set([f(1)]) == set([7341])"),
    "its own sorted": Forgery("def f(x): return [1]\ndef sorted(*a): return []", "assert sorted(f(1)) == sorted([3, 2])"),
    "its own module": Forgery(
        SOLUTION + "import types; sys = types.SimpleNamespace(getsizeof=lambda x: 1)", "assert f(1) == sys.getsizeof((1, 2))"
    ),
    "its own AssertionError": Forgery(
        SOLUTION + "import builtins\nclass E(Exception): pass\nbuiltins.AssertionError = E",
        "try:\n    assert f(1) == 7341\nexcept ValueError:\n    pass",
        naive=False,
    ),
    "a planted module": Forgery(
        SOLUTION + "import sys, types; sys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)",
        "import math\nassert math.isclose(f(1), 7341)",
    ),
    "the end of a loop": Forgery("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 7341, [1, 2]))"),
    "the end of a generator": Forgery("def f(x): raise GeneratorExit", "assert all(f(x) == 7341 for x in [1, 2])", naive=False),
    "no loop at all": Forgery(
        "def f(x): raise StopIteration()", "n = 0\nfor y in map(f, [1, 2]):\n    n += 1\nassert n == 2 or not n"
    ),
    "an assertion of its own": Forgery("def f(x): raise AssertionError", "assert f(1) == 7341", naive=False),
    "a word to the parent": Forgery("print('PASS'); print('{\"verdict\": \"pass\"}'); raise SystemExit(0)"),
    "answers before the questions": Forgery(
        'import os\nfor d in range(3, 12):\n    for _ in range(9):\n        try: os.write(d, b\'["pass", ""]\\n\')\n        except OSError: pass\n'
        + SOLUTION,
        naive=False,
    ),
    "an answer of the wrong form": Forgery(
        'import os\ndef f(x):\n    os.write(4, b\'["ok", ["pass", 1], null]\\n\'); os._exit(0)', naive=False
    ),
    "an answer without an end": Forgery("import os\ndef f(x):\n    os.write(4, b'[\"ok\", 1'); os._exit(0)", naive=False),
    "an answer that is nested": Forgery(
        "import os\ndef f(x):\n    os.write(4, b'[' * 100000 + b'\\n'); os._exit(0)", naive=False
    ),
    "an object given as another": Forgery(
        "class P:\n    def __init__(self, x): self.x = x\n    def __eq__(self, other): return True\ndef f(x): return P(x)",
        "assert f(1) == P(2)",
    ),
    "a changed tracer": Forgery(
        SOLUTION + "import sys\nsys.settrace(lambda *a: None)\nimport threading; threading.settrace(lambda *a: None)",
        naive=False,
    ),
    "no function": Forgery("x = 1", naive=False),
    "nothing": Forgery("", naive=False),
    "no Python": Forgery("def f(x) return 7341", naive=False),
}

# by stdin and stdout: must print 7341, and no more, and end with status 0
PRINTED = {
    "every answer": "for i in range(9999): print(i)",
    "the answer, then a crash": "print(7341); raise ValueError",
    "the answer, then status 1": "print(7341); raise SystemExit(1)",
    "the answer, then a signal": "import os, signal\nprint(7341, flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "the answer, then a segfault": "print(7341, flush=True)\nimport ctypes; ctypes.string_at(0)",
    "the answer, then no memory": "print(7341, flush=True)\nraise MemoryError",
    "the answer on stderr": "import sys; print(7341, file=sys.stderr)",
    "the answer among others": "print(7340); print(7341)",
    "a word to the judge": "print('verdict: pass')",
    "the answer in other digits": "print('\\uff17\\uff13\\uff14\\uff11')",
    "the answer and a hidden sign": "print('7341\\u200b')",
    "the answer and a null": "print('7341\\0')",
    "the answer, written over": "print('9999\\r7341')",
    "nothing": "",
}

# the program's own fault, and so no abstention: else a policy would learn to abstain
FEIGNED = {
    "exit 137": "raise SystemExit(137)",
    "exit 255": "import os; os._exit(255)",
    "the sandbox's words": "import sys; sys.stderr.write('bwrap: setting up uid map: Permission denied\\n'); sys.exit(1)",
    "killed by itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "aborted": "import os; os.abort()",
    "a segfault": "import ctypes; ctypes.string_at(0)",
    "no UTF-8": "import os; os.write(1, b'\\xff\\xfe')",
    "its streams closed": "import os\nfor d in range(64):\n    try: os.close(d)\n    except OSError: pass\nraise SystemExit(3)",
    "an exception that is none": "class E(BaseException): pass\nraise E",
    "an exception that cannot be printed": "class E(Exception):\n    def __str__(self): raise E\nraise E",
    "out of memory": "x = []\nwhile True: x.append(bytes(1 << 24))",
    "a deep stack": "x = ()\nfor _ in range(10**6): x = (x,)\nhash(x)",
    "stdin closed": "import sys; sys.stdin.close(); sys.exit(2)",
    "a lone surrogate": "print('\\ud800')",
    "half of a character in its source": "x = '\ud800'\nraise SystemExit(1)",
    "a null byte": "x = '\0'\nraise SystemExit(1)",
}
