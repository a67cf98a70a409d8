"""Tokenizers: loading, and whether two of them, or one and a model, speak of the same tokens."""

from typing import Any

from potstill.core.artifact import fingerprint
from potstill.core.errors import UserError
from potstill.edges import gguf_files
from potstill.edges.hub import commit_of, folder_of, gguf_of, hub_errors, hub_name, library

Model = Any  # transformers.PreTrainedModel
Tokenizer = Any  # transformers.PreTrainedTokenizerBase


def load_tokenizer(where: str) -> Tokenizer:
    """The tokenizer of `path:…` or `hf:…`.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    if (gguf := gguf_of(where)) is not None:
        return gguf_files.tokenizer_of(gguf_files.read(where, gguf))
    transformers = library()
    folder = folder_of(where)
    if folder is None:
        name, revision = hub_name(where)
        with hub_errors(name):
            return transformers.AutoTokenizer.from_pretrained(name, revision=commit_of(name, revision), trust_remote_code=False)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"{where}: holds no tokenizer (tokenizer.json); copy it from the model it was trained from")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{where}: the tokenizer cannot be read ({str(error).splitlines()[0][:160]})") from error


def tokenizer_note(where: str) -> str:
    """What a person must know of the tokenizer of `path:…` or `hf:…` before trusting it, in one line; "" where nothing.

    Raises:
        UserError: there is no such file.
    """
    gguf = gguf_of(where)
    return gguf_files.byte_level_note(gguf_files.read(where, gguf)) if gguf is not None else ""


def form_of(tokenizer: Tokenizer) -> str:
    """A fingerprint of all that decides how a tokenizer renders text and conversations; equal ones read rows alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else id(tokenizer)  # without one: equal to itself alone
    habits = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces")]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint([type(tokenizer).__name__, rules, habits, special, tokenizer.chat_template])


def check_vocabulary(model: Model, tokenizer: Tokenizer, where: str) -> None:
    """Refuse a model that has no embedding for some of its tokenizer's tokens.

    Raises:
        UserError: tokens were added to the tokenizer, and not to the model.
    """
    check_rows(model.get_input_embeddings().weight.shape[0], tokenizer, where)


def check_rows(rows: int, tokenizer: Tokenizer, where: str) -> None:
    """`check_vocabulary` of a model that is not loaded, by the rows of its embedding."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        raise UserError(
            f"{where}: the tokenizer has {tokens:,} tokens and the model only {rows:,} embeddings; "
            "call model.resize_token_embeddings(len(tokenizer)) and save it again"
        )


def other_tokens(first: Tokenizer, other: Tokenizer, first_name: str = "the first", other_name: str = "this one") -> str:
    """How two tokenizers differ, in words; "" where their tokens mean the same, see `shared_vocabulary`."""
    if first is other:
        return ""
    try:
        shared_vocabulary(first, other, first_name, other_name)
    except UserError as error:
        return str(error).partition("; white-box")[0]
    return ""


def shared_vocabulary(
    teacher: Tokenizer, student: Tokenizer, teacher_name: str = "teacher", student_name: str = "student"
) -> int:
    """How many leading token ids mean the same to both; logits are sliced to these, never padded.

    One of the two may have added tokens behind the last of the other; rows that hold them are refused, see `check_known`.

    Raises:
        UserError: the tokenizers differ, with the first id or setting where they do.
    """
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    fewer, more = sorted((theirs, ours), key=len)
    shared = max(fewer.values()) + 1
    behind = {token for token, i in more.items() if i >= shared}
    added = (teacher if more is theirs else student).get_added_vocab()  # of merges a longer list cuts other texts otherwise
    if {token: i for token, i in more.items() if i < shared} != fewer or not behind <= added.keys():
        by_id = {i: token for token, i in theirs.items()}
        mine = {i: token for token, i in ours.items()}
        where = min(i for i in by_id.keys() | mine.keys() if by_id.get(i) != mine.get(i))
        raise UserError(
            f"{student_name} and {teacher_name} have different tokenizers ({len(ours):,} and {len(theirs):,} tokens; "
            f"id {where} is {mine.get(where)!r} in one, {by_id.get(where)!r} in the other); "
            "white-box distillation compares them token by token: choose two models of one family"
        )
    probe = "¿Qué tal, naïve café?  def f(x):\n\treturn x+1  1234 <|im_end|>"
    if teacher.encode(probe, add_special_tokens=False) != student.encode(probe, add_special_tokens=False):
        raise UserError(
            f"{student_name} and {teacher_name} have the same tokens but cut text differently (merges or normaliser); "
            "white-box distillation compares them token by token: choose two models of one family"
        )
    return shared


def own_tokens(first: Tokenizer, other: Tokenizer, first_name: str, other_name: str) -> str:
    """Which of two tokenizers has tokens behind the last that they share, and how many, in words; "" where neither has."""
    one, two = (max(tokenizer.get_vocab().values()) + 1 for tokenizer in (first, other))
    if one == two:
        return ""
    shared, most, name = min(one, two), max(one, two), first_name if one > two else other_name
    own = f"{name} has {most - shared:,} tokens of its own (ids {shared:,} to {most - 1:,})"
    return f"{own}: only the first {shared:,} are compared"


def check_known(largest_id: int, shared: int, tokenizer: Tokenizer, who: str) -> None:
    """Refuse rows with a token that one of two models does not have.

    Args:
        largest_id: of all rows.
        shared: what `shared_vocabulary` found.
        tokenizer: the one that made the rows.

    Raises:
        UserError: names the token.
    """
    if largest_id >= shared:
        token = tokenizer.convert_ids_to_tokens(largest_id)
        raise UserError(
            f"{who}: the rows hold '{token}' (id {largest_id:,}), which one of the two tokenizers does not have; "
            "choose two models with one tokenizer, or a prompts.format without that token"
        )
