"""Doctor passes on a healthy installation and fails, with exit 1, on a sick one."""

import hashlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import sparsek_cli as api
from sparsek_cli.checkpoint_files.file_hashes import as_written
from sparsek_cli.checkpoint_files.shards import read_shard
from sparsek_cli.diagnosis import diagnose, installation, kernels
from sparsek_cli.diagnosis.model import topk_in_words


def test_healthy(sparsek, converted):
    shown = sparsek("doctor", converted, "--json", "--device", "cpu")
    report = json.loads(shown.out)
    assert shown.code == 0 and report["ok"], report
    rows = {row["name"]: row for row in report["checks"]}
    for name in (
        "shadowing",
        "operator",
        "attention",
        "decode",
        "dense equivalence",
        "cache bytes",
    ):
        assert rows[name]["ok"] is True, rows[name]
    assert rows["torch"]["detail"] and rows["backend"]["detail"]
    assert rows["cache bytes"]["detail"].endswith(" KiB, computed in float32)")


def test_layers_that_read_another_s_keys_attend_too(sparse_model):
    from sparsek_cli.diagnosis.model import _sparse_path

    (check,) = _sparse_path(sparse_model("gemma4_text-shared"))
    assert check.ok and check.detail.startswith("2 calls of SparseK attention in 2 layers (1 of")


def test_of_many_heads_no_list_of_numbers_is_shown():
    assert topk_in_words(8) == "8"
    topk = [[0, 4, 8], None, 12, [12, 4, 2]]
    assert topk_in_words(topk) == "0 to 12 by head (6 on average)"


def test_dense_model_is_said_to_be_dense(sparsek, dense_checkpoint):
    shown = sparsek("doctor", dense_checkpoint(), "--device", "cpu")
    assert shown.code == 0 and "is dense" in shown.out


def test_a_decoder_that_says_it_has_an_encoder_fails(sparsek, dense_checkpoint):
    file = dense_checkpoint() / "config.json"
    fields = json.loads(file.read_text()) | {"is_encoder_decoder": True}
    file.write_text(json.dumps(fields))
    shown = sparsek("doctor", file.parent, "--device", "cpu")
    assert shown.code != 0 and "is_encoder_decoder" in shown.out + shown.err


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_no_numbers_fail_of_dense_models_too(sparsek, dense_checkpoint, value):
    """Verbs whose loss is NaN send here, and here all was well."""
    from safetensors.torch import load_file, save_file

    file = dense_checkpoint() / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    shown = sparsek("doctor", file.parent, "--device", "cpu")
    assert shown.code == 1 and "1 check failed: numbers" in shown.err
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in shown.out


def test_a_base_s_files_are_those_that_were_written(sparsek, dense_checkpoint, tmp_path):
    """A bit that flips leaves a number, which loads as any other."""
    base, out = dense_checkpoint(), tmp_path / "out"
    made = dict(topk=8, window=8, calibrate="none")
    api.convert(base, out, **made)
    line = ["doctor", "--device", "cpu"]
    shown = sparsek(*line, out)
    assert shown.code == 0 and "1 of 1 files of weights are what was written" in shown.out
    flipped = bytearray((out / "base-00001.safetensors").read_bytes())
    entries = read_shard(out / "base-00001.safetensors").tensors.values()
    largest = max(entries, key=lambda entry: entry.end - entry.start)
    flipped[largest.start + 300] ^= 1  # where loading takes no sample
    (out / "base-00001.safetensors").unlink()  # it may be the base's own
    (out / "base-00001.safetensors").write_bytes(flipped)
    api.load(out, device="cpu")
    shown = sparsek(*line, out)
    assert shown.failed(1) and "FAIL files" in shown.out and "base-00001.safetensors" in shown.out
    # Scorers that are fitted to it anew do not make it whole.
    api.convert(out, tmp_path / "anew", **made, again=True)
    assert "FAIL files" in sparsek(*line, tmp_path / "anew").out
    # The hub's cache names files after what they are to be: damaged before they were converted.
    blob = tmp_path / "cache" / "blobs" / hashlib.sha256(b"as the hub has it").hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(flipped)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(blob)
    api.convert(base, tmp_path / "second", **made)
    assert "FAIL files" in sparsek(*line, tmp_path / "second").out
    # Earlier versions, and other programs, wrote no hashes.
    index = out / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    for key, told in (
        ("sha256", "1 by some bytes of each tensor"),
        ("sparsek_samples", "nothing says what they were"),
    ):
        del fields["metadata"][key]
        index.write_text(json.dumps(fields))
        shown = sparsek(*line, out)
        assert shown.code == 0 and told in shown.out


