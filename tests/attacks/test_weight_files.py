"""Files made to hurt: they are refused with a word, unread, within bounds. Each would do its harm in a careless
reader."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from threefold.errors import DamagedData, ModelError, ThreefoldError
from threefold.model.build import build_model, scaled
from threefold.model.families import FAMILIES
from threefold.model.families.family import ONLY
from threefold.model.tensors import HEADER_LIMIT, read_safetensors, write_safetensors
from threefold.model.weights import load_model, save_model
from threefold.strict_json import read_json


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    save_model(build_model(scaled("qwen3", width=32, depth=2, vocab_size=19)), tmp_path / "model")
    return tmp_path / "model"


def file_of(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin: int, end: int, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "model.safetensors"])
def test_S01_a_pickle_is_refused_unread(folder: Path, tmp_path: Path, protocol: int, name: str) -> None:
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"x": Canary(str(canary))}, protocol))
    with pytest.raises(ThreefoldError) as caught:
        load_model(folder)
    assert not canary.exists()
    if name != "model.safetensors" or protocol >= 2:
        assert isinstance(caught.value, ModelError) and "safetensors" in caught.value.hint


def test_S01_and_S03_zip_files_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\0" * 10**7)
    for path in (folder / "model.safetensors", tmp_path / "x.npz"):
        path.write_bytes(buffer.getvalue())
        with pytest.raises(ModelError, match="zip") as caught:
            read_safetensors(path)
        assert "convert" in caught.value.hint
    (folder / "model.safetensors").unlink()
    (folder / "weights.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ModelError, match=r"weights\.npz"):
        load_model(folder)


ATTACKS: dict[str, Any] = {
    "overlap": ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, 12),
    "same-place": ({"a": tensor(0, 8, [2]), "b": tensor(0, 8, [2])}, 8),
    "gap": ({"a": tensor(0, 8, [2]), "b": tensor(12, 20, [2])}, 20),
    "gap-at-the-front": ({"a": tensor(4, 12, [2])}, 12),
    "trailing": ({"a": tensor(0, 8, [2])}, 9),
    "beyond-the-end": ({"a": tensor(0, 4096, [1024])}, 8),
    "negative": ({"a": tensor(-8, 0, [2])}, 8),
    "backwards": ({"a": tensor(8, 0, [2])}, 8),
    "shape-too-large": ({"a": tensor(0, 8, [3])}, 8),
    "shape-overflow": ({"a": tensor(0, 0, [2**62, 4])}, 0),
    "shape-overflow-to-fit": ({"a": tensor(0, 8, [2**63, 2, 2**63 + 2])}, 8),
    "shape-negative": ({"a": tensor(0, 8, [-1, -2])}, 8),
    "shape-float": ({"a": tensor(0, 8, [2.0])}, 8),
    "shape-bool": ({"a": tensor(0, 4, [True])}, 4),
    "shape-no-list": ({"a": tensor(0, 4, 1)}, 4),
    "many-axes": ({"a": tensor(0, 4, [1] * 100)}, 4),
    "offsets-three": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, 4),
    "more-keys": ({"a": {**tensor(0, 4, [1]), "run": "x"}}, 4),
    "fewer-keys": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "no-object": ({"a": [1]}, 4),
    "dtype": ({"a": tensor(0, 4, [1], "F31")}, 4),
    "dtype-list": ({"a": {**tensor(0, 4, [1]), "dtype": ["F32"]}}, 4),
    "metadata": ({"__metadata__": {"a": 1}}, 0),
    "metadata-list": ({"__metadata__": []}, 0),
    "zero-sized-astray": ({"a": tensor(0, 8, [2]), "b": tensor(4, 4, [0])}, 8),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_S02_headers_that_contradict_themselves(name: str, tmp_path: Path) -> None:
    header, size = ATTACKS[name]
    with pytest.raises((DamagedData, ModelError)) as caught:
        read_safetensors(file_of(tmp_path / "x", header, b"\1" * size))
    assert str(tmp_path / "x") in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
        b"{}x",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b" {}",
        b"\xef\xbb\xbf{}",
        b'{"a":"\xff"}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5000 + b"}",
    ],
)
def test_S02_headers_that_are_no_header(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(DamagedData):
        read_safetensors(file_of(tmp_path / "x", text, b"\0" * 4))


@pytest.mark.parametrize("length", [3, 2**63, 2**64 - 1, 100 * 2**20 + 1, HEADER_LIMIT + 1])
def test_S02_lengths_beyond_the_file(length: int, tmp_path: Path) -> None:
    with pytest.raises(DamagedData):
        read_safetensors(file_of(tmp_path / "x", b"{}", length=length))
    for short in range(8):
        (tmp_path / "short").write_bytes(b"\1" * short)
        with pytest.raises(DamagedData):
            read_safetensors(tmp_path / "short")


def test_S02_a_header_of_a_hundred_megabytes_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100 * 2**20))
        file.truncate(8 + 100 * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedData, match="announces a header"):
            read_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_S02_a_file_takes_less_than_twice_its_size(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {f"t{i}": torch.zeros(500_000) for i in range(4)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(read_safetensors(tmp_path / "x")) == 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2 * (tmp_path / "x").stat().st_size


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_S02_any_damage_is_seen_or_harmless(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write_safetensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        read = read_safetensors(path)
    except (DamagedData, ModelError):
        return
    assert sum(t.numel() * t.element_size() for t in read.values()) <= len(content)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "x\0y",
        "link.safetensors",
        "folder",
    ],
)
def test_S06_an_index_that_leads_out_of_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    weights = read_safetensors(folder / "model.safetensors")
    write_safetensors(tmp_path / "outside.safetensors", weights)
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "folder").mkdir()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    with pytest.raises(ModelError):
        load_model(folder)


def test_S06_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    weights = read_safetensors(folder / "model.safetensors")
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    write_safetensors(tmp_path / "cache" / "blobs" / "1", weights)
    (snapshot / "part.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights, "part.safetensors")})
    )
    assert load_model(snapshot).num_parameters() == load_model(folder).num_parameters()


def test_S07_code_in_a_model_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("modeling_evil.py", "configuration_evil.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(f"import os; os.mkdir({str(canary)!r})")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder)
    assert not canary.exists() and "auto_map" in model.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        '{"a":' * 10_000 + "1" + "}" * 10_000,
        '{"model_type": NaN}',
        '{"x": -Infinity}',
        '{"model_type": "gpt2", "model_type": "llama"}',
        "{" + ",".join(f'"k{i}":1' for i in range(10**6)) + "}",
        '"' + "x" * (5 * 2**20) + '"',
        "",
        "[1",
        "{}}",
        '{"a": 1,}',
        "\ufeff{}",
    ],
    ids=[
        "deep-list",
        "deep-object",
        "nan",
        "infinity",
        "twice",
        "million-keys",
        "large",
        "empty",
        "open",
        "closed-twice",
        "comma",
        "mark",
    ],
)
def test_S09_config_bombs(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert len(str(caught.value)) < 500


def test_S09_strict_json_reads_what_is_good(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "x: {[ \\\" "], "b": {"ü": {}}}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == value
    with pytest.raises(ModelError, match="larger than 5 bytes"):
        read_json(tmp_path / "x.json", 5)
    with pytest.raises(ModelError, match="cannot read"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "deep.json").write_text("[" * 65 + "]" * 65)
    with pytest.raises(DamagedData, match="levels deep"):
        read_json(tmp_path / "deep.json", error=DamagedData)


@pytest.mark.parametrize("value", [10**30, -1, 1e308, "7", [], {}, None, True])
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "rope_parameters", "eos_token_id"]
)
def test_S09_absurd_values_are_refused_before_memory_is_taken(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    try:
        load_model(folder)
    except ThreefoldError as problem:
        assert isinstance(problem, ModelError)
    else:
        assert value is None or key == "eos_token_id" or (key, value) == ("rope_parameters", {})


ABSURD = [10**30, -1, 0, 1e308, -0.5, "7", "", [], [[]], {}, {"a": 1}, True, False, [10**30], [[["global"], 10**12]], {"type": [1]}]


@pytest.mark.parametrize("family", FAMILIES)
def test_S09_absurd_values_of_every_key_of_every_family(family: str, tmp_path: Path) -> None:
    """Each is refused as what it is, or means nothing: no other error, and no end that does not come (10^12 layers)."""
    row = FAMILIES[family]
    config = scaled(family, width=32, depth=2, vocab_size=19)
    if family == "roberta":
        config = dataclasses.replace(config, pad_token_id=1)  # its positions begin behind the id that pads
    save_model(build_model(config), tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    keys = {*row.keys, *(key for words in row.words for key in words.keys), *row.only, *ONLY, "pad_token_id", "decoder_start_token_id",
            "id2label", "num_labels", "architectures", "layer_types", "auto_map"}
    refused = 0
    wrong: list[tuple[str, Any, Any]] = []
    for key in sorted(keys):
        for value in ABSURD:
            path.write_text(json.dumps({**good, key: value}))
            try:
                load_model(tmp_path)
            except ThreefoldError as problem:
                refused += 1
                if not isinstance(problem, ModelError) or len(str(problem)) > 1500:
                    wrong.append((key, value, problem))
            except Exception as problem:
                wrong.append((key, value, problem))
    assert not wrong
    assert refused > 8 * len(row.keys)


def test_S09_a_size_that_no_machine_has(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size"):
        (folder / "config.json").write_text(json.dumps({**config, key: 2**31 - 1}))
        with pytest.raises(ModelError):
            load_model(folder)
