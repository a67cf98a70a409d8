"""How a row asks for a program to be repaired, the same in every source."""

from potstill.sources._published import unix


def repair(program: str, *, task: str = "", message: str = "") -> str:
    """What is asked: the task where it is known, the broken program, and what was said of it."""
    parts = ["Repair the program."]
    parts += [f"Task: {task.strip()}"] if task.strip() else []
    parts += [f"Program:\n```python\n{unix(program)}\n```"]
    parts += [f"Message:\n{message.strip()}"] if message.strip() else []
    return "\n\n".join(parts)
