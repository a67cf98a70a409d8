"""A plausible study without a model in sight: random scores, hostile texts, curves, layers, provenance."""

from typing import Any

import numpy as np

from potstill.study.records import Decoding, MetricInfo, ModelRow, Study, TestRow, Trained

SCRIPT = "<script>alert(1)</script>"
METRICS = (
    MetricInfo(name="rouge_l", title="Rouge-L", unit="0–100"),
    MetricInfo(name="exact_match", title="Exact match", unit="%"),
    MetricInfo(name="nll", title="NLL", unit="nats/token", higher_is_better=False, over="tokens"),
    MetricInfo(name="kl_to_teacher", title="KL to teacher", unit="nats/token", higher_is_better=False, over="tokens"),
)
TEXTS = (
    ("What is the capital of the United Kingdom?", "London is the capital of the United Kingdom.", "en", "closed_qa"),
    ("¿Cuál es la capital de Reino Unido?", "Londres es la capital de Reino Unido.", "es", "closed_qa"),
    ("Write a for loop from 1 to 10", "for i in range(1, 11):\n    print(i)", "en", "generation"),
    (
        "Escribe un poema corto sobre la lluvia,\ncon ñ y acentos.",
        "La lluvia, año tras año,\ncae sobre el peñón.",
        "es",
        "creative",
    ),
    (
        "Fix this:\n```python\ndef f(x):\nreturn x +\n```\nSyntaxError: invalid syntax",
        "def f(x):\n    return x + 1",
        "en",
        "repair",
    ),
    ("Summarise: " + "the still boils the wash and keeps the heart. " * 12, "A still keeps the heart.", "en", "summary"),
)
HOSTILE = (
    SCRIPT,
    "<img src=x onerror=alert(1)>",
    "</td></table><style>body{display:none}</style>",
    "{{ 7 * 7 }} {% raw %}",
    "",
    "\u202ereversed\u202c and a NUL \x00 and a bell \x07",
    "lone surrogate \ud800 here",
    "word " * 900,
    "averyveryverylongunbrokenword" * 30,
)
ROLES = (("Base", "base", 20.0), ("SFT", "sft", 41.0), ("KD", "kd", 44.0), ("KD 4-bit", "quantized", 43.6))
ROLES += (("KD 4-bit RTN", "rtn", 40.0), ("Teacher", "teacher", 46.0))


def trained_record(seed: int | None = 1, **changes: Any) -> Trained:
    """How one model was trained; all are trained alike but for what is told."""
    own = {
        "by": "sft",
        "seed": seed or 0,
        "start": "stage:base",
        "data": "d",
        "prompts": "p",
        "rows": 12_000,
        "order": f"o{seed}",
    }
    own |= {"teacher": "stage:teacher"} if changes.get("by") == "distill" else {}
    amounts = {"steps": 940, "rows_seen": 24_000, "response_tokens": 1_234_567, "tokens": 3_000_000, "epochs": 2.0, "lr": 1e-5}
    return Trained(**{**own, **amounts, "optim": {"batch_size": 16}, **changes})


def fake_study(
    N: int = 120, seeds: tuple[int, ...] = (1, 2, 3), *, seed: int = 0, means: dict[str, float] | None = None, **changes: Any
) -> Study:
    """Six models; rows have a difficulty that all models share, so that pairing matters."""
    rng = np.random.default_rng(seed)
    difficulty_N = rng.normal(0, 20, N)
    tokens_N = rng.integers(5, 120, N)
    rows = []
    for name, role, mean in ROLES:
        mean = (means or {}).get(name, mean)
        own = seeds if role in ("sft", "kd", "quantized", "rtn") else (None,)
        luck_S = rng.normal(0, 0.4, len(own))
        rouge_SN = np.clip(mean + luck_S[:, None] + difficulty_N + rng.normal(0, 6, (len(own), N)), 0, 100)
        exact_SN = 100.0 * (rouge_SN > 80)
        rouge_SN = np.where(exact_SN == 100, 100.0, rouge_SN)
        nll_SN = tokens_N * np.clip(3 - mean / 25 + difficulty_N / 90 + rng.normal(0, 0.1, (len(own), N)), 0.05, None)
        scores = {"rouge_l": rouge_SN.tolist(), "exact_match": exact_SN.tolist(), "nll": nll_SN.tolist()}
        if role != "teacher":
            scores["kl_to_teacher"] = (nll_SN * 0.2).tolist()
        if role == "kd" and N > 3:
            scores["rouge_l"][0][3] = None
        trained = role in ("sft", "kd")
        rows.append(
            ModelRow(
                name=name,
                role=role,
                model=f"stage:{name.lower()}",
                parameters=1_540_000_000 if role == "teacher" else 494_000_000,
                bytes={"teacher": 3_090_000_000, "quantized": 283_000_000, "rtn": 281_000_000}.get(role, 988_000_000),
                decode_tokens_per_s=None if role == "rtn" else {"teacher": 212.0, "quantized": 741.0}.get(role, 812.3),
                trained=tuple(trained_record(s, by="distill" if role == "kd" else "sft") for s in own) if trained else None,
                seeds=own,
                scores=scores,
            )
        )
    examples = []
    for n in range(N):
        prompt, reference, language, tag = TEXTS[n % len(TEXTS)]
        examples.append(TestRow(key=f"row-{n}", prompt=prompt, references=(reference,), language=language, tag=tag))
    values: dict[str, Any] = {
        "metrics": METRICS,
        "primary": "rouge_l",
        "rows": tuple(rows),
        "tokens": tuple(int(t) for t in tokens_N),
        "examples": tuple(examples),
        "decoding": Decoding(method="greedy", max_new_tokens=128),
        "data": {
            "source": {"kind": "jsonl", "path": "dolly.jsonl", "prompt": "instruction"},
            "split": "test",
            "rows": N,
        },
    }
    values["left_out"] = {"prompt too long": 3} if N else {}
    return Study(**{**values, **changes})