def test_hashes_that_other_tools_wrote_are_no_false_alarm(tmp_path):
    file, index = tmp_path / "base-00001.safetensors", tmp_path / "model.safetensors.index.json"
    file.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    for written in ({file.name: None}, {file.name: "crc:1"}, {file.name: right.upper()}, ["?"]):
        index.write_text(json.dumps({"metadata": {"sha256": written}, "weight_map": {}}))
        assert as_written(tmp_path, [file.name])[file.name] is not False, written


def test_failing_check_is_reported_and_exits_1(sparsek, monkeypatch):
    def broken(device):
        raise RuntimeError("kernel exploded\nat line 3")
        yield

    monkeypatch.setattr(diagnose, "operator", broken)
    shown = sparsek("doctor", "--device", "cpu")
    assert shown.failed(1)
    assert "FAIL operator" in shown.out and "kernel exploded" in shown.out
    assert "ok   attention" in shown.out, "one failed check does not stop the others"


def test_wrong_operator_is_noticed(monkeypatch):
    import sparsek_kernels
    import torch

    monkeypatch.setattr(sparsek_kernels, "sparsek", lambda z, k: torch.full_like(z, 0.5))
    assert [check.ok for check in kernels.operator(torch.device("cpu"))] == [False]


def test_shadowing_is_noticed(monkeypatch):
    ours = Path(__file__).resolve().parents[2] / "kernels/__init__.py"
    spec = types.SimpleNamespace(origin=str(ours))
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: spec)
    [check] = installation.shadowing()
    assert check.ok is False and "source root" in check.hint


def test_what_needs_no_import_is_said_before_pytorch_is_loaded():
    code = (
        "import sys; from sparsek_cli.diagnosis.diagnose import diagnose\n"
        "for check in diagnose(None, device='cpu', say=print):\n"
        "    print(check.name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    loading, checking = lines.index("loading PyTorch"), lines.index("checking the kernels on cpu")
    assert {"sparsek False", "torch False", "shadowing False"} < set(lines[:loading]), done
    assert {"cpu True", "backend True"} < set(lines[loading:checking]), done
    assert lines[checking + 1 :] == ["operator True", "attention True", "decode True"], done


def test_rows_are_printed_as_they_come(sparsek, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnose, "choose_device", interrupted)
    shown = sparsek("doctor")
    assert shown.code == 130 and "     torch  " in shown.out and "shadowing" in shown.out
    assert shown.err.splitlines()[0] == "...  loading PyTorch"


@pytest.mark.parametrize("words", [["--json"], ["--quiet"]])
def test_who_wants_no_progress_gets_none(sparsek, words):
    shown = sparsek("doctor", "--device", "cpu", *words)
    assert shown.code == 0 and shown.err == ""
    assert words != ["--json"] or json.loads(shown.out)["ok"]


def test_without_pytorch_the_rest_is_not_asked(sparsek, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it could not be imported
    shown = sparsek("doctor")
    assert shown.failed(1) and "FAIL pytorch" in shown.out and "operator" not in shown.out


def test_unknown_model(sparsek):
    assert sparsek("doctor", "tinny").failed(2)
