"""A base that is damaged, or no IDEFICS, is named in one line; no folder that is missing is asked of the hub."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from merging import adapter_for, spoil
from safetensors.torch import load_file, save_file

from finetune.base_model import require_whole
from finetune.export.merge import merge
from modeling import loading
from modeling.config import read_config
from modeling.errors import UserError
from modeling.safetensors_io import read_checkpoint


@pytest.fixture
def base(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


def change(file, **changes):
    """Write a JSON file again; `vision_config__embed_dim=3` reaches into a part, a value of `...` leaves a key out."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        *parts, name = key.split("__")
        inner = content
        for part in parts:
            inner = inner[part]
        inner.pop(name, None)
        if value is not ...:
            inner[name] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -64}, r"hidden_size: expected a whole number from 1 to 131,072, got -64"),
        ({"hidden_size": "64"}, r"hidden_size: expected .*, got '64'"),
        ({"hidden_size": True}, r"hidden_size: expected .*, got True"),
        ({"hidden_size": 2**40}, r"hidden_size: expected a whole number from 1 to 131,072"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers: expected a whole number from 1 to 4,096"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers: expected"),
        ({"vocab_size": 10**4000}, r"vocab_size: expected a whole number .*\.\.\."),
        ({"vocab_size": None}, r"vocab_size: expected .*, got None"),
        ({"cross_layer_interval": 0}, r"cross_layer_interval: expected"),
        ({"num_attention_heads": 3}, r"hidden_size 64 does not divide into 3 heads of an even size"),
        ({"num_attention_heads": 64}, r"does not divide into 64 heads of an even size"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps: expected a number of at least 0 and below 1, got nan"),
        ({"dropout": 1.5}, r"dropout: expected .*, got 1\.5"),
        ({"hidden_act": "evil"}, r"hidden_act: expected one of silu"),
        ({"hidden_act": ["silu"]}, r"hidden_act: expected one of"),
        ({"alpha_initializer": "evil"}, r"alpha_initializer: expected one of zeros"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            r"rope_parameters: expected the rotation that IDEFICS was trained",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling: expected the rotation"),
        ({"alpha_type": "double"}, r"alpha_type: expected one of float, vector, got 'double'"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id: expected a token's number, got \[2, 3\]"),
        ({"eos_token_id": 9_999}, r"eos_token_id 9999 is no token of a vocabulary of 302"),
        ({"vision_config": "ViT"}, r"vision_config: expected an object, got 'ViT'"),
        ({"perceiver_config": [1]}, r"perceiver_config: expected an object"),
        ({"vision_config__patch_size": 99}, r"vision_config: patch_size 99 is larger than the image"),
        ({"vision_config__embed_dim": 97}, r"vision_config: embed_dim 97 does not divide into 4 heads"),
        ({"vision_config__image_size": [64, 64]}, r"vision_config\.image_size: expected a whole number"),
        ({"perceiver_config__resampler_depth": 10**9}, r"perceiver_config\.resampler_depth: expected"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true: its head has no weights"),
        ({"quantization_config": {"load_in_4bit": True}}, "is quantised .*name the released model"),
        ({"model_type": "idefics2"}, "got model_type 'idefics2', another architecture"),
        ({"model_type": "idefics3"}, "got model_type 'idefics3', another architecture"),
        ({"model_type": "llama"}, "expected an IDEFICS model .* got model_type 'llama'"),
        ({"model_type": ["idefics"]}, "expected an IDEFICS model"),
        ({"use_resampler": "no"}, "without a perceiver resampler"),
        ({"additional_vocab_size": 2.0}, r"expected additional_vocab_size 2 .* got 2\.0"),
        ({"additional_vocab_size": [2]}, "expected additional_vocab_size 2"),
    ],
)
def test_config_odd_fields(base, changes, message):
    """A base's config with odd fields is named."""
    change(base / "config.json", **changes)
    with pytest.raises(UserError, match=rf"base/config\.json: (.* )?{message}") as error:
        read_config(str(base))
    assert "\n" not in str(error.value)


def test_config_defaults_of_transformers(base):
    """A config that leaves fields out is completed as transformers does."""
    from transformers import IdeficsConfig

    change(base / "config.json", vocab_size=..., num_attention_heads=..., vision_config__num_channels=...)
    ours, theirs = read_config(str(base)), IdeficsConfig.from_pretrained(base).to_dict()
    for part in ("vision_config", "perceiver_config"):
        assert {key: theirs[part][key] for key in ours[part]} == ours[part]
    keys = ("vocab_size", "num_attention_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    assert {key: theirs[key] for key in keys} == {key: ours[key] for key in keys}
    assert ours["vocab_size"] == 32000


@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token_id": "x"}', '{"max_new_tokens": 1}'])
def test_generation_config_not_read(base, content):
    """A base's generation config is not read."""
    (base / "generation_config.json").write_text(content)
    config = loading.load(str(base)).model.generation_config
    assert (config.eos_token_id, config.max_new_tokens) == ([302, 2], None)


def test_config_refused_by_transformers(base):
    """A field that transformers refuses is named in one line."""
    change(base / "config.json", initializer_range="x")
    with pytest.raises(UserError, match=r"config\.json: transformers refuses it: .*initializer_range.*str") as error:
        loading.open_base(str(base))
    assert "\n" not in str(error.value)


def index(base, **changes):
    """Two weight files and their index, changed; the folder."""
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, members in parts.items():
        save_file({name: tensors[name] for name in members}, base / file, metadata={"format": "pt"})
    (base / "model.safetensors").unlink()
    weight_map = {name: file for file, members in parts.items() for name in members} | changes
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return base


FIRST = "lm_head.additional_fc.weight"
SHARDS = {
    "out of the folder": (lambda b: index(b, **{FIRST: "../../etc/passwd"}), r"names of .*files beside it, got '\.\./"),
    "an absolute path": (lambda b: index(b, **{FIRST: "/etc/passwd"}), "names of .*files beside it, got '/etc/passwd'"),
    "no name": (lambda b: index(b, **{FIRST: ""}), "names of .*files beside it, got ''"),
    "a NUL": (lambda b: index(b, **{FIRST: "a\0.safetensors"}), r"names of .*files beside it, got 'a\\x00"),
    "an endless name": (
        lambda b: index(b, **{FIRST: "a" * 5000 + ".safetensors"}),
        "names of .*files beside it, got 'aaaa",
    ),
    "a number": (lambda b: index(b, **{FIRST: 3}), "names of .*files beside it, got 3"),
    "a list": (lambda b: index(b, **{FIRST: ["a.safetensors"]}), "names of .*files beside it"),
    "another kind": (lambda b: index(b, **{FIRST: "config.json"}), "names of .*files beside it, got 'config.json'"),
    "a shard missing": (
        lambda b: (index(b) / "b.safetensors").unlink(),
        "1 of 2 weight files are missing: b.safetenso",
    ),
    "a shard that is a dead link": (
        lambda b: ((index(b) / "b.safetensors").unlink(), (b / "b.safetensors").symlink_to("nowhere")),
        "1 of 2 weight files are missing",
    ),
    "a shard that is a pointer": (
        lambda b: (index(b) / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"b\.safetensors: is a git-lfs pointer, not the weights: git lfs pull",
    ),
    "a shard cut short": (
        lambda b: (index(b) / "b.safetensors").write_bytes((b / "b.safetensors").read_bytes()[:-9]),
        r"b\.safetensors: .*truncated",
    ),
    "an index cut short": (
        lambda b: (index(b) / "model.safetensors.index.json").write_text('{"weight_map": {"a'),
        r"index\.json: not JSON",
    ),
    "an index without a map": (
        lambda b: (index(b) / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "expected an index with a weight_map",
    ),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_index_and_shards_damaged(base, kind):
    """A base's index and shards that are damaged are named."""
    damage, message = SHARDS[kind]
    damage(base)
    with pytest.raises(UserError, match=message):
        read_checkpoint(base)


TENSORS = {
    "one missing": (lambda t: t.pop("model.norm.weight"), r"base: lacks 1 tensors of its own config: \['model\.norm"),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(65)}),
        r"model\.norm\.weight is \(65,\), its config says \(64,\)$",
    ),
    "many other shapes": (
        lambda t: t.update({name: one[:1].clone() for name, one in t.items() if "q_proj.weight" in name}),
        r"q_proj\.weight is \(1, .*\), its config says .* \(and 13 more differ\)",
    ),
    "eight bits": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
        r"lm_head\.weight is torch\.float8_e4m3fn: a quantised model",
    ),
    "whole numbers": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}),
        r"lm_head\.weight is torch\.int8: a quantised model",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_do_not_fit_config(base, kind):
    """A base's tensors that do not fit its config are named."""
    damage, message = TENSORS[kind]
    spoil(base / "model.safetensors", damage)
    with pytest.raises(UserError, match=message):
        loading.load(str(base))


def rename_image_token(base):
    for path in (base / "tokenizer.json", base / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<image>", "<picture>"))


TOKENIZERS = {
    "cut": lambda b: (b / "tokenizer.json").write_bytes((b / "tokenizer.json").read_bytes()[:500]),
    "a pipe": lambda b: ((b / "tokenizer.json").unlink(), os.mkfifo(b / "tokenizer.json")),
    "empty": lambda b: (b / "tokenizer.json").write_text(""),
    "of an unknown kind": lambda b: change(b / "tokenizer.json", model={"type": "Evil"}),
    "a list": lambda b: (b / "tokenizer.json").write_text("[]"),
    "deep": lambda b: (b / "tokenizer.json").write_text("[" * 100_000),
    "its config a list": lambda b: (b / "tokenizer_config.json").write_text("[1]"),
    "its config cut": lambda b: (b / "tokenizer_config.json").write_text('{"a'),
    "the image processor cut": lambda b: [path.write_text("{") for path in b.glob("*processor_config.json")],
    "another image size": lambda b: [
        path.write_text(path.read_text().replace(": 64", ": 65")) for path in b.glob("*processor_config.json")
    ],
    "without <image>": rename_image_token,
    "without </s>": lambda b: change(b / "tokenizer_config.json", eos_token=None),
    "without a pad token": lambda b: change(b / "tokenizer_config.json", pad_token=None),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_damaged(base, kind):
    """A base's tokenizer that is damaged is named."""
    TOKENIZERS[kind](base)
    with pytest.raises(UserError, match=rf"^{base}[^\n]+$"):
        loading.require_agreement(read_config(str(base)), loading.load_processor(str(base)), where=str(base))


def test_remote_code_not_run(base, tmp_path):
    """Code that a base brings along is not run."""
    (base / "evil.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\nclass Evil: pass\n")
    change(base / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    assert loading.load_processor(str(base)).tokenizer.bos_token_id == 1  # by the rest of the files
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name", ["a/b/c", "./gone", "../gone", "/gone/model", "~/gone", "gone", "merged/", "a b/c", "a\0/b", "x" * 300, ""]
)
@pytest.mark.parametrize("door", [read_config, loading.local_folder, loading.load, loading.load_processor])
def test_missing_folder_is_no_hub_id(name, door, tmp_path, monkeypatch):
    """A folder that is not there is not asked of the hub."""
    monkeypatch.chdir(tmp_path)
    for function in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, function, lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"is neither a folder here nor a hub id \(OWNER/NAME\)") as error:
        door(name)
    assert "\n" not in str(error.value)


def test_missing_merged_model_is_no_hub_id(tmp_path, monkeypatch):
    """A merged model that is missing in a folder that is there is no hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"'runs/mine' is neither a folder here nor a hub id"):
        loading.local_folder("runs/mine")


@pytest.mark.parametrize("door", [read_config, loading.local_folder, loading.load])
def test_hub_id_without_network(door):
    """A hub id without a network gives one line."""
    with pytest.raises(UserError, match="'nobody/nothing' is neither a folder here nor a model the hub gave") as error:
        door("nobody/nothing")
    assert "\n" not in str(error.value)


def test_adapter_named_as_base(base, tmp_path):
    """An adapter named as a base is told."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="found none; it is an adapter: name its base here"):
        read_config(str(tmp_path / "adapter"))


def test_damaged_base_before_merge(base, tmp_path):
    """A damaged base is told before a merge writes anything."""
    (tmp_path / "adapter").mkdir()
    save_file({"model.gated_cross_attn_layers.0.alpha_dense": torch.ones(1)}, tmp_path / "adapter/trained.safetensors")
    rename_image_token(base)
    with pytest.raises(UserError, match="tokenizer and model disagree on the ids of"):
        merge(tmp_path / "adapter", str(base), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_run_base_and_adapter_checked_first(base, tmp_path):
    """A run's base and adapter are looked at before the work."""
    adapter_for(base, tmp_path / "adapter", {"decoder": "lora", "added_tokens": "full"})
    options = {"revision": None, "continue_from": str(tmp_path / "adapter")}
    require_whole(str(base), **options)
    require_whole("HuggingFaceM4/idefics-9b", revision=None, continue_from=None)
    with pytest.raises(UserError, match="the adapter was made for another base"):
        require_whole("HuggingFaceM4/idefics-9b", **options)
    spoil(
        tmp_path / "adapter" / "adapter_model.safetensors", lambda t: [t.pop(name) for name in list(t) if "q_" in name]
    )
    with pytest.raises(UserError, match="not whole: target_modules names 56 matrices"):
        require_whole(str(base), **options)
    spoil(base / "model.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(UserError, match="lacks 1 tensors of its own config"):
        require_whole(str(base), revision=None, continue_from=None)
