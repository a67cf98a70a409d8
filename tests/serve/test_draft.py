"""A smaller model that writes ahead of the served one: the answer is the same, and what came of its drafts is told."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
from serving import answered, offer, serving
from tiny_parts import chat_tokenizer, tiny_model

from potstill.core.errors import UserError
from potstill.edges.llamacpp_stream import Wish
from potstill.serve.shelf import Opening, drafter_of, open_offer

needs_llamacpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not here: pip install xllamacpp")
OPENING = Opening("auto", context=512, streams=2, threads=1)
QUESTIONS = ["¿Qué moneda usa Perú? 😀", "Name three rivers.", "Hi"]


@pytest.fixture(scope="module")
def filed(tmp_path_factory):
    """A teacher and a student that agree on few words, each with a file of its weights."""
    folder, tokenizer = tmp_path_factory.mktemp("drafting"), chat_tokenizer(320)
    shapes = {"teacher": {"width": 64, "seed": 2, "max_position_embeddings": 8192}, "student": {"seed": 1}}
    return [_filed(folder / name, name, tokenizer, **shape) for name, shape in shapes.items()]


def _filed(folder, name, tokenizer, **shape):
    from potstill.edges.models import save_model
    from potstill.exporters.gguf import Gguf

    model = tiny_model("qwen2", len(tokenizer), eos=tokenizer.eos_token_id, std=0.3, tie_word_embeddings=False, **shape)
    save_model(model, tokenizer, folder)
    (file,) = Gguf(types=("f32",)).write(model, tokenizer, {}, folder)
    return replace(offer(folder, name), file=file)


@needs_llamacpp
def test_answers_with_a_draft_are_those_without_and_its_figures_are_told(filed):
    teacher, student = filed
    drafters = [None, drafter_of(teacher, student, OPENING, 3), drafter_of(teacher, teacher, OPENING, 5)]
    said, found = [], []
    for drafter in drafters:
        opened = open_offer(teacher, OPENING, drafter)
        with serving([teacher], opened=opened, opening=OPENING) as site:
            texts, used = [], []
            for question in QUESTIONS:
                asked = {"model": "teacher", "messages": [{"role": "user", "content": question}], "max_tokens": 24}
                answer = json.loads(site.post("/v1/chat/completions", asked)[1])
                texts.append(answer["choices"][0]["message"]["content"])
                used.append(answer["usage"])
            said.append(texts)
            found.append((used, site.health()[1]))
    assert said[0] == said[1] == said[2]
    (plain, health), *drafted = found
    assert all("completion_tokens_details" not in one for one in plain)
    assert "draft" not in health
    shares = []
    for (used, health), drafter in zip(drafted, drafters[1:], strict=True):
        details = [one["completion_tokens_details"] for one in used]
        accepted = sum(one["accepted_prediction_tokens"] for one in details)
        rejected = sum(one["rejected_prediction_tokens"] for one in details)
        share = health["draft"].pop("acceptance_percent")
        assert health["draft"] == {"model": drafter.offer.id, "drafted": accepted + rejected, "accepted": accepted}
        assert share == pytest.approx(100 * accepted / (accepted + rejected), abs=0.06)
        shares.append(share)
    assert shares[0] < 90 < shares[1]  # another model; the model itself


@needs_llamacpp
def test_an_answer_that_is_left_early_counts_its_drafts(filed):
    teacher, student = filed
    opened = open_offer(teacher, OPENING, drafter_of(teacher, student, OPENING, 4))
    try:
        prompt = opened.text("Peru uses the")
        pieces, whole = answered(opened.engine, prompt, Wish(40))
        text = "".join(pieces)
        before = opened.engine.drafts
        _, cut = answered(opened.engine, prompt, Wish(40), stops=[text[2:5]])
        assert (cut.finish, cut.count < whole.count) == ("stop", True)
        assert 0 < cut.drafts.drafted < whole.drafts.drafted
        assert before is not None
        assert opened.engine.drafts is not None
        assert opened.engine.drafts.drafted >= before.drafted + cut.drafts.drafted
    finally:
        opened.close()


@needs_llamacpp
def test_a_draft_of_other_tokens_is_refused_before_anything_is_opened(filed, tmp_path):
    teacher, _ = filed
    stranger = _filed(tmp_path / "stranger", "stranger", chat_tokenizer(330))
    with pytest.raises(UserError) as error:
        drafter_of(teacher, stranger, OPENING, 3)
    told = str(error.value)
    assert f"{stranger.file} cannot draft for {teacher.file}: token " in told
    assert told.endswith("choose a student of the same family")


def test_a_draft_without_llamacpp_or_without_its_file_is_refused(filed, monkeypatch):
    from potstill.edges import llamacpp

    teacher, student = filed
    with pytest.raises(UserError, match="leave --engine torch out"):
        drafter_of(teacher, student, replace(OPENING, engine="torch"), 3)
    monkeypatch.setattr(llamacpp, "PACKAGE", "no_such_runtime")
    with pytest.raises(UserError, match=r"--draft: llama\.cpp is not here; pip install"):
        drafter_of(teacher, student, OPENING, 3)


@needs_llamacpp
@pytest.mark.parametrize("lacks", [0, 1])
def test_both_models_need_a_file(filed, lacks):
    teacher, student = (replace(one, file=None) if place == lacks else one for place, one in enumerate(filed))
    with pytest.raises(UserError, match=rf"no \.gguf file of {(teacher, student)[lacks].id}"):
        drafter_of(teacher, student, OPENING, 3)


@needs_llamacpp
def test_the_context_is_that_of_the_shorter_model_and_both_must_fit_into_memory(filed):
    from potstill.serve import shelf

    teacher, student = filed
    drafter = drafter_of(teacher, student, OPENING, 3)
    need, alone = (shelf.need_of(one, OPENING, one.file) for one in filed)
    both = shelf._with_drafter(need, drafter, OPENING)
    assert both.weights == need.weights + alone.weights
    assert (need.positions, both.positions) == (512, 256)
    assert both.cache == need.cache // 2 + alone.cache
