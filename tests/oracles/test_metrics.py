"""Figures against numbers worked out by hand and against other people's implementations."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tiny_parts import chat_tokenizer, gpt2_tokenizer, rows, tiny_model

from potstill.core.errors import UserError
from potstill.core.types import Abstain, Example
from potstill.data.prompts import Prompts, Renderer
from potstill.data.store import Counts, instruction_pairs
from potstill.edges import decoding, rooms
from potstill.edges.sampling import decode, decode_speed, generate, stops_of, stream
from potstill.losses.scoring import mean_nll, token_sums
from potstill.metrics import TextMetric, TokenMetric
from potstill.metrics.exact_match import ExactMatch
from potstill.metrics.kl_to_teacher import KLToTeacher
from potstill.metrics.nll import NLL
from potstill.metrics.rouge_l import RougeL

FAMILIES = ("qwen2", "llama", "gpt2")
LIVELY: dict[str, Any] = {"std": 0.4, "tie_word_embeddings": False}  # answers that depend on the prompt


def row(*references: str, language: str = "en") -> Example:
    return Example("k", "i", references[0], references=references, language=language)


@pytest.mark.parametrize(
    "answer, reference, language, f1",
    [
        # precision 3/3, recall 3/6
        ("the cat sat", "the cat sat on the mat", "en", 2 * 1 * 0.5 / 1.5),
        # "police kill the gunman" against "police killed the gunman": stems agree in English
        ("police kill the gunman", "police killed the gunman", "en", 1.0),
        ("police kill the gunman", "police killed the gunman", "es", 0.75),
        # in order only: "a b" of "b a"
        ("uno dos", "dos uno", "es", 0.5),
        # accents are letters: "que" is not "qué", and "está" is one word
        ("está aquí", "está aquí", "es", 1.0),
        ("esta aqui", "está aquí", "es", 0.0),
        ("año", "ano", "es", 0.0),
        ("", "algo", "es", 0.0),
        ("...", "algo", "en", 0.0),
    ],
)
def test_rouge_l_by_hand(answer: str, reference: str, language: str, f1: float) -> None:
    assert RougeL()(answer, row(reference, language=language)) == pytest.approx(100 * f1)


def lcs_f1(answer: list[str], reference: list[str]) -> float:
    """The oracle: the textbook's table of the longest common subsequence."""
    table = [[0] * (len(reference) + 1) for _ in range(len(answer) + 1)]
    for i, a in enumerate(answer):
        for j, b in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    length = table[-1][-1]
    return 200 * length / (len(answer) + len(reference)) if length else 0.0


def agrees_with_others(metric: Any) -> bool:
    from rouge_score.rouge_scorer import RougeScorer

    english = RougeScorer(["rougeL"], use_stemmer=True)
    texts = [f"{r['instruction']} {r['response']}" for r in rows(24)]
    spanish = ["el ron añejo está aquí", "aquí está el ron", "el ñandú corrió", "está el ron", "año tras año", "ano tras ano"]
    same = True
    for a, b in zip(texts, texts[1:] + texts[:1], strict=True):
        same &= abs(metric(a, row(b)) - 100 * english.score(b, a)["rougeL"].fmeasure) < 1e-9
    for a, b in zip(spanish, spanish[1:] + spanish[:1], strict=True):
        same &= abs(metric(a, row(b, language="es")) - lcs_f1(a.split(), b.split())) < 1e-9
    return same


def test_rouge_l_agrees_with_rouge_score_and_with_the_textbook() -> None:
    assert agrees_with_others(RougeL())


def test_the_oracle_rejects_recall_alone_and_lost_accents() -> None:
    def unaccented(answer: str, example: Example) -> float | Abstain:
        plain = [unicodedata.normalize("NFD", text).encode("ascii", "ignore").decode() for text in example.references]
        return RougeL()(unicodedata.normalize("NFD", answer).encode("ascii", "ignore").decode(), row(*plain))

    def recall(answer: str, example: Example) -> float:
        shared = set(answer.split()) & set(example.references[0].split())
        return 100 * len(shared) / len(example.references[0].split())

    assert not agrees_with_others(unaccented)
    assert not agrees_with_others(recall)


