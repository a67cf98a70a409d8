"""Chat templates of every habit, and tokenizers that have them."""

from typing import Any

from tiny_parts import chat_tokenizer

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ASKED
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
NO_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ASKED
RAISES = CHATML.replace(
    TURN, "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURN
)
NO_PROMPT = "{% for m in messages %}" + TURN + "{% endfor %}"
OTHER_HEADER = CHATML.replace(ASKED, "{% if add_generation_prompt %}{{ '<|im_start|>A\n' }}{% endif %}")
NO_ANSWERS = "{% for m in messages %}{% if m['role'] == 'user' %}" + TURN + "{% endif %}{% endfor %}" + ASKED
UPPER = CHATML.replace("m['content']", "(m['content'] | upper if m['role'] == 'assistant' else m['content'])")
DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
EMPTY_THOUGHT = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in c %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}" + ASKED
)
OPENS_THOUGHT = (
    "{% for m in messages %}{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
OPEN_LAST = CHATML.replace(
    " + '<|im_end|>\n' }}", " }}{% if not loop.last or m['role'] == 'user' %}{{ '<|im_end|>\n' }}{% endif %}"
)
NO_ENDS = CHATML.replace("<|im_end|>", "")
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASKED
)


def tokenizer_with(
    template: str | None, *, added: tuple[str, ...] = ("<think>", "</think>"), special: tuple[str, ...] = ()
) -> Any:
    """ChatML's tokenizer with another template and more tokens of both kinds."""
    from tokenizers import AddedToken

    tokenizer = chat_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    tokenizer.chat_template = template
    return tokenizer


def with_bos(tokenizer: Any, bos: str = "<s>") -> Any:
    """The tokenizer with a BOS that `tokenizer(text)` writes."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": bos})
    id = tokenizer.convert_tokens_to_ids(bos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, id)])
    assert tokenizer("a").input_ids[0] == id
    return tokenizer
