"""Which part of an answer is thought, answer and program."""

import pytest

from potstill.scorers.code import program_of
from potstill.scorers.thoughts import answer_of, strict, thought_of

FENCED = "```python\nprint(1)\n```"


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>a</think><answer>b</answer>", "a", "b"),
        ("<think>a</think>\nb", "a", "b"),
        ("a</think>b", "a", "b"),
        ("<think>a", "a", ""),
        ("b", "", "b"),
        ("<answer>b</answer> and more", "", "b"),
        ("<answer>b", "", "b"),
        ("<answer>a</answer><answer>b</answer>", "", "b"),
        ("<think>a<think>b</think>c</think>d", "a<think>b</think>c", "d"),
        ("<think>a</think><think>b", "a", ""),
        ("<think><answer>a</answer></think>b", "<answer>a</answer>", "b"),
        ("", "", ""),
    ],
)
def test_parts(text: str, thought: str, answer: str) -> None:
    assert (thought_of(text), answer_of(text)) == (thought, answer)


def test_strict_parts_are_those_of_the_partial_reading() -> None:
    text = "<think>\na\n</think>\n<answer>\nb\n</answer>"
    parts = strict(text)
    assert parts is not None
    assert (parts.thought, parts.answer) == (thought_of(text), answer_of(text)) == ("a", "b")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (FENCED, "print(1)"),
        (f"Here it is:\n{FENCED}\nIt prints 1.", "print(1)"),
        (f"{FENCED}\nor\n```py\nprint(2)\n```", "print(2)"),
        (f"{FENCED}\nOutput:\n```\n1\n```", "print(1)"),
        (f"{FENCED}\nOutput:\n```text\n1\n```", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("```bash\nls\n```", ""),
        ("```Python3\nprint(1)\n```", "print(1)"),
        ("~~~python\nprint(1)\n~~~", "print(1)"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("```python\nprint(1)", "print(1)"),
        ("```python\r\nif x:\r\n  y\r\n```", "if x:\n  y"),
        ("print(1)", "print(1)"),
        ("  print(1)\n", "print(1)"),
        ("so `print(1)`", "so `print(1)`"),
        (f"<think>\n{FENCED}\n</think>\nprint(2)", "print(2)"),
        (f"<think>\n{FENCED}", ""),
        (f"<think>a</think>\n<answer>\n{FENCED}\n</answer>\n```python\nprint(3)\n```", "print(1)"),
        ("", ""),
        ("```python\n```", ""),
    ],
)
def test_programs(text: str, program: str) -> None:
    assert program_of(text) == program
