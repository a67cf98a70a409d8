"""The chat template that travels with a trained model: it writes what was trained, for programs that know nothing of us."""

import json
import re
from datetime import date
from typing import Any

from potstill.core.types import Example
from potstill.data.prompts import PLAIN, Prompts, Renderer
from potstill.data.templates import TAGS, dated
from potstill.edges.tokens import beginning

_MERGE_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' and messages|length > 1 %}"
    "{%- set potstill_merged = namespace(messages=[], waits=true) %}{%- for message in messages[1:] %}"
    "{%- if potstill_merged.waits and message['role'] == 'user' %}{%- set potstill_merged.waits = false %}"
    "{%- set potstill_merged.messages = potstill_merged.messages + [{'role': 'user',"
    " 'content': messages[0]['content'] + '\\n\\n' + message['content']}] %}"
    "{%- else %}{%- set potstill_merged.messages = potstill_merged.messages + [message] %}{%- endif %}{%- endfor %}"
    "{%- set messages = potstill_merged.messages %}{%- endif %}"
)


def exported_template(tokenizer: Any, prompts: Prompts) -> str:
    """A Jinja chat template whose text, tokenised with its added tokens, is what was trained: BOS once, system text, date and
    all else that `prompts` names written into it.

    With `alpaca` and `alpaca_es` the last user message is the instruction, its key `context`, where it has one, the context.

    Raises:
        UserError: as `Renderer`.
    """
    Renderer(tokenizer, prompts)  # refuses what could not be trained either
    bos = "".join(tokenizer.convert_ids_to_tokens(beginning(tokenizer)))
    if prompts.format != "chat":
        return _plain(prompts, bos, tokenizer.eos_token)
    body = dated(_one_template(tokenizer.chat_template), date.fromisoformat(prompts.date) if prompts.date else None)
    return _wrapped(body, prompts, bos if bos and not _writes(tokenizer, prompts, bos) else "")


def _one_template(template: str | dict[str, str]) -> str:
    """One template for several: that of tools where there are tools, as transformers chooses."""
    if isinstance(template, str):
        return template
    if "tool_use" not in template:
        return template["default"]
    # expressions keep the parts' own first and last white space, which blocks beside them would strip
    use, plain = (
        "{{- '' }}" + re.sub(r"\A[ \t]+(?=\{%)", "", template[name]).removesuffix("\n") + "{{ '' }}"
        for name in ("tool_use", "default")
    )
    return f"{{%- if tools %}}{use}{{% else %}}{plain}{{% endif %}}"


def _writes(tokenizer: Any, prompts: Prompts, bos: str) -> bool:
    """Whether the template writes BOS itself."""
    return Renderer(tokenizer, prompts).text(Example("", "x", "x"), "").startswith(bos)


def _wrapped(body: str, prompts: Prompts, bos: str) -> str:
    before = [f"{{%- set {name} = {_literal(value)} %}}" for name, value in sorted(prompts.variables.items())]
    if prompts.system is not None:
        before.append(
            "{%- if messages[0]['role'] != 'system' %}"
            f"{{%- set messages = [{{'role': 'system', 'content': {_literal(prompts.system)}}}] + messages %}}{{%- endif %}}"
        )
    if prompts.system_turn == "user":
        before.append(_MERGE_SYSTEM)
    if prompts.thinking == "strip":
        before.append(_strip_reasoning())
    after = ""
    if prompts.generation_prompt is not None:
        before.append(
            "{%- set potstill_answers = add_generation_prompt is defined and add_generation_prompt %}"
            "{%- set add_generation_prompt = false %}"
        )
        after = f"{{{{ {_literal(prompts.generation_prompt)} if potstill_answers else '' }}}}"
    if not (before or bos or after):
        return body
    body = re.sub(r"\A[ \t]+(?=\{%)", "", body)  # which only stands at the start of a line to be stripped
    # an expression between keeps the template's own first and last white space out of reach of our blocks
    return f"{''.join(before)}{{{{- {_literal(bos)} }}}}{body.removesuffix(chr(10)) if after else body}{after}"


def _strip_reasoning() -> str:
    shorter = "".join(
        f"{{%- if '</{tag}>' in potstill.text %}}{{%- set potstill.text = potstill.text.split('</{tag}>')[-1].lstrip() %}}"
        "{%- endif %}"
        for tag in TAGS
    )
    return (
        "{%- set potstill = namespace(messages=[], text='') %}{%- for message in messages %}"
        "{%- if message['role'] == 'assistant' and (message['content'] is string or not message['content']) %}"
        f"{{%- set potstill.text = message['content'] or '' %}}{shorter}"
        "{%- if message['tool_calls'] %}{%- set potstill.messages = potstill.messages +"
        " [{'role': 'assistant', 'content': potstill.text, 'tool_calls': message['tool_calls']}] %}"
        "{%- else %}"
        "{%- set potstill.messages = potstill.messages + [{'role': 'assistant', 'content': potstill.text}] %}{%- endif %}"
        "{%- else %}{%- set potstill.messages = potstill.messages + [message] %}{%- endif %}{%- endfor %}"
        "{%- set messages = potstill.messages %}"
    )


def _plain(prompts: Prompts, bos: str, eos: str) -> str:
    bare, with_context = PLAIN[prompts.format]
    content = "message['content']"
    strip = _strip_reasoning() if prompts.thinking == "strip" else ""
    return (
        f"{strip}{{{{- {_literal(bos)} }}}}{{%- set ns = namespace(last=-1) %}}{{%- for message in messages %}}"
        "{%- if message['role'] == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}"
        f"{{%- if loop.index0 < ns.last %}}{{{{- {content} + '\\n\\n' }}}}"
        "{%- elif loop.index0 == ns.last %}"
        f"{{%- if message['context'] %}}{{{{- {_filled(with_context)} }}}}"
        f"{{%- else %}}{{{{- {_filled(bare)} }}}}{{%- endif %}}"
        f"{{%- else %}}{{{{- {content} + {_literal(eos)} }}}}{{%- endif %}}{{%- endfor %}}"
    )


def _filled(form: str) -> str:
    """A plain form as a Jinja expression."""
    fields = {"{instruction}": "message['content']", "{context}": "message['context']"}
    parts = re.split(r"(\{instruction\}|\{context\})", form)
    return " + ".join(fields.get(part) or _literal(part) for part in parts if part)


def _literal(value: Any) -> str:
    """A value as Jinja writes it; text in single quotes, which every engine reads alike."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return json.dumps(value)
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f"'{escaped}'"
