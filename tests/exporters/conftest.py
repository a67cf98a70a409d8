from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_export import QWEN2_REGEX, split_then_bytes, tiny_model, train_tokenizer

torch.set_num_threads(1)  # on a busy machine, threads that wait for one another make tiny tensors many times slower


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import normalizers

    return train_tokenizer(split_then_bytes(QWEN2_REGEX), normalizers.NFC())


@pytest.fixture
def build() -> Callable[..., Any]:
    return tiny_model