@pytest.mark.parametrize("kind", ["rouge_l", "exact_match"])
@pytest.mark.parametrize("language", ["en", "es"])
def test_a_text_metric_takes_the_best_reference_and_any_unicode_form(kind: str, language: str) -> None:
    metric: Any = TextMetric.parse(kind) if kind in TextMetric.kinds else {"rouge_l": RougeL, "exact_match": ExactMatch}[kind]()
    accepted = ("Otra cosa.", "Está aquí el ñandú.")
    assert metric("Está aquí el ñandú.", row(*accepted, language=language)) == 100
    decomposed = tuple(unicodedata.normalize("NFD", text) for text in accepted)
    assert metric("Está aquí el ñandú.", row(*decomposed, language=language)) == 100
    assert metric(decomposed[1], row(*accepted, language=language)) == 100
    assert metric("nada", row(*accepted, language=language)) == 0


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("  The SOL. ", "the sol", 100),
        ("The  sol", "the sol", 0),
        ("sol", "the sol", 0),  # articles are words: SQuAD drops them, this does not
        ("El ñandú", "el nandu", 0),
        ("3.14", "3 14", 0),
        ("", "x", 0),
    ],
)
def test_exact_match_by_hand(answer: str, reference: str, score: float) -> None:
    assert ExactMatch()(answer, row(reference)) == score


@pytest.mark.parametrize(
    "answer, reference, score",
    [
        ("return a - b", "return a + b", 0),
        ("return a  +   b  ", "return a + b", 100),
        ("return a+b", "return a + b", 0),  # a blank more or less is folded, none is made
        ("return A + b", "return a + b", 0),
        ("def f(x):\n\n    return x\n", "def f(x):  \n    return x", 100),
        ("def f(x):\r\n    return x", "def f(x):\n    return x", 100),
        ("def f(x): return x", "def f(x):\n    return x", 0),
        ("if a:\n    b()\n    c()", "if a:\n    b()\nc()", 0),  # indentation is meaning
        ("a\n  b", "  a\n  b", 100),  # answers come stripped
        ("print('caf\u00e9')", "print('cafe\u0301')", 100),
        ("", "return", 0),
    ],
)
def test_exact_match_of_code_by_hand(answer: str, reference: str, score: float) -> None:
    assert ExactMatch(normalisation="whitespace")(answer, row(reference)) == score


def a_case(family: str) -> tuple[Any, list[Any], list[list[int]], Renderer]:
    tokenizer = gpt2_tokenizer() if family == "gpt2" else chat_tokenizer()
    renderer = Renderer(tokenizer, Prompts(format="alpaca" if family == "gpt2" else "chat", max_prompt_tokens=200))
    examples = [Example(str(i), r["instruction"], r["response"], r["context"]) for i, r in enumerate(rows(7))]
    pairs = list(instruction_pairs(examples, renderer, Counts()))
    return tokenizer, pairs, [prompt for prompt, _ in pairs], renderer


@pytest.mark.parametrize("family", FAMILIES)
def test_nll_is_transformers_loss(family: str) -> None:
    tokenizer, pairs, _, _ = a_case(family)
    model = tiny_model(family, len(tokenizer))
    sums = token_sums(model, None, pairs, len(tokenizer), {"nll": NLL()})["nll"]
    wanted = []
    for prompt, response in pairs:
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            wanted.append(model(torch.tensor([[*prompt, *response]]), labels=labels).loss.item() * len(response))
    assert sums == pytest.approx(wanted, rel=1e-5)
    assert mean_nll(model, pairs) == pytest.approx(sum(wanted) / sum(len(response) for _, response in pairs), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_to_the_teacher_is_numpys_and_none_to_itself(family: str) -> None:
    tokenizer, pairs, _, _ = a_case(family)
    model, teacher = (tiny_model(family, len(tokenizer) + 5, seed=seed) for seed in (1, 2))
    V = len(tokenizer)
    itself = token_sums(model, model, pairs, V, {"kl": KLToTeacher()})["kl"]
    assert itself == pytest.approx([0] * len(pairs), abs=1e-5)
    found = token_sums(model, teacher, pairs, V, {"kl": KLToTeacher()})["kl"]
    for (prompt, response), kl in zip(pairs, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *response]])
            z_p, z_q = (m(ids).logits[0, len(prompt) - 1 : -1, :V].double().numpy() for m in (teacher, model))
        logp, logq = log_softmax(z_p, -1), log_softmax(z_q, -1)
        assert kl == pytest.approx((np.exp(logp) * (logp - logq)).sum(), rel=1e-4)


