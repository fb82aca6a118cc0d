"""An adapter that is not whole, or not made for the base, is named before anything is done with it."""

import json
import os
import pickle
import shutil
import time

import peft
import pytest
import torch
from merging import UP, adapter_for, spoil
from safetensors.torch import load_file, save_file
from small_models import stand_in
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from finetune.export.merge import merge
from modeling import bounded_regex, loading
from modeling.adapter_weights import AdapterWeights, by_pattern, lora_targets, saved_modules
from modeling.adapters import attach, load_adapter_weights, open_adapter
from modeling.errors import UserError
from modeling.shapes import IDEFICS_9B, tensor_shapes

SHAPES = tensor_shapes({**stand_in(IDEFICS_9B), "additional_vocab_size": 3})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"


@pytest.fixture(scope="module")
def whole(base_folder, tmp_path_factory):
    """LoRA of rank 4 on the decoder, added tokens through modules_to_save, gates in our own file."""
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    adapter_for(base_folder, folder, {"decoder": "lora", "added_tokens": "full", "gates": "full"})
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "adapter")


def check(folder):
    AdapterWeights.read(folder).require_fit(SHAPES)


def configure(folder, **changes):
    """Write the config again; a value of `...` leaves its key out."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_whole_adapter_fits(folder):
    """A whole adapter fits."""
    check(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"peft_type":"LORA",', r"adapter_config\.json: not JSON .*cut short: fetch or save the adapter again"),
        (b"", r"adapter_config\.json: not JSON"),
        (b"\xff\xfe{}", r"adapter_config\.json: not JSON"),
        (b"[" * 200_000, r"adapter_config\.json: not JSON"),
        (b"[1]", r"adapter_config\.json: expected a JSON object, got list"),
        (b"{}", "expected LoRA, got an adapter of PEFT's type None"),
        (b'{"peft_type":"EVIL"}', "expected LoRA, got an adapter of PEFT's type EVIL"),
        (b'{"peft_type":["LORA"]}', "expected LoRA, got an adapter of PEFT's type"),
        (b'{"peft_type":"LORA"}', r"adapter_config\.json: r: expected a rank, .*, got nothing"),
    ],
)
def test_adapter_config_not_one(folder, content, message):
    """An adapter config that is none is named."""
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        check(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r: expected a rank, a whole number from 1, got 0"),
        ({"r": "4"}, "r: expected a rank, .*, got '4'"),
        ({"r": True}, "r: expected a rank, .*, got True"),
        ({"r": 10**30}, "r: expected a rank"),
        ({"lora_alpha": None}, "lora_alpha: expected a finite number other than 0, got None"),
        ({"lora_alpha": 0}, "lora_alpha: expected a finite number other than 0, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number other than 0, got nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": ...}, "lora_alpha: expected a finite number other than 0, got nothing"),
        ({"target_modules": ...}, "target_modules: expected names of modules, or a pattern, got nothing"),
        ({"target_modules": []}, r"target_modules: expected names .*, got \[\]"),
        ({"target_modules": [1]}, r"target_modules: expected names .*, got \[1\]"),
        ({"target_modules": {"q_proj": 1}}, "target_modules: expected names"),
        ({"target_modules": ["q\0"]}, "target_modules: expected names"),
        ({"rank_pattern": [1]}, "rank_pattern: expected a mapping of patterns to ranks"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: expected a mapping of patterns to ranks"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: expected a mapping of patterns to finite numbers"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected names of modules, got 'lm_head'"),
        ({"layers_to_transform": "all"}, "layers_to_transform: expected numbers of layers"),
        ({"layers_to_transform": [0]}, "PEFT refuses these fields: `layers_to_transform` cannot be used when"),
        ({"use_dora": "yes"}, "use_dora: expected true or false, got 'yes'"),
        ({"zoom": 2}, "zoom: this version of PEFT has no such field, and it may change the result"),
        ({"megatron_config": {"x": 1}}, "cannot be merged exactly: megatron_config"),
        ({"init_lora_weights": "pissa"}, "cannot be merged exactly: init_lora_weights is 'pissa'"),
        ({"bias": ["all"]}, "cannot be merged exactly: bias"),
    ],
)
def test_adapter_config_field(folder, changes, message):
    """An adapter config's field is named."""
    configure(folder, **changes)
    with pytest.raises(UserError, match=rf"adapter_config\.json: {message}"):
        check(folder)


