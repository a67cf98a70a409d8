"""What four bits cost a model: each step of the solver, rounding, ggml's own types, and other packages.

    python benchmarks/quantize.py [--model path:FOLDER] [--rows FILE.jsonl] [--draws 3] [--peer NAME=WHERE ...] [--save FILE]

Each way quantises the same model, calibrated on each draw of rows in turn, in a process of its own. Measured: KL from the full
precision to the quantised model in nats per response token of test rows, how often both put the same token first, bits
per weight as they are stored, and of quantising alone wall and processor seconds and the peak of memory above the loaded
model. `--quick` measures a small model of random weights on random tokens, which shows that it runs and little else;
`--shape 0.5b` is Qwen2.5-0.5B with random weights, for time alone (`--held 0`).

Without `--rows` the rows are those of the built-in source `primer`.

ggml's types are those of llama.cpp, by its own code in xllamacpp. "weighted" ones are given each input's mean square on the
calibration rows, as `llama-imatrix` does. Where a width does not divide by 256, Q4_K becomes Q5_0, as in llama.cpp, which
the bits per weight show.

Peers are run by the scripts in `peers/`, on the same rows as token ids, each in an environment of its own: WHERE is its
interpreter, or a folder of packages to put before this interpreter's (`pip install --target WHERE`). NAME is `gptqmodel`,
`llmcompressor` or `autoround` for all settings in its script, or one of them, as in `gptqmodel:act_order`. Each script says
in what its calibration differs. Weights that are read back are refused when they lie further from the model's than a
quantiser can have put them. `--measure NAME=FOLDER` measures a folder that transformers loads.
"""

import argparse
import ctypes
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _bench import (
    Memory,
    add_output,
    facts,
    hand_over,
    in_turn,
    processor,
    processor_seconds,
    runner,
    shown,
    spread,
    table,
    write,
)
from _models import SHAPES, build, real_model

WAYS: dict[str, dict[str, Any]] = {  # from the second on each has what stands above it
    "rounding": {"method": "rtn"},
    "GPTQ": {"by_activation": False, "sweeps": 0, "make_up": False},
    "by activation": {"sweeps": 0, "make_up": False},
    "and sweeps": {"sweeps": 4, "make_up": False},
    "and making up": {"sweeps": 4, "make_up": True},  # the default
    "and scale search": {"sweeps": 4, "make_up": True, "clip_search": True},
}
GGML = {  # the type, and whether inputs are weighed
    "ggml Q4_0": ("Q4_0", False),
    "ggml Q4_0, weighted": ("Q4_0", True),
    "ggml Q4_K": ("Q4_K", False),
    "ggml Q4_K, weighted": ("Q4_K", True),
}
BLOCK = 256  # weights that share a scale of scales in a K type
PEERS = Path(__file__).with_name("peers")
TOO_FAR = 8.0  # times the distance of rounding; solvers were seen at 3.4, codes in another order are at 16
SHIFTED = 0.25  # of a step, the mean of a matrix: a zero point that is off by one moves it by a whole one


def model_of(job: Mapping[str, Any]) -> Any:
    from potstill.edges.models import load_model

    if job["model"]:
        return load_model(job["model"])
    return half_a_billion(job["layers"]) if job["shape"] == "0.5b" else build(SHAPES["quick"], "student", 0).eval()


def half_a_billion(layers: int) -> Any:
    """Random weights in the shape of Qwen2.5-0.5B."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def pairs_of(job: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Calibration rows of this draw, and the rows held out from all draws."""
    if not job["model"]:
        return random_pairs(job)
    from potstill.data.prompts import Prompts, Renderer
    from potstill.data.store import Counts, instruction_pairs
    from potstill.edges.models import load_tokenizer
    from potstill.sources import Source

    source = {"kind": "jsonl", "path": job["rows"]} if job["rows"] else {"kind": "primer"}
    renderer = Renderer(load_tokenizer(job["model"]), Prompts(max_tokens=192, max_prompt_tokens=128))
    data: Any = Source.parse(source)
    held, rest = (sorted(data.examples(split), key=lambda example: example.key) for split in ("test", "train"))
    random.Random(7).shuffle(held)
    drawn = random.Random(job["draw"]).sample(rest, min(len(rest), 2 * job["count"]))
    of = partial(instruction_pairs, renderer=renderer, counts=Counts())
    return list(of(drawn))[: job["count"]], list(of(held[: 2 * job["held"]]))[: job["held"]]


