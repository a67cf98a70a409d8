"""Weights that a peer packed are read back as it meant them, and refused where they cannot be its own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from potstill.quant.rounding import round_to_nearest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
INPUTS, OUTPUTS, GROUP = 64, 16, 32


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))


def packed(codes_OI: torch.Tensor, scales_OG: torch.Tensor, group_I: torch.Tensor, zero: int = 7) -> dict[str, torch.Tensor]:
    """GPTQ's format, bit by bit as its description has it: eight codes of an output to an int32, eight zero points likewise."""
    words_EO = torch.zeros(INPUTS // 8, OUTPUTS, dtype=torch.int64)
    for i in range(INPUTS):
        words_EO[i // 8] |= (codes_OI[:, i].long() + 8) << (4 * (i % 8))
    zeros = sum(zero << (4 * place) for place in range(8))
    zeros_GE = torch.full((INPUTS // GROUP, OUTPUTS // 8), zeros, dtype=torch.int64)
    return {
        "a.qweight": words_EO.to(torch.int32),  # wraps round, as the format's int32 do
        "a.qzeros": zeros_GE.to(torch.int32),
        "a.scales": scales_OG.T.contiguous(),
        "a.g_idx": group_I.to(torch.int32),
    }


@pytest.fixture
def matrix():
    torch.manual_seed(0)
    return round_to_nearest(torch.randn(OUTPUTS, INPUTS), GROUP)


@pytest.mark.parametrize("mixed", [False, True])
def test_reads_gptq(matrix, mixed, tmp_path):
    from _peer import GPTQ_PARTS, read_gptq, stored_bits

    order_I = torch.randperm(INPUTS) if mixed else torch.arange(INPUTS)  # by activation a group's columns lie anywhere
    codes_OI, weight_OI = matrix.codes_OI[:, order_I], matrix.dequantise()[:, order_I]
    file = packed(codes_OI, matrix.scales_OG, order_I // GROUP)
    save_file({**file, "norm.weight": torch.ones(3)}, str(tmp_path / "model.safetensors"))
    assert torch.equal(read_gptq(tmp_path)["a.weight"], weight_OI)
    zeros, indices = 4 * INPUTS // GROUP * OUTPUTS, 32 * INPUTS
    assert stored_bits(tmp_path, GPTQ_PARTS) == (4 + 16 / GROUP) * INPUTS * OUTPUTS + zeros + indices


def test_another_zero_point_is_refused(matrix, tmp_path):
    from _peer import read_gptq

    save_file(packed(matrix.codes_OI, matrix.scales_OG, torch.arange(INPUTS) // GROUP, zero=8), str(tmp_path / "m.safetensors"))
    with pytest.raises(SystemExit, match="zero points"):
        read_gptq(tmp_path)


def test_what_lies_too_far_is_refused():
    from quantize import check_distance

    weight_OI = torch.randn(OUTPUTS, INPUTS)
    made = round_to_nearest(weight_OI, GROUP)
    check_distance("a", weight_OI, made.dequantise())
    off_by_one = made.dequantise() + made.scales_OG.float().abs().repeat_interleave(GROUP, 1)
    for wrong_OI in (off_by_one, made.dequantise().flip(1), made.dequantise() * torch.nan):
        with pytest.raises(SystemExit, match="unpacked"):
            check_distance("a", weight_OI, wrong_OI)


STUB = """
import json, sys
from pathlib import Path
import torch
from _peer import run
SETTINGS = {"doubles": {}}

def quantise(model, rows, setting, out):
    raise SystemExit(f"rows {rows}")

if __name__ == "__main__":
    run("torch", quantise, SETTINGS)
"""


def test_a_script_gets_its_job(tmp_path):
    import subprocess

    (tmp_path / "by_stub.py").write_text(STUB)
    (tmp_path / "rows.json").write_text("[[1, 2], [3]]")
    job = {"model": "m", "rows": str(tmp_path / "rows.json"), "setting": "doubles", "out": str(tmp_path)}
    command = [sys.executable, str(tmp_path / "by_stub.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(FOLDER / "peers")})
    assert "rows [[1, 2], [3]]" in done.stderr


@pytest.mark.parametrize("word", ["nobody=/tmp", "gptqmodel=/no/such/place", "gptqmodel:nothing=/tmp"])
def test_peers_that_are_none(word):
    from quantize import peers_in

    with pytest.raises(SystemExit, match="--peer"):
        peers_in([word])


def test_a_setting_alone():
    from quantize import peers_in

    assert peers_in(["gptqmodel:act_order=/tmp"]) == {"gptqmodel: act_order": "/tmp"}


# Going on with a file


def asked(path: Path, **others):
    from argparse import Namespace

    given = {"quick": True, "shape": None, "model": None, "ways": ["GPTQ"], "peer": [], "measure": [], "rows": None, "count": 4}
    given |= {"held": 2, "layers": 1, "resume": True, "save": path, "draws": 1, "rounds": None, "json": False}
    return Namespace(
        **{**given, "held": 2, "layers": 1, "resume": True, "save": path, "draws": 1, "rounds": None, "json": False, **others}
    )


def test_a_file_goes_on_with_what_it_lacks(tmp_path, capsys):
    from quantize import measured, report

    def do(job):
        return {"kl": job["draw"] + len(job["way"])}

    path = tmp_path / "found.json"
    measured(asked(path, draws=2), do)
    assert [list(found) for found in json.loads(path.read_text())["rounds"]] == [["GPTQ"], ["GPTQ"]]
    of, rounds = measured(asked(path, ways=["GPTQ", "rounding"]), lambda job: {"kl": 1.5} if job["way"] != "GPTQ" else 1 / 0)
    assert rounds == [{"GPTQ": {"kl": 4}, "rounding": {"kl": 1.5}}, {"GPTQ": {"kl": 5}}]
    report(asked(path), of, rounds)
    assert "rounding is left out: not every draw of the file has it" in capsys.readouterr().err
    assert list(json.loads(path.read_text())["ways"]) == ["GPTQ"]


def test_a_file_of_other_rows_is_refused(tmp_path):
    from quantize import measured

    path = tmp_path / "found.json"
    measured(asked(path), lambda job: {"kl": 1.0})
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"measured on something else: count 4 there, 8 asked for\. Give --save another file"):
        measured(asked(path, count=8), lambda job: {"kl": 2.0})
    assert path.read_bytes() == before