def fake_answers(study: Study) -> list[dict[str, Any]]:
    """One answer per seed; every sixth or so is hostile, some are exactly right."""
    lines = []
    for n, example in enumerate(study.examples):
        answers = {}
        for m, row in enumerate(study.rows):
            answers[row.name] = []
            for s in range(len(row.seeds)):
                pick = (n + m + s) % 5
                words = example.references[0].split(" ")
                texts = (
                    example.references[0],
                    " ".join(words[: len(words) // 2 + 1]) + " and so on",
                    HOSTILE[(n + m) % len(HOSTILE)],
                    f"{example.references[0]} It is also known for its weather.",
                    "No lo sé.",
                )
                answers[row.name].append(texts[pick])
        lines.append({"key": example.key, "answers": answers})
    return lines


def fake_curves(seeds: tuple[int, ...] = (1, 2, 3)) -> list[dict[str, Any]]:
    """SFT and KD by epoch, per seed."""
    rng = np.random.default_rng(5)
    curves = []
    for name, role, top, loss in (("SFT", "sft", 41, 1.9), ("KD", "kd", 44, 2.4)):
        for seed in seeds:
            points = []
            for half in range(1, 11):
                epoch = half / 2
                points.append(
                    {
                        "epoch": epoch,
                        "step": half * 94,
                        "loss": loss * np.exp(-epoch / 3) + 0.4 + rng.normal(0, 0.03),
                        "validation_rouge_l": top - 22 * np.exp(-epoch) + rng.normal(0, 0.5) if half % 2 == 0 else None,
                        "validation_nll": 1.2 + np.exp(-epoch) + rng.normal(0, 0.01) if half % 2 == 0 else None,
                    }
                )
            curves.append({"name": name, "role": role, "seed": seed, "points": points})
    return curves


def fake_data(seeds: tuple[int, ...] = (1,)) -> list[dict[str, Any]]:
    """What two training stages saw."""
    preview = [("<|im_start|>", False), ("user", False), ("\n", False), ("What", False), (" is", False), (" the", False)]
    preview += [(" capital", False), ("?", False), ("<|im_end|>", False), ("\n", False), ("<|im_start|>", False)]
    preview += [
        ("assistant", False),
        ("\n", False),
        ("London", True),
        (" <b>", True),
        (".", True),
        ("<|im_end|>", True),
        ("\n", False),
    ]
    return [
        {
            "stage": stage,
            "seed": seed,
            "rows": 12_000,
            "prompt_tokens": 1_004_000,
            "response_tokens": 617_000,
            "dropped": {"too long": 17, "empty response": 2},
            "context_shortened": 41,
            "trained_response_tokens": 1_234_567,
            "steps": 940,
            "end_of_turn": "<|im_end|>",
            "mask_preview": preview,
        }
        for stage in ("sft", "kd")
        for seed in seeds
    ]


def fake_quantization(layers: int = 28) -> list[dict[str, Any]]:
    """Reconstruction errors of one model."""
    rng = np.random.default_rng(3)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rtn = rng.lognormal(-5, 0.8, layers * len(kinds))
    names = [f"model.layers.{i}.{kind}" for i in range(layers) for kind in kinds]
    table = [
        {"name": name, "gptq_error": float(error * rng.uniform(0.2, 0.8)), "rtn_error": float(error)}
        for name, error in zip(names, rtn, strict=True)
    ]
    return [{"stage": "quantize", "layers": table, "bits_per_weight": 4.25}]


def fake_provenance() -> dict[str, Any]:
    """Who made it, and how."""
    return {
        "command": "potstill run recipes/dolly.toml --out runs/dolly",
        "recipe": "recipes/dolly.toml",
        "seeds": [1, 2, 3],
        "versions": {"potstill": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0", "python": "3.11.7"},
        "machine": {"cpu": "16 cores", "gpu": "1 × NVIDIA H100", "memory_bytes": 137_000_000_000, "system": "Linux 6.8"},
        "fingerprints": {"sft": "3f1c9a0b77de4412", "kd": "9b04c2f1a85d0e63", "quantize": "c81e728d9d4c2f63"},
        "created": "2026-01-15T12:00:00+00:00",
        "seconds": {"sft": 1260.4, "kd": 2514.0, "quantize": 93.2},
        "peak_memory_bytes": {"sft": 21_400_000_000, "kd": 38_100_000_000},
    }


def fake_report(**changes: Any) -> dict[str, Any]:
    """A whole report of the fake study."""
    from potstill.report.build import Made, build_report

    study = fake_study(**changes)
    made = Made(fake_curves(), fake_data(), fake_quantization(), provenance=fake_provenance())
    return build_report(study, fake_answers(study), made, resamples=2_000)