def random_pairs(job: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Rows of 32 tokens; of 96, about what a row of Dolly has, for a shape that is only timed."""
    numbers = random.Random(0)
    prompt, response = (48, 48) if job["shape"] == "0.5b" else (8, 24)
    made = [tuple([numbers.randrange(1, 32_000) for _ in range(length)] for length in (prompt, response)) for _ in range(16)]
    made += [
        tuple([numbers.randrange(1, 32_000) for _ in range(length)] for length in (prompt, response))
        for _ in range(job["count"])
    ]
    return random.Random(job["draw"]).sample(made[16:], job["count"]), made[: min(job["held"], 16)]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """KL, agreement, bits, seconds and memory of one way on one draw."""
    import torch

    calibration, held = pairs_of(job)
    model = model_of(job)
    found: dict[str, Any] = {"calibration_tokens": sum(len(prompt) + len(response) for prompt, response in calibration)}
    if job["where"]:
        found |= by_peer(job, calibration, model)
    elif job["folder"]:
        from potstill.edges.models import load_model

        model = load_model(f"path:{job['folder']}")
    else:
        memory, processor, begun = Memory(), processor_seconds(), time.monotonic()
        bits = by_ggml(model, *GGML[job["way"]], calibration) if job["way"] in GGML else by_potstill(model, job, calibration)
        found |= {"seconds": time.monotonic() - begun, "processor_seconds": processor_seconds() - processor}
        found |= {"memory_bytes": memory.above(), "bits": bits, "threads": torch.get_num_threads()}
    return {**found, **(compared(model_of(job), model, held) if held else {})}


def by_potstill(model: Any, job: Mapping[str, Any], calibration: Sequence[Any]) -> float:
    """Bits per weight."""
    from potstill.quant.layers import quantise_model
    from potstill.stages.quantize import _bits_per_weight, batches_of

    made = quantise_model(model, batches_of(calibration, 1.0, "cpu"), **WAYS[job["way"]])
    return _bits_per_weight(made.packed.values())


def layers_of(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of the blocks, by their names in the model."""
    from potstill.edges.models import blocks_of, linears_in

    inside = {layer for block in blocks_of(model) for layer in linears_in(block).values()}
    return ((name, layer) for name, layer in model.named_modules() if layer in inside)


def by_ggml(model: Any, type: str, weighted: bool, calibration: Sequence[Any]) -> float:
    """Every linear layer of the blocks rounded by ggml's own quantiser; bits per weight."""
    import gguf
    import torch

    from potstill.edges.codes import weight_of

    importance, bits, weights = mean_squares(model, calibration) if weighted else {}, 0, 0
    for name, layer in layers_of(model):
        weight_OI = weight_of(layer).detach().float().contiguous().numpy()
        falls_back = type == "Q4_K" and weight_OI.shape[1] % BLOCK
        kind = gguf.GGMLQuantizationType["Q5_0" if falls_back else type]
        plain = type == "Q4_0" and not weighted
        made = gguf.quantize(weight_OI, kind) if plain else by_llama_cpp(weight_OI, kind, importance.get(name))
        with torch.no_grad():
            weight_of(layer).copy_(torch.from_numpy(gguf.dequantize(made, kind)))
        bits, weights = bits + 8 * made.nbytes, weights + weight_OI.size
    return bits / weights


def by_llama_cpp(weight_OI: Any, kind: Any, importance_I: Any) -> Any:
    """Blocks of bytes, by the function that `llama-quantize` calls."""
    import gguf
    import numpy

    quantise = ctypes.CDLL(str(import_module("xllamacpp.xllamacpp").__file__)).ggml_quantize_chunk
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    quantise.restype, quantise.argtypes = ctypes.c_size_t, [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    made = numpy.zeros((len(weight_OI), weight_OI.shape[1] // values * size), numpy.uint8)
    given = None if importance_I is None else importance_I.numpy().ctypes.data
    wrote = quantise(kind, weight_OI.ctypes.data, made.ctypes.data, 0, *weight_OI.shape, given)
    assert wrote == made.nbytes
    return made


def mean_squares(model: Any, calibration: Sequence[Any]) -> dict[str, Any]:
    """Of each input of each layer over the calibration rows, in the model of full precision, as `llama-imatrix` measures."""
    import torch

    sums: dict[str, Any] = {}

    def hear(name: str, _: Any, inputs: tuple[Any, ...]) -> None:
        sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).float().square().sum(0)

    hooks = [layer.register_forward_pre_hook(partial(hear, name)) for name, layer in layers_of(model)]
    with torch.no_grad():
        for prompt, response in calibration:
            model.base_model(input_ids=torch.tensor([[*prompt, *response]]))
    for hook in hooks:
        hook.remove()
    tokens = sum(len(prompt) + len(response) for prompt, response in calibration)
    return {name: (total / tokens).contiguous() for name, total in sums.items()}


def by_peer(job: Mapping[str, Any], calibration: Sequence[Any], model: Any) -> dict[str, Any]:
    """Run the peer's script on these rows, and put what it made in place of the model's weights; what it found.

    Raises:
        SystemExit: the script failed, left out a layer, or its weights are too far from the model's.
    """
    import torch
    from safetensors.torch import load_file

    from potstill.edges.codes import weight_of

    name, _, setting = job["way"].partition(": ")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        rows.write_text(json.dumps([[*prompt, *response] for prompt, response in calibration]))
        out = Path(folder, "out")
        out.mkdir()
        asked = {
            "model": str(Path(job["model"].removeprefix("path:")).absolute()),
            "rows": str(rows),
            "setting": setting,
            "out": str(out),
        }
        command, environment = where_runs(job["where"])
        words = [*command, str(PEERS / f"by_{name}.py"), json.dumps(asked)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder)  # some leave logs behind
        if done.returncode:
            raise SystemExit(f"{job['way']} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        found = json.loads((out / "found.json").read_text())
        made = load_file(str(out / "weights.safetensors"))
    for layer_name, layer in layers_of(model):
        weight_OI = made.get(f"{layer_name}.weight")
        if weight_OI is None:
            raise SystemExit(f"{job['way']} left out the layer {layer_name}")
        check_distance(f"{job['way']}, {layer_name}", weight_of(layer).detach(), weight_OI)
        with torch.no_grad():
            weight_of(layer).copy_(weight_OI)
    return found


def check_distance(name: str, weight_OI: Any, made_OI: Any) -> None:
    """Refuse weights that lie further from the model's than a quantiser can have put them.

    Raises:
        SystemExit: they do.
    """
    from potstill.quant.rounding import round_to_nearest

    rounded = round_to_nearest(weight_OI)
    distance = float((made_OI - weight_OI).norm() / (rounded.dequantise() - weight_OI).norm())
    steps_OI = rounded.scales_OG.float().abs().repeat_interleave(rounded.group, 1)
    shift = abs(float((made_OI - weight_OI).sum() / steps_OI.sum()))
    if not (distance < TOO_FAR and shift < SHIFTED):
        far = f"{distance:.1f} times as far from the model as rounding, {shift:.2f} of a step to one side"
        raise SystemExit(f"{name}: {far}; were codes unpacked wrongly?")


def where_runs(where: str) -> tuple[list[str], dict[str, str]]:
    """The command that begins with an interpreter, and its environment."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if not Path(where).is_dir():
        return [where], {**environment, "PYTHONPATH": ""}
    return [sys.executable], {**environment, "PYTHONPATH": where}


def peers_in(words: Sequence[str]) -> dict[str, str]:
    """`NAME: SETTING` and where it runs, one for each setting.

    Raises:
        SystemExit: a name without a script, or without a place.
    """
    known = sorted(path.stem.removeprefix("by_") for path in PEERS.glob("by_*.py"))
    found = {}
    sys.path.insert(0, str(PEERS))
    for word in words:
        name, _, where = word.partition("=")
        name, _, setting = name.partition(":")
        if name not in known or not Path(where).exists():
            raise SystemExit(
                f"--peer {word}: give NAME=WHERE, NAME one of {', '.join(known)}, WHERE an interpreter or a folder"
            )
        settings = __import__(f"by_{name}").SETTINGS
        if setting and setting not in settings:
            raise SystemExit(f"--peer {word}: {name} has the settings {', '.join(settings)}")
        found |= {f"{name}: {each}": str(Path(where).absolute()) for each in ([setting] if setting else settings)}
    return found


def compared(full: Any, model: Any, pairs: Sequence[Any]) -> dict[str, float]:
    """Over response tokens."""
    from potstill.losses.scoring import token_sums
    from potstill.metrics.kl_to_teacher import KLToTeacher

    def agree(logq: Any, _: Any, logp: Any) -> Any:
        return (logq.argmax(-1) == logp.argmax(-1)).double()

    vocab = full.get_output_embeddings().weight.shape[0]
    sums = token_sums(model, full, pairs, vocab, {"kl": KLToTeacher(), "same_first": agree})
    tokens = sum(len(response) for _, response in pairs)
    return {name: sum(values) / tokens for name, values in sums.items()}


COLUMNS: dict[str, tuple[str, float, int]] = {  # what is measured: the column's head, a factor, digits
    "kl": ("KL, 10⁻⁴ nats a token", 1e4, 2),
    "same_first": ("same first token, %", 100, 1),
    "bits": ("bits a weight", 1, 2),
    "seconds": ("seconds", 1, 1),
    "processor_seconds": ("processor seconds", 1, 1),
    "memory_bytes": ("MB", 1e-6, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model of random weights, one draw")
    parser.add_argument("--shape", choices=["quick", "0.5b"], default=None, help="a model of random weights")
    parser.add_argument("--layers", type=int, default=24, help="of --shape 0.5b")
    parser.add_argument("--model", default=None, help="path: or hf: of a model; default: SmolLM2 of POTSTILL_REAL_MODELS")
    parser.add_argument("--rows", default=None, help="a JSONL file of rows; default: the source `primer`")
    parser.add_argument("--count", type=int, default=64, help="calibration rows of a draw")
    parser.add_argument("--held", type=int, default=48, help="rows that are measured on; 0: time alone")
    parser.add_argument("--draws", type=int, default=None, help="of calibration rows; default 3, or 1 of random weights")
    parser.add_argument("--resume", action="store_true", help="keep what the file of --save holds, and add each result to it")
    parser.add_argument(
        "--ways", nargs="*", default=[*WAYS, "ggml Q4_0"], help=f"those to measure, of {', '.join([*WAYS, *GGML])}"
    )
    parser.add_argument("--peer", nargs="*", default=[], metavar="NAME=WHERE", help="packages to measure, and where they live")
    parser.add_argument(
        "--measure", nargs="*", default=[], metavar="NAME=FOLDER", help="what another program made of the same model"
    )
    add_output(parser)
    words = parser.parse_args()
    if words.resume and not words.save:
        parser.error("--resume needs --save")
    if words.one:
        print(json.dumps(measure(json.loads(words.one))))
        return
    report(words, *measured(words, runner(__file__, measure, words.here)))


def measured(
    words: argparse.Namespace, do: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was measured on, and by draw and way what was found.

    Raises:
        SystemExit: there is no model, or a way is unknown.
    """
    shape = words.shape or ("quick" if words.quick else None)
    model = None if shape else words.model or real_model()
    unknown = set(words.ways) - {*WAYS, *GGML}
    if unknown:
        raise SystemExit(f"--ways {', '.join(sorted(unknown))}: there are {', '.join([*WAYS, *GGML])}")
    if model is None and not shape:
        raise SystemExit("name a --model, or set POTSTILL_REAL_MODELS; see `make models`")
    peers, folders = peers_in(words.peer), dict(word.split("=", 1) for word in words.measure)
    if peers and not (model and model.startswith("path:")):
        raise SystemExit("--peer needs a model that lies in a folder: --model path:FOLDER")
    base = {"model": model, "shape": shape, "rows": words.rows, "count": words.count, "held": words.held}
    base |= {"layers": words.layers, "processor": processor(), "solver": solver()}
    ways = (*words.ways, *peers, *folders)
    asked = {way: {"way": way, "where": peers.get(way), "folder": folders.get(way)} for way in ways}
    rounds = resumed(words.save, base) if words.resume else []
    for draw in range(words.draws or words.rounds or (1 if shape else 3)):
        if draw == len(rounds):
            rounds.append({})
        jobs = {way: {**base, **each, "draw": draw} for way, each in asked.items() if way not in rounds[draw]}
        for way, job in jobs.items():
            rounds[draw] |= in_turn([way], 1, lambda _, job=job: do(job))[0]
            if words.resume:
                write(words.save, {"of": base, "rounds": rounds})
    return base, rounds


def resumed(path: Path, base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The draws that a file holds, of the same model, rows and solver on the same machine.

    Raises:
        SystemExit: of others; says which.
    """
    if not path.exists():
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    was = saved.get("of", {})
    differ = [f"{key} {was.get(key)!r} there, {value!r} asked for" for key, value in base.items() if was.get(key) != value]
    if differ:
        raise SystemExit(f"--resume {path}: measured on something else: {'; '.join(differ)}. Give --save another file")
    return saved["rounds"]


def solver() -> str:
    """A digest of the code that quantises."""
    files = sorted(Path(str(find_spec("potstill").origin)).parent.joinpath("quant").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def report(words: argparse.Namespace, of: Mapping[str, Any], rounds: Sequence[Mapping[str, dict[str, Any]]]) -> None:
    whole = [way for way in rounds[0] if all(way in found for found in rounds)]
    for way in {way for found in rounds for way in found} - set(whole):
        print(f"{way} is left out: not every draw of the file has it", file=sys.stderr)
    ways = {way: {key: spread(found[way][key] for found in rounds) for key in numbers(rounds[0][way])} for way in whole}
    columns = {key: column for key, column in COLUMNS.items() if any(key in found for found in ways.values())}
    table(
        ["way", *(head for head, _, _ in columns.values())],
        [
            [
                way,
                *(
                    shown([factor * found[way][key] for found in rounds], digits) if key in rounds[0][way] else ""
                    for key, (_, factor, digits) in columns.items()
                ),
            ]
            for way in ways
        ],
    )
    model = of["model"] or of["shape"]
    found = {"model": model, "rows": words.rows or "primer", "draws": len(rounds), "of": of, "ways": ways}
    hand_over({**found, **facts()}, rounds, words)


def numbers(found: Mapping[str, Any]) -> list[str]:
    return [key for key, value in found.items() if isinstance(value, int | float)]


if __name__ == "__main__":
    main()
