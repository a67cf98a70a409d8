"""A `Modelfile`: how Ollama runs an exported file, with the template, system message and ends that were trained.

Ollama runs no Jinja. It compares a file's chat template with those that it knows and, where none is near, sends the bare
question; so the trained template stands here in Go's language. Facts from its documentation and source (server/model.go,
template/template.go, parser/parser.go), read in 2026.
"""

from collections.abc import Sequence
from typing import Any

from potstill.data.pieces import Opening, Pieces, pieces_of
from potstill.edges.tokens import beginning, decode
from potstill.exporters._ends import end_ids

MOST_POSITIONS = 4096  # Ollama reserves memory for all of them at once
_LAST = "eq (len (slice $.Messages $i)) 1"


def modelfile(model: Any, tokenizer: Any, files: Sequence[str]) -> str:
    """The text of a `Modelfile` for the first of these GGUF files, which lie beside it.

    Args:
        tokenizer: its chat template is the trained one.
    """
    positions = model.config.max_position_embeddings
    lines = ["# ollama create NAME -f Modelfile && ollama run NAME", f"FROM ./{files[0]}"]
    lines += [f"# FROM ./{name}" for name in files[1:]]
    lines += _template_lines(tokenizer)
    shown = f" of the model's {positions:,}" if positions > MOST_POSITIONS else ""
    lines += [f"# positions{shown}: questions and answers together", f"PARAMETER num_ctx {min(positions, MOST_POSITIONS)}"]
    lines += ["# the likeliest token each time, as the model was measured", "PARAMETER temperature 0"]
    ends = [decode(tokenizer, [end]) for end in end_ids(model, tokenizer)]
    lines += [f'PARAMETER stop "{end}"' for end in ends if _plain(end) and '"' not in end and "\n" not in end]
    return "\n".join([*lines, ""])


def _template_lines(tokenizer: Any) -> list[str]:
    if not tokenizer.chat_template:
        return ["# no chat template: the model goes on with the text that it is given", 'TEMPLATE """{{ .Prompt }}"""']
    pieces = pieces_of(tokenizer)
    if pieces is None:
        return [
            "# No TEMPLATE: Go's language cannot write what the trained chat template writes, and Ollama will guess one.",
            "# llama-server and LM Studio read the trained template from the file.",
        ]
    lines = []
    if pieces.trims or pieces.trims_system:
        lines.append("# Unlike the trained template this one keeps white space around what is said: Go has no word for it.")
    if pieces.forgets_thoughts:
        lines.append("# Unlike the trained template this one keeps the thoughts of earlier answers.")
    lines.append(f'TEMPLATE """{go_template(pieces, _added(tokenizer))}"""')
    system = pieces.system_text()
    if system.strip() and _plain(system):
        lines.append(f'SYSTEM """{system}"""')
    return lines


def _added(tokenizer: Any) -> str:
    """What the runtime puts before a prompt by itself, so that a template must not write it again."""
    return "".join(tokenizer.convert_ids_to_tokens(beginning(tokenizer)))


def go_template(pieces: Pieces, added: str = "") -> str:
    """A template in Go's language that writes a conversation as the pieces do, outer white space and thoughts apart.

    Args:
        added: the text of the tokens that the runtime itself puts before every prompt.
    """
    alone, several = _opening(pieces.alone, added), _opening(pieces.several, added)
    if alone == several and pieces.last == pieces.again:
        opening, between, asked = alone, _text(pieces.again), ""
    else:  # $n has a letter for each question that is still to come
        count = "{{ $n := `` }}{{ range .Messages }}{{ if eq .Role `user` }}{{ $n = print $n `x` }}{{ end }}{{ end }}"
        opening = count + _either("eq $n `x`", alone, several)
        between = _either("eq $n `x`", _text(pieces.last), _text(pieces.again))
        asked = "{{ $n = slice $n 1 }}"
    user = "{{ .Content }}" + asked + _either(_LAST, _text(pieces.closing), _text(pieces.answered))
    said = "{{ .Content }}" + _either(_LAST, "", between)
    turns = f"{{{{ if eq .Role `user` }}}}{user}{{{{ else if eq .Role `assistant` }}}}{said}{{{{ end }}}}"
    return f"{opening}{{{{ range $i, $_ := .Messages }}}}{turns}{{{{ end }}}}"


def _either(condition: str, one: str, other: str) -> str:
    if one == other:
        return one
    return f"{{{{ if {condition} }}}}{one}{{{{ else }}}}{other}{{{{ end }}}}"


def _opening(opening: Opening, added: str) -> str:
    bare = opening.bare.removeprefix(added)
    if opening.system is None:
        return _text(bare)
    before, after = opening.system[0].removeprefix(added), opening.system[1]
    return _either(".System", f"{_text(before)}{{{{ .System }}}}{_text(after)}", _text(bare))


def _plain(text: str) -> bool:
    """Whether Ollama's parser takes a text between three quotes as it is; it drops what does not print."""
    return '"""' not in text and all(sign.isprintable() or sign == "\n" for sign in text)


def _text(text: str) -> str:
    """A text in a template: as it is, or as Go's string where the template's or the file's language would read it."""
    if _plain(text) and "{" not in text and "}" not in text:
        return text
    return '{{ "' + "".join(_escaped(sign) for sign in text) + '" }}'


def _escaped(sign: str) -> str:
    if sign in '"\\{}' or not sign.isprintable():
        return f"\\U{ord(sign):08x}"
    return sign