def test_adapter_config_unknown_empty_fields(folder):
    """Fields of other versions without a value do no harm."""
    configure(folder, new_in_the_next_version=None, and_another=False, peft_version="9.9", rank_pattern=None)
    configure(folder, layer_replication=[], trainable_token_indices={}, loftq_config={})
    check(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def rename_to_pickle(folder, content):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(content)


class Touch:
    """A pickle that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def save_pickle(folder, value):
    (folder / "adapter_model.safetensors").unlink()
    torch.save(value, folder / "adapter_model.bin")


HEAD = "base_model.model.lm_head"
WEIGHTS = {
    "missing": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors in it"),
    "a broken link": (
        lambda f: ((f / "adapter_model.safetensors").unlink(), (f / "adapter_model.safetensors").symlink_to("gone")),
        "no adapter_model.safetensors in it",
    ),
    "a git-lfs pointer": (
        lambda f: (f / "adapter_model.safetensors").write_text(LFS),
        r"adapter_model\.safetensors: is a git-lfs pointer, not the weights: git lfs pull",
    ),
    "cut short": (lambda f: cut(f / "adapter_model.safetensors"), r"adapter_model\.safetensors: .*truncated"),
    "our own file cut short": (lambda f: cut(f / "trained.safetensors"), r"trained\.safetensors: .*truncated"),
    "a web page": (
        lambda f: (f / "adapter_model.safetensors").write_text("<!DOCTYPE html><html>" * 9),
        "not a safetensors file",
    ),
    "no tensor": (lambda f: save_file({}, f / "adapter_model.safetensors"), "holds no tensor .*ZeRO-3"),
    "empty tensors": (
        lambda f: spoil(f / "adapter_model.safetensors", lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(0)})),
        r"up_proj\.lora_A\.weight is empty, \(0,\) .*ZeRO-3",
    ),
    "whole numbers": (
        lambda f: spoil(
            f / "adapter_model.safetensors",
            lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int64)}),
        ),
        r"up_proj\.lora_A\.weight: expected floating-point numbers, got torch\.int64",
    ),
    "not a number": (
        lambda f: spoil(f / "adapter_model.safetensors", lambda t: t[f"{UP}.lora_B.weight"][1, 1].fill_(torch.nan)),
        r"up_proj\.lora_B\.weight holds values that are not finite",
    ),
    "an infinite gate": (
        lambda f: spoil(
            f / "trained.safetensors", lambda t: t["model.gated_cross_attn_layers.0.alpha_dense"].fill_(torch.inf)
        ),
        r"trained\.safetensors: model\.gated.*alpha_dense holds values that are not finite",
    ),
    "a pickle of something else": (lambda f: save_pickle(f, [1]), "expected a mapping of names to tensors, got list"),
    "a cut pickle": (lambda f: rename_to_pickle(f, b"PK\x03\x04abc"), "cannot be read as a pickle of tensors alone"),
    "a pickle that unfolds": (
        lambda f: save_pickle(f, {"x": torch.zeros(1).expand(10**7, 10**7)}),
        "is more than the file holds",
    ),
    "a folder in place of our own file": (
        lambda f: ((f / "trained.safetensors").unlink(), (f / "trained.safetensors").mkdir()),
        r"trained\.safetensors: expected a file of tensors, found something else",
    ),
    "a pipe in place of the config": (
        lambda f: ((f / "adapter_config.json").unlink(), os.mkfifo(f / "adapter_config.json")),
        r"adapter_config\.json: cannot be read: expected a file, found a pipe",
    ),
    "a folder in place of the config": (
        lambda f: ((f / "adapter_config.json").unlink(), (f / "adapter_config.json").mkdir()),
        r"adapter_config\.json: cannot be read: expected a file, found a folder",
    ),
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(),
        r"adapter_model\.\* lies there without its adapter_c",
    ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_adapter_weights_damaged(folder, kind):
    """An adapter's weights that are damaged are named."""
    damage, message = WEIGHTS[kind]
    damage(folder)
    with pytest.raises(UserError, match=message):
        check(folder)


def test_adapter_pickle_not_run(folder, tmp_path):
    """An adapter's pickle is opened without running it."""
    rename_to_pickle(folder, pickle.dumps({"x": Touch(tmp_path / "made")}))
    with pytest.raises(UserError, match=r"adapter_model\.bin: cannot be read as a pickle of tensors alone"):
        check(folder)
    assert not (tmp_path / "made").exists()


def without(part):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


HALVES = {
    "no v_proj": (
        without("v_proj"),
        "not whole: target_modules names 56 matrices of the base, .* 48 of them, .*v_proj",
    ),
    "a layer missing": (without("layers.7."), r"names 56 matrices .* 49 of them, not for model\.layers\.7\."),
    "one lora_A alone": (without("layers.1.mlp.up_proj.lora_B"), "expected LoRA of a linear layer, .* got .*lora_A"),
    "no LoRA at all": (without(".lora_"), "one of LoRA, and no tensor of LoRA is there"),
    "no added tokens": (
        without("lm_head.additional_fc"),
        r"not whole: modules_to_save names lm_head\.additional_fc\.w",
    ),
    "another rank": (
        lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(3, 64), f"{UP}.lora_B.weight": torch.ones(96, 3)}),
        r"up_proj\.weight has LoRA of rank 3, and .*adapter_config\.json says 4",
    ),
    "LoRA that no pattern names": (
        lambda t: t.update(
            {
                "base_model.model.model.gated_cross_attn_layers.0.cross_attn.q_proj.lora_A.weight": torch.ones(4, 64),
                "base_model.model.model.gated_cross_attn_layers.0.cross_attn.q_proj.lora_B.weight": torch.ones(64, 4),
            }
        ),
        "has LoRA for model.gated_cross_attn_layers.0.cross_attn.q_proj.weight, which .* does not name",
    ),
    "a foreign head": (
        lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 64)}),
        "holds score.weight, which its adapter_config.json does not name in modules_to_save",
    ),
    "a bias that nothing names": (
        lambda t: t.update({f"{UP}.bias": torch.ones(96)}),
        "up_proj.bias, which its adapter_config.json does not name",
    ),
    "LoRA's own bias": (lambda t: t.update({f"{UP}.lora_B.bias": torch.ones(96)}), "expected LoRA of a linear layer"),
    "a magnitude without DoRA": (
        lambda t: t.update({f"{UP}.lora_magnitude_vector": torch.ones(96)}),
        "has a magnitude, and .* says use_dora False",
    ),
    "LoRA of a convolution": (
        lambda t: t.update({f"{UP}.lora_A.weight": torch.ones(4, 64, 1, 1)}),
        "expected LoRA of a linear layer",
    ),
}