def test_a_teacher_reads_rows_once_for_all_models() -> None:
    tokenizer, pairs, _, _ = a_case("qwen2")
    teacher = tiny_model("qwen2", len(tokenizer), seed=1)
    reads: list[int] = []
    teacher.base_model.register_forward_hook(lambda *_: reads.append(1))
    states: dict[bytes, Any] = {}
    for seed in (2, 3):
        model = tiny_model("qwen2", len(tokenizer), seed=seed)
        measures: Any = {"kl": KLToTeacher()}
        alone = token_sums(model, teacher, pairs, len(tokenizer), measures)
        reads.clear()
        assert token_sums(model, teacher, pairs, len(tokenizer), measures, states) == alone
        assert len(reads) == (1 if seed == 2 else 0)
    token_sums(model, teacher, pairs[1:], len(tokenizer), measures, states)
    assert len(reads) == 1, "other rows are other states"


@pytest.mark.parametrize("metric", [NLL(), KLToTeacher()], ids=lambda metric: metric.kind)
def test_token_metrics_give_one_figure_a_token(metric: TokenMetric) -> None:
    logq_NV, logp_NV = (torch.log_softmax(torch.randn(5, 4), -1) for _ in range(2))
    logp_NV[:, 0] = -torch.inf
    values = metric(logq_NV, torch.tensor([0, 1, 2, 3, 0]), logp_NV)
    assert values.shape == (5,)
    assert values.isfinite().all()


