"""Programs and assert tests: what passes, and in which words the others fail."""

# ruff: noqa: E501
# fmt: off

NODE = """
class Node:
    def __init__(self, value, left=None):
        self.value, self.left, self.items = value, left, [1]
    def depth(self): return 1 + (self.left.depth() if self.left else 0)
    def __len__(self): return 7
    def __getitem__(self, key): return key * 2
    def __str__(self): return f'<{self.value}>'
    def __repr__(self): return 'Node'
    @property
    def double(self): return self.value * 2
    @staticmethod
    def made(): return Node(5)
"""
SORTS = "def sort(x): x.sort()\ndef deep(x): x['a'][0].append(3); x['b'] = {1}\ndef both(x, *, y): x.add(9); y.clear()"

PASSES = {
    "a function": ("def f(x): return x + 1", "assert f(1) == 2"),
    "keywords and defaults": ("def f(x, *, y=2): return x * y", "assert f(3, y=4) == 12 and f(3) == 6"),
    "plain values": ("def f(x): return x", "for x in (None, True, 1, 2**200, 1.5, 'é', b'a', [1], (1, [2]), {1}, {1: {2: 3}}, 1j, frozenset({1})):\n    assert f(x) == x and type(f(x)) is type(x)"),
    "nothing and infinity": ("def f(x): return x * 2", "import math\nassert math.isnan(f(math.nan)) and f(math.inf) == math.inf"),
    "near": ("def f(x): return x / 3", "import math\nassert math.isclose(f(1), 0.3333333333, rel_tol=1e-6)\nassert abs(f(1) - 0.3333) < 1e-3"),
    "sets and order": ("def f(x): return [3, 1, 2]", "assert set(f(0)) == {1, 2, 3}\nassert sorted(f(0)) == [1, 2, 3]\nassert len(f(0)) == 3"),
    "a module without an import": ("def f(x): return 5", "assert f(1) < sys.maxsize"),
    "a name of a built-in function": ("def sum(a, b): return a * b", "assert sum(3, 4) == 12"),
    "a check": ("def f(x): return x", "def check(candidate):\n    assert candidate(1) == 1\n    assert [candidate(i) for i in range(3)] == [0, 1, 2]\ncheck(f)"),
    "functions for a runner": ("def f(x): return x", "def test_one():\n    assert f(1) == 1\ndef test_two(x):\n    assert False"),
    "an exception": ("def f(x): raise ValueError('bad', x)", "try:\n    f(3)\n    assert False\nexcept ValueError as e:\n    assert e.args == ('bad', 3) and str(e) == \"('bad', 3)\""),
    "an exception of its own": ("class Bad(KeyError): pass\ndef f(x): raise Bad(x)", "try:\n    f(3)\n    assert False\nexcept Bad as e:\n    assert e.args == (3,)"),
    "an exception by its base": ("class Bad(KeyError): pass\ndef f(x): raise Bad(x)", "try:\n    f(3)\n    assert False\nexcept LookupError:\n    pass"),
    "unittest's assertRaises": ("def f(x): return 1 / x", "import unittest\nt = unittest.TestCase()\nwith t.assertRaises(ZeroDivisionError):\n    f(0)\nt.assertEqual(f(1), 1)"),
    "an exit": ("import sys\ndef f(x): sys.exit(3)", "try:\n    f(1)\n    assert False\nexcept SystemExit as e:\n    assert e.code == 3"),
    "a list changed in place": (SORTS, "x = [3, 1, 2]\ny = x\nsort(x)\nassert x == [1, 2, 3] and y is x"),
    "what a dict holds, changed": (SORTS, "inner = [1]\nx = {'a': [inner]}\ndeep(x)\nassert inner == [1, 3] and x == {'a': [[1, 3]], 'b': {1}}"),
    "sets and keywords changed": (SORTS, "x, y = {1}, [1, 2]\nboth(x, y=y)\nassert x == {1, 9} and y == []"),
    "a constant": ("LIMIT = [1, 2]", "assert LIMIT == [1, 2]"),
    "an object": (NODE, "n = Node(3)\nassert n.value == 3 and n.double == 6 and n.items == [1]\nn.left = Node(4)\nassert n.depth() == 2 and n.left.value == 4"),
    "objects as arguments": (NODE + "def f(nodes): return [n.value for n in nodes]", "assert f([Node(1), Node(2)]) == [1, 2]"),
    "an object's length, items and text": (NODE, "n = Node(1)\nassert len(n) == 7 and n[4] == 8 and str(n) == '<1>' and repr(n) == 'Node'"),
    "an object is itself": (NODE + "def f(n): return n", "n = Node(1)\nassert f(n) is n and f(n) == n and n != Node(1) and n != 1 and n in [n]"),
    "a static method": (NODE, "assert Node.made().value == 5"),
    "an instance": (NODE, "assert isinstance(Node(1), Node) and not isinstance(3, Node)"),
    "a generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2] and next(f(3)) == 0 and sum(x for x in f(4)) == 6"),
    "an endless generator": ("def f():\n    n = 0\n    while True:\n        yield n\n        n += 1", "from itertools import islice\nassert list(islice(f(), 3)) == [0, 1, 2]"),
    "views": ("def f(d): return d.keys()", "assert sorted(f({2: 1, 1: 2})) == [1, 2]"),
    "a dict of another kind": ("from collections import Counter, OrderedDict, defaultdict\ndef f(s): return Counter(s)", "assert f('aab') == {'a': 2, 'b': 1}"),
    "a named tuple": ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)", "assert f() == (1, 2)"),
    "built-in functions as arguments": ("def f(g, x): return g(x)", "import math\nassert f(max, [1, 2]) == 2 and f(math.floor, 1.5) == 1 and f(int, '3') == 3"),
    "its own functions as arguments": ("def g(x): return x + 1\ndef f(h): return h(1)", "assert f(g) == 2"),
    "a closure": ("def adder(n): return lambda x: x + n", "assert adder(3)(4) == 7"),
    "its prints": ("def f(x):\n    print(x); return x", "print('hello')\nassert f(1) == 1"),
    "a main guard": ("def f(x): return x\nif __name__ == '__main__':\n    f(input())", "assert f(1) == 1"),
    "a dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nimport pickle\ndef f(x): return pickle.loads(pickle.dumps(P(x))).x", "assert f(3) == 3"),
    "True is 1": ("def f(x): return True", "assert f(1) == 1"),
    "Windows line ends": ("def f(x):\r\n\treturn x\r\n", "x = 1\r\nassert f(x) == 1\r\n"),
    "a message": ("def f(x): return x", "assert f(1) == 1, 'must be the same'"),
}

