"""A tiny student and its teacher with room for long answers, and a server for them."""

import pytest
from family import build_model
from serving import offer, serving


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tokenizer):
    from potstill.edges.models import save_model

    root = tmp_path_factory.mktemp("served")
    for name, hidden, seed in (("student", 32, 1), ("teacher", 64, 2)):
        save_model(build_model(tokenizer, hidden, seed=seed, max_position_embeddings=8192), tokenizer, root / name)
    return [offer(root / "student", "student"), offer(root / "teacher", "teacher", "teacher")]


@pytest.fixture(scope="module")
def site(pair):
    with serving(pair, teacher="teacher") as found:
        yield found