@pytest.mark.parametrize("kind", HALVES)
def test_half_an_adapter(folder, kind):
    """Half an adapter is refused."""
    change, message = HALVES[kind]
    spoil(folder / "adapter_model.safetensors", change)
    with pytest.raises(UserError, match=message):
        check(folder)


def test_saved_module_not_in_base(folder):
    """A saved module that the base does not have is refused."""
    configure(folder, modules_to_save=["additional_embedding", "additional_fc", "classifier"])
    with pytest.raises(UserError, match="modules_to_save names 'classifier', which the base does not have"):
        check(folder)


def test_dora_without_magnitude(folder):
    """DoRA without a magnitude is refused."""
    configure(folder, use_dora=True)
    with pytest.raises(UserError, match=r"has no magnitude, and .* says use_dora True"):
        check(folder)


def test_lora_on_head_refused(folder):
    """LoRA on the head beside its saved base layer is refused."""
    configure(folder, target_modules=["up_proj", "lm_head"], modules_to_save=None)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name: one for name, one in tensors.items() if ".layers." in name and "up_proj" in name}
    head = {"base_layer.weight": (300, 64), "base_layer.additional_fc.weight": (3, 64)}
    head |= {"lora_A.weight": (4, 64), "lora_B.weight": (300, 4)}
    tensors |= {f"{HEAD}.{name}": torch.ones(shape) for name, shape in head.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"LoRA on lm_head\.weight, which in IDEFICS is two matrices"):
        check(folder)


def test_tensor_in_both_files(folder):
    """A tensor in both files is refused."""
    spoil(folder / "trained.safetensors", lambda t: t.update({"lm_head.additional_fc.weight": torch.ones(3, 64)}))
    with pytest.raises(UserError, match=r"lm_head\.additional_fc\.weight is there twice"):
        check(folder)