def plain_answers(model: Any, tokenizer: Any, prompts: list[list[int]], stop_ids: list[int], new: int) -> list[str]:
    """The oracle: no cache, no padding, no batch; argmax of the last position, again and again."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) - len(prompt) < new:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in stop_ids:
                    break
        answers.append(decode(tokenizer, ids[len(prompt) :], stop_ids))
    return answers


def without_left_padding_harm(model: Any, tokenizer: Any, prompts: list[list[int]], stop_ids: list[int], **more: Any) -> bool:
    found = generate(model, tokenizer, prompts, stop_ids=stop_ids, max_new_tokens=8, **more).texts
    wanted = plain_answers(model, tokenizer, prompts, stop_ids, 8)
    assert len(set(wanted)) > 1
    return found == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_one_row_at_a_time(family: str) -> None:
    tokenizer, _, prompts, renderer = a_case(family)
    model = tiny_model(family, len(tokenizer), seed=3, **LIVELY)
    assert without_left_padding_harm(model, tokenizer, prompts, renderer.stop_ids)
    assert without_left_padding_harm(model, tokenizer, prompts, renderer.stop_ids, batch_rows=2)


def test_the_oracle_rejects_padding_that_is_attended(monkeypatch: Any) -> None:
    tokenizer, _, prompts, renderer = a_case("gpt2")
    model = tiny_model("gpt2", len(tokenizer), seed=3, **LIVELY)
    plain = model.forward

    def attends_to_padding(
        *ids: Any, attention_mask: Any = None, cache: Any = None, position_ids: Any = None, **more: Any
    ) -> Any:
        seen = attention_mask * 0 + 1 if attention_mask is not None else None
        return plain(*ids, attention_mask=seen, cache=cache, position_ids=position_ids, **more)

    model.forward = attends_to_padding
    assert not without_left_padding_harm(model, tokenizer, prompts, renderer.stop_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_end_at_different_times_leave_the_others_as_they_are(family: str, monkeypatch: Any) -> None:
    """Rows leave one by one, and what stays grows past a block of the cache."""
    tokenizer, _, prompts, _ = a_case(family)
    model = tiny_model(family, len(tokenizer), seed=3, **LIVELY)
    monkeypatch.setattr(rooms, "BLOCK", 4)
    left: list[int] = []
    pick = decoding.Batch.pick
    monkeypatch.setattr(
        decoding.Batch, "pick", lambda self, rows: left.append(len(self.count_B) - len(rows)) or pick(self, rows)
    )
    longest = plain_answers(model, tokenizer, prompts, [], 24)
    spoken = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in longest]
    stop_ids = [spoken[0][2], spoken[-1][9 % len(spoken[-1])]]
    wanted = plain_answers(model, tokenizer, prompts, stops_of(model, tokenizer, stop_ids), 24)
    assert generate(model, tokenizer, prompts, stop_ids=stop_ids, max_new_tokens=24).texts == wanted
    assert len(set(map(len, wanted))) > 1
    assert any(left), "some row left before the others"


def test_a_sample_does_not_depend_on_the_rows_beside_it() -> None:
    tokenizer, _, prompts, renderer = a_case("qwen2")
    model = tiny_model("qwen2", len(tokenizer), seed=3, **LIVELY)
    asked = {"stop_ids": renderer.stop_ids, "max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    together = generate(model, tokenizer, prompts, **asked).texts
    assert generate(model, tokenizer, prompts, **asked, batch_rows=1).texts == together
    assert generate(model, tokenizer, prompts[:2], **asked).texts == together[:2]


def test_decoding_defaults_of_a_checkpoint_change_nothing_and_are_kept() -> None:
    from transformers import GenerationConfig

    tokenizer, _, prompts, renderer = a_case("qwen2")
    model = tiny_model("qwen2", len(tokenizer), seed=3, **LIVELY)
    wanted = plain_answers(model, tokenizer, prompts, renderer.stop_ids, 8)
    hub = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.9, "max_length": 4}
    own = GenerationConfig(**hub, no_repeat_ngram_size=1, num_beams=3, min_length=30, suppress_tokens=list(range(3, 200)))
    model.generation_config = own
    before = json.dumps(own.to_dict(), default=str)
    assert generate(model, tokenizer, prompts, stop_ids=renderer.stop_ids, max_new_tokens=8).texts == wanted
    assert decode_speed(model, prompts[0], new_tokens=2, repeats=1) > 0
    assert model.generation_config is own
    assert json.dumps(own.to_dict(), default=str) == before


def test_sampling_is_reproducible_and_touches_no_other_randomness() -> None:
    tokenizer, _, prompts, renderer = a_case("qwen2")
    model = tiny_model("qwen2", len(tokenizer), seed=3, **LIVELY)

    def sampled(seed: int) -> list[str]:
        found = generate(model, tokenizer, prompts, stop_ids=renderer.stop_ids, max_new_tokens=8, temperature=1.0, seed=seed)
        return found.texts

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sampled(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert sampled(1) == first
    assert sampled(2) != first


def test_samples_come_from_the_whole_vocabulary_at_the_temperature() -> None:
    """Frequencies of the first sampled token against softmax(z/T): no top-k or top-p is left on."""
    tokenizer, _, prompts, _ = a_case("qwen2")
    model = tiny_model("qwen2", len(tokenizer), seed=3, **LIVELY)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompts[0]])).logits[0, -1].double() / 3.0, -1)
    assert int((p > 1e-4).sum()) > 100, "flat enough that a top-k of 50 would show"
    seen: set[str] = set()
    for seed in range(3):
        seen |= set(
            generate(
                model,
                tokenizer,
                [prompts[0]] * 300,
                stop_ids=[tokenizer.eos_token_id],
                max_new_tokens=1,
                temperature=3.0,
                seed=seed,
                batch_rows=300,
            ).texts
        )
    assert len(seen) > 100


def test_a_stream_is_the_same_answer_in_pieces() -> None:
    tokenizer, _, prompts, renderer = a_case("qwen2")
    model = tiny_model("qwen2", len(tokenizer), seed=3, **LIVELY)
    arguments: dict[str, Any] = {"stop_ids": renderer.stop_ids, "max_new_tokens": 8}
    pieces = list(stream(model, tokenizer, prompts[0], temperature=0.0, **arguments))
    assert "".join(pieces).strip() == generate(model, tokenizer, prompts[:1], **arguments).texts[0]
    with pytest.raises(IndexError):  # an id that the model does not know: the reader hears of it, and does not wait for ever
        list(stream(model, tokenizer, [len(tokenizer) + 50], temperature=0.0, **arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_past_the_models_positions_is_refused(family: str) -> None:
    tokenizer, *_ = a_case(family)
    model = tiny_model(family, len(tokenizer))
    assert len(generate(model, tokenizer, [[5] * 250], stop_ids=[0], max_new_tokens=6).texts) == 1
    with pytest.raises(UserError) as caught:
        generate(model, tokenizer, [[5], [5] * 250], stop_ids=[0], max_new_tokens=7)
    assert str(caught.value) == (
        "a prompt of 250 tokens and an answer of up to max_new_tokens = 7 are more than the model's 256 positions; "
        "lower max_new_tokens or prompts.max_prompt_tokens"
    )


def test_decoding_ends_at_the_first_stop() -> None:
    tokenizer = chat_tokenizer()
    words = tokenizer.encode("peat and tun", add_special_tokens=False)
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert decode(tokenizer, [*words, end, *words], [end, other]) == "peat and tun"
    assert decode(tokenizer, [*words, other, end, *words], [end, other]) == "peat and tun"
    assert decode(tokenizer, words, [end]) == "peat and tun"
    assert decode(tokenizer, [end, *words], [end]) == ""


def test_a_trained_end_of_turn_ends_the_answer(tmp_path: Path) -> None:
    """A model drilled on one row says that row and stops, pad token or not."""
    from potstill.data.store import TokenStore
    from potstill.losses.cross_entropy import CrossEntropy
    from potstill.train.loop import Optim, fit
    from potstill.train.work import Work

    tokenizer = chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    renderer = Renderer(tokenizer, Prompts())
    pairs = list(instruction_pairs([Example("k", "Say it.", "peat and tun")], renderer, Counts()))
    store = TokenStore.write(tmp_path / "tokens", pairs, Counts(), "here")
    model = tiny_model("qwen2", len(tokenizer))
    fit(model, store, CrossEntropy(), Optim(steps=40, lr=1e-2), Work(tmp_path / "work", "here"), seed=0)
    answers = generate(model, tokenizer, [pairs[0][0]], stop_ids=renderer.stop_ids, max_new_tokens=60)
    assert answers.texts == ["peat and tun"]
    assert answers.cut == [False]
    words = tokenizer.encode("peat and tun", add_special_tokens=False)
    for most in (len(words), len(words) + 1):  # without and with room for the end of turn
        found = generate(model, tokenizer, [pairs[0][0]], stop_ids=renderer.stop_ids, max_new_tokens=most)
        assert (found.texts, found.cut) == (["peat and tun"], [most == len(words)])


def test_a_model_stops_at_each_of_its_own_ends(tmp_path: Path) -> None:
    """Qwen2.5-Instruct and Llama 3.1 name several; what would come after them is no answer."""
    tokenizer = chat_tokenizer()
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    words = tokenizer.encode("peat and tun", add_special_tokens=False)
    model = tiny_model("qwen2", len(tokenizer), **LIVELY)
    said = generate(model, tokenizer, [words], stop_ids=[tokenizer.eos_token_id], max_new_tokens=12)
    first = model.generate(torch.tensor([words]), max_new_tokens=1, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, first]
    stopped = generate(model, tokenizer, [words], stop_ids=[tokenizer.eos_token_id], max_new_tokens=12)
    assert said.texts != [""]
    assert (stopped.texts, stopped.cut) == ([""], [False])
    assert "".join(stream(model, tokenizer, words, stop_ids=[2], max_new_tokens=12, temperature=0.0)).strip() == ""
    assert decode(tokenizer, [*words, other, *words], [tokenizer.eos_token_id]) == "peat and tun", "padding ends an answer"


def test_padding_ends_an_answer_however_it_is_asked_for() -> None:
    from habits import CHATML, tokenizer_with

    tokenizer = tokenizer_with(CHATML)
    model = tiny_model("qwen2", len(tokenizer))
    barley, pad = tokenizer.encode("barley", add_special_tokens=False)[0], tokenizer.pad_token_id
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # only the tokenizer says what padding is
    with torch.no_grad():  # the state is the last token's own: barley is followed by padding, all else by barley
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.model.embed_tokens.weight[barley] = -1
        model.model.norm.weight.fill_(1)
        head = torch.nn.Linear(model.config.hidden_size, len(tokenizer), bias=False)
        head.weight.zero_()
        head.weight[barley], head.weight[pad] = 1, -1
        model.set_output_embeddings(head)
    answers = generate(model, tokenizer, [[5, 6], [5]], stop_ids=[2], max_new_tokens=6)
    assert answers.texts == [tokenizer.decode([barley])] * 2
    assert answers.cut == [False, False]
    pieces = stream(model, tokenizer, [5, 6], stop_ids=[2], max_new_tokens=6, temperature=0.0)
    assert "".join(pieces) == tokenizer.decode([barley])


def test_a_streamed_answer_keeps_added_tokens_and_hides_those_of_turns() -> None:
    """The pieces of an answer, joined, are what `generate` gives for the same prompt."""
    from habits import CHATML, tokenizer_with

    from potstill.edges.sampling import stream

    tokenizer = tokenizer_with(CHATML, special=("<joy>",))
    joy = tokenizer.convert_tokens_to_ids("<joy>")
    model = tiny_model("qwen2", len(tokenizer))
    with torch.no_grad():  # one token answers everything
        model.get_output_embeddings().weight.fill_(0.01)
        model.get_output_embeddings().weight[joy] = 1
        model.model.norm.weight.fill_(1)
    for sign in (1, -1):
        with torch.no_grad():
            model.get_output_embeddings().weight[joy] = sign
        pieces = stream(model, tokenizer, [5, 6], stop_ids=[2], max_new_tokens=3, temperature=0.0)
        said = "".join(pieces).strip()
        assert said == generate(model, tokenizer, [[5, 6]], stop_ids=[2], max_new_tokens=3).texts[0]
        if said:
            break
    assert "<joy>" in said