FAILS = {
    "a wrong value": ("def f(x): return 5", "x = 1\nassert f(x) == 4", "fail", "line 2: assert f(x) == 4: does not hold; the last call gave 5"),
    "a message": ("def f(x): return 5", "assert f(1) == 4, 'small'", "fail", "line 1: assert f(1) == 4, 'small': does not hold (small); the last call gave 5"),
    "a place inside a function": ("def f(x): return 5", "def check(g):\n    assert g(1) == 4\ncheck(f)", "fail", "line 2: assert g(1) == 4: does not hold; the last call gave 5"),
    "no call": ("def f(x): return 5", "assert f is None", "fail", "line 1: assert f is None: does not hold; the last call gave None"),
    "a list of objects": ("class A:\n    def __repr__(self): raise ValueError\ndef f(x): return [A()]", "assert f(1) == [1]", "fail", "line 1: assert f(1) == [1]: does not hold; the last call gave [an object of the program's A]"),
    "an object as the message": ("class A: pass\ndef f(x): return A()", "y = f(1)\nassert y == 1, y", "fail", "line 2: assert y == 1, y: does not hold (an object of the program's A); the last call gave an object of the program's A"),
    "a number of many digits": ("def f(x): return 10 ** 5000", "assert f(1) == 1", "fail", "line 1: assert f(1) == 1: does not hold; the last call gave a value of type int"),
    "a function for a runner": ("def f(x): return 5", "def test_one():\n    assert f(1) == 1", "fail", "line 2: assert f(1) == 1: does not hold; the last call gave 5"),
    "a judge that is killed": ("def f(x): return 5", "import signal\nf(1)\nsignal.raise_signal(9)", "abstain", "sandbox: the judge was killed"),
    "no such function": ("def g(x): return 5", "assert f(1) == 5", "fail", "the program defines no 'f'"),
    "a wrong type": ("def f(x): return None", "assert f(1) + 1 == 2", "fail", "line 1: assert f(1) + 1 == 2: TypeError: unsupported operand type(s) for +: 'NoneType' and 'int'"),
    "an exception": ("def f(x): return 1 / 0", "assert f(1) == 4", "crash", "line 1: assert f(1) == 4: ZeroDivisionError: division by zero"),
    "an exception when loaded": ("1 / 0", "assert f(1) == 4", "crash", "ZeroDivisionError: division by zero"),
    "no Python": ("def f(x) return", "assert f(1) == 4", "crash", "SyntaxError: expected ':' (<program>, line 1)"),
    "leaving": ("import os\ndef f(x): os._exit(0)", "assert f(1) == 4", "crash", "the program left before its tests had ended"),
    "leaving with a status": ("import os\ndef f(x): os._exit(3)", "assert f(1) == 4", "crash", "status 3"),
    "a signal": ("import os\ndef f(x): os.kill(os.getpid(), 9)", "assert f(1) == 4", "crash", "ended by SIGKILL"),
    "no memory": ("def f(x): raise MemoryError", "assert f(1) == 4", "memory", "MemoryError"),
    "leaving, and a test that swallows it": ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept BaseException:\n    pass", "crash", "the program left before its tests had ended"),
    "an object in place of a value": ("def f(x): return object()", "assert f(1)", "fail", "line 1: assert f(1): an object of the program's object where a plain value must be"),
    "what holds itself": ("def f(x):\n    x = []; x.append(x); return x", "assert f(1) == 4", "fail", "line 1: assert f(1) == 4: a value nested more than 64 deep"),
    "too much": ("def f(x): return 'x' * (9 << 20)", "assert f(1) == 4", "fail", "line 1: assert f(1) == 4: a value of more than 8 MiB"),
    "a check that is not called": ("def f(x): return x", "def check(candidate):\n    assert f(1) == 1", "fail", "the tests called nothing that the program defines"),
    "tests that pass their own function": ("def f(g): return g(1)", "assert f(lambda x: x) == 1", "fail", "line 1: assert f(lambda x: x) == 1: the tests pass a function of their own, which cannot cross into the program"),
    "tests that run text": ("def f(x): return '3'", "assert eval(f(1)) == 3", "fail", "line 1: assert eval(f(1)) == 3: NameError: name 'eval' is not defined"),
    "tests that write": ("def f(x): return 'a'", "f(1)\nopen('/tmp/potstill-must-not-be', 'w')", "fail", "line 2: open('/tmp/potstill-must-not-be', 'w'): PermissionError: a test may not do this: open"),
    "tests that start something": ("def f(x): return 'a'", "import os\nos.system(f(1))", "fail", "line 2: os.system(f(1)): PermissionError: a test may not do this: os.system"),
    "tests without memory for an answer": ("def f(x): return 1 << 30", "assert bytearray(f(1)) == []", "fail", "line 1: assert bytearray(f(1)) == []: MemoryError: "),
}