def test_whole_matrix_with_lora(folder):
    """A matrix that is there whole and has LoRA is refused."""
    spoil(folder / "trained.safetensors", lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(96, 64)}))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight is there whole, and has LoRA as well"):
        check(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_adapter_in_other_dtype(folder, dtype):
    """An adapter in another precision is read."""
    spoil(
        folder / "adapter_model.safetensors",
        lambda t: t.update({name: one.to(dtype) for name, one in list(t.items())}),
    )
    check(folder)
    assert AdapterWeights.read(folder).lora["model.layers.1.mlp.up_proj.weight"]["lora_A"].dtype == dtype


def test_same_rule_at_every_door(folder, base_folder, tmp_path):
    """merge, chat and evaluation (`open_adapter`), resuming and continue_from (`load_adapter_weights`)."""
    model = loading.load(str(base_folder)).model
    spoil(folder / "adapter_model.safetensors", without("v_proj"))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    for door in (
        lambda: merge(folder, str(base_folder), tmp_path / "merged"),
        lambda: open_adapter(model, folder),
        lambda: load_adapter_weights(model, folder),
    ):
        with pytest.raises(UserError, match=r"not whole: target_modules names 56 matrices"):
            door()
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_continue_at_other_scale(folder, base_folder):
    """Continued training at another scale is refused."""
    model = loading.load(str(base_folder)).model
    modes = {"decoder": "lora", "added_tokens": "full", "gates": "full"}
    attached = attach(model, modes, lora={"r": 4, "lora_alpha": 16}, base="base")
    with pytest.raises(UserError, match=r"trained at a scale \(alpha / rank\) of 2, and this recipe's is 4"):
        load_adapter_weights(attached, folder)


CONFIGS = {
    "suffixes": {"target_modules": ["q_proj", "down_proj"]},
    "one module by its path": {"target_modules": ["model.layers.3.mlp.up_proj", "fc1"]},
    "a pattern": {"target_modules": r".*layers\.[0-4]\..*(q|v)_proj"},
    "excluded by suffix": {"target_modules": ["q_proj", "fc"], "exclude_modules": ["cross_attn.q_proj", "1.fc"]},
    "excluded by pattern": {"target_modules": ["q_proj"], "exclude_modules": r".*vision.*"},
    "layers": {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [0, 3]},
    "one layer, by its list": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "layers of two lists": {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["gated_cross_attn_layers", "encoder.layers"],
    },
    "modules saved whole": {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["cross_attn", "latents"]},
    "all linear": {"target_modules": "all-linear"},
    "ranks and alphas": {
        "target_modules": ["q_proj", "fc", "up_proj"],
        "rank_pattern": {r"layers\.1\..*": 2, "q_proj": 3, "vision_model.*q_proj": 5},
        "alpha_pattern": {"^model.layers.*": 7, "fc|up_proj": 9},
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_lora_targets_equal_peft(kind):
    """LoRA targets ranks and alphas are those of PEFT."""
    shapes, config = tensor_shapes(stand_in(IDEFICS_9B)), peft.LoraConfig(r=4, lora_alpha=6, **CONFIGS[kind])
    modules = [n.removesuffix(".weight") for n, shape in shapes.items() if n.endswith(".weight") and len(shape) > 1]
    targets = lora_targets(config, modules, where="x")
    ranks = by_pattern(config.rank_pattern, config.r, modules, where="x")
    alphas = by_pattern(config.alpha_pattern, config.lora_alpha, modules, where="x")
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig(**stand_in(IDEFICS_9B)))
    theirs = peft.get_peft_model(model, config).get_base_model()
    layers = {name: one for name, one in theirs.named_modules() if isinstance(one, peft.tuners.lora.LoraLayer)}
    assert targets == layers.keys()
    assert targets
    assert {name: ranks[name] for name in targets} == {name: one.r["default"] for name, one in layers.items()}
    assert {name: alphas[name] for name in targets} == {name: one.lora_alpha["default"] for name, one in layers.items()}
    saved = {n for n, one in theirs.named_modules() if isinstance(one, peft.utils.ModulesToSaveWrapper)}
    paths = {name for name, _ in theirs.named_modules()}
    assert saved_modules(config.modules_to_save or [], paths) == saved


HOSTILE = r"(\w+\.?)+!"


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": HOSTILE},
        {"exclude_modules": HOSTILE},
        {"rank_pattern": {HOSTILE: 4}},
        {"alpha_pattern": {HOSTILE: 8}},
        {"modules_to_save": [HOSTILE]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_adapter_pattern_backtracks(folder, changes, monkeypatch):
    """Adapter pattern that backtracks without end is ended."""
    monkeypatch.setattr(bounded_regex, "LIMIT_S", 0.2)
    configure(folder, **changes)
    if "modules_to_save" in changes:  # else its tensors are refused first
        spoil(folder / "adapter_model.safetensors", without("additional"))
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{next(iter(changes))}: .*matching takes longer than 0.2 s"):
        check(folder)
    assert time.monotonic() - started < 30  # the machine may be busy; the pattern would take years


@pytest.mark.parametrize("pattern", ["(", "*", "a{2,1}", "(?P<x>a)(?P<x>b)", "[z-a]", "x\\", "(" * 5000 + ")" * 5000])
def test_adapter_pattern_invalid(folder, pattern):
    """Adapter pattern that is none is named."""
    configure(folder, target_modules=pattern)
    with pytest.raises(UserError, match=r"target_modules: .* is no regular expression: ") as error:
        check(folder)
    assert len(str(error.value)) < 1000
