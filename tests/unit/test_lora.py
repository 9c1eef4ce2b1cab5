"""Adapters: the logits of peft's merged model, and bits that neighbours do not change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model

from treecast.decoding.local import generate
from treecast.engine import memory
from treecast.engine.base import KVSequence, Segment
from treecast.engine.exactness import differing_rows
from treecast.engine.hf import HFEngine
from treecast.engine.loading import LoadOptions
from treecast.engine.lora_folder import read_adapter
from treecast.engine.memory import estimate
from treecast.engine.quantized import has_fbgemm
from treecast.errors import ModelError, NotServed
from treecast.sampling.params import SamplingParams

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

VOCAB = 128
TOLERANCE = 1e-4
TEXT = [5 * at % VOCAB for at in range(70)]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {"llama": transformers.LlamaConfig, "gemma2": transformers.Gemma2Config}
"""The first is served by the fused stack, the second by its own modules."""


def save_adapter(model: Any, folder: Path, seed: int = 1, **options: Any) -> Path:
    """A random adapter of rank 8 on a copy of a model, as peft saves it."""
    config = LoraConfig(**({"r": 8, "lora_alpha": 16, "target_modules": list(ALL)} | options))
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    adapted.unload()
    return folder


@pytest.fixture(scope="module", params=list(FAMILIES))
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `base`, and two adapters: `all` on every layer, `few` on some, of other ranks."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[request.param](**SHAPE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(root / "base")
    save_adapter(model, root / "all")
    few = {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "use_rslora": True}
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"up_proj": 3}}
    save_adapter(model, root / "few", seed=2, **few, **patterns)
    return root


def load(root: Path, numerics: Any = "exact", **options: Any) -> HFEngine:
    adapters = {"all": root / "all", "few": root / "few"}
    given = {"dtype": "float32", "threads": 1, "pool_tokens": 2048, "adapters": adapters}
    return HFEngine.load(root / "base", numerics=numerics, **(given | options))


def merged(root: Path, name: str) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    model = base if not name else PeftModel.from_pretrained(base, root / name).merge_and_unload()
    return model.eval()


def expected(root: Path, name: str, tokens: Sequence[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = merged(root, name)(torch.tensor([tokens])).logits[0].numpy()
    return logits


def chain(sequence: KVSequence, tokens: Sequence[int]) -> Segment:
    return Segment.chain(sequence, tokens, range(len(tokens)))


def rows_of(engine: HFEngine, texts: Sequence[tuple[str, Sequence[int]]]) -> list[NDArray[Any]]:
    """[rows, vocab] of each text under its adapter, all in one pass."""
    sequences = [engine.allocate(len(tokens), name) for name, tokens in texts]
    pairs = zip(sequences, texts, strict=True)
    found = engine.forward([chain(sequence, tokens) for sequence, (_, tokens) in pairs])
    values = [np.stack([rows[at] for at in range(len(rows))]) for rows in found]
    for sequence in sequences:
        engine.free(sequence)
    return values


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_logits_are_those_of_pefts_merged_model(folders: Path, numerics: str) -> None:
    engine = load(folders, numerics)
    texts = [("all", TEXT), ("", TEXT), ("few", TEXT[:9]), ("all", TEXT[:3])]
    for (name, tokens), found in zip(texts, rows_of(engine, texts), strict=True):
        assert np.abs(found - expected(folders, name, tokens)).max() < TOLERANCE
    differ = np.abs(expected(folders, "all", TEXT) - expected(folders, "", TEXT)).max()
    assert differ > 0.1, "the adapter changes nothing, so the comparison would say nothing"


def test_bits_do_not_depend_on_neighbours(folders: Path) -> None:
    engine = load(folders)
    for name in ("", "all", "few"):
        (alone,) = rows_of(engine, [(name, TEXT[:17])])
        crowd = [("all", TEXT[:5]), (name, TEXT[:17]), ("few", TEXT[:40]), ("", TEXT[:33])]
        assert np.array_equal(alone, rows_of(engine, crowd)[1])
        one_by_one = engine.allocate(17, name)
        for at in range(17):
            (row,) = engine.forward([chain(one_by_one, TEXT[at : at + 1])])
            engine.commit(one_by_one, [0])
            assert np.array_equal(alone[at], row[0])
        engine.free(one_by_one)


@pytest.mark.skipif(not has_fbgemm(), reason="int8 weights need FBGEMM's kernels")
def test_adapter_is_not_quantized_with_the_models_weights(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside quantized weights it moves logits more nearly as it does beside whole ones."""
    whole, narrow = load(folders), load(folders, weights="int8")
    (alone,) = rows_of(narrow, [("few", TEXT[:9])])
    assert np.array_equal(alone, rows_of(narrow, [("all", TEXT[:30]), ("few", TEXT[:9])])[1])
    monkeypatch.setattr(LoadOptions, "lossless", property(lambda options: options))
    wanted = moved_by_adapter(whole)
    errors = [
        float(np.linalg.norm(moved_by_adapter(engine) - wanted) / np.linalg.norm(wanted))
        for engine in (narrow, load(folders, weights="int8"))
    ]
    assert errors[0] < 0.9 * errors[1]


def moved_by_adapter(engine: HFEngine) -> NDArray[np.float32]:
    """[rows, vocab] by how much it changes the logits of a text."""
    adapted, plain = rows_of(engine, [("few", TEXT), ("", TEXT)])
    return np.asarray(adapted - plain)


def test_bits_of_plain_rows_are_those_of_an_engine_without_adapters(folders: Path) -> None:
    crowd = [("all", TEXT[:5]), ("", TEXT[:17])]
    plain = load(folders, adapters={})
    assert np.array_equal(rows_of(plain, crowd[1:])[0], rows_of(load(folders), crowd)[1])


def test_exactness_is_checked_with_each_adapter(folders: Path) -> None:
    engine = load(folders)
    assert [differing_rows(engine, adapter=name) for name in ("", "all", "few")] == [0, 0, 0]


def test_trees_give_the_tokens_of_peft_merged_and_plain_decoding(folders: Path) -> None:
    from treecast.drafting.growth import BestFirst
    from treecast.drafting.ssm import SSMDrafter

    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompt = TEXT[:10]
    peer = merged(folders, "all")
    ids = torch.tensor([prompt])
    done = peer.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
        min_new_tokens=24, eos_token_id=None,
    )  # fmt: skip
    greedy = done[0, 10:].tolist()
    drafter = SSMDrafter(load(folders, adapters={}), BestFirst())  # drafts without the adapter
    drafted = generate(load(folders), prompt, sampling, 0, drafter, 8, adapter="all")
    assert drafted.tokens == generate(load(folders), prompt, sampling, 0, adapter="all").tokens
    assert drafted.tokens == greedy
    assert drafted.drafted > 0


def test_bfloat16_stays_near_the_merged_model(folders: Path) -> None:
    engine = load(folders, "fast", dtype="bfloat16")
    (found,) = rows_of(engine, [("all", TEXT)])
    error = np.abs(found - expected(folders, "all", TEXT)).max()
    assert error < 0.1 * np.abs(expected(folders, "all", TEXT)).max()


@pytest.mark.parametrize("numerics", [pytest.param("exact", marks=pytest.mark.slow), "fast"])
def test_kernels_of_a_device_give_the_same(folders: Path, numerics: str) -> None:
    if "gemma2" in str(folders):
        pytest.skip("the interpreter is slow; one family is enough")
    engine = load(folders, numerics, kernels="triton", pool_tokens=512)
    texts = [("all", TEXT[:6]), ("", TEXT[:5]), ("few", TEXT[:3])]
    for (name, tokens), found in zip(texts, rows_of(engine, texts), strict=True):
        assert np.abs(found - expected(folders, name, tokens)).max() < TOLERANCE


def test_unknown_adapter_is_refused_by_name(folders: Path) -> None:
    with pytest.raises(NotServed, match=r"^adapter 'none' is not served with .*served: all, few$"):
        load(folders).allocate(8, "none")


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("peft_type", "IA3", "is of type IA3; only LORA is served"),
        ("use_dora", True, "use_dora is True, which is not served"),
        ("bias", "all", "bias is 'all'; only 'none' is served"),
        ("modules_to_save", ["lm_head"], "modules_to_save is"),
        ("init_lora_weights", "pissa", "changes the model's own weights"),
        ("r", 5, "is 8; its config says 5"),
    ],
)
def test_config_that_is_not_served_is_refused(
    folders: Path, tmp_path: Path, entry: str, value: object, reason: str
) -> None:
    config = json.loads((folders / "all" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {entry: value}))
    weights = "adapter_model.safetensors"
    (tmp_path / weights).write_bytes((folders / "all" / weights).read_bytes())
    with pytest.raises(ModelError, match=reason):
        read_adapter("mine", tmp_path)


def test_missing_and_cut_weights_are_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter 'a' in .*adapter_config.json cannot be read"):
        read_adapter("a", tmp_path)
    config = (folders / "all" / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(config)
    whole = (folders / "all" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors cannot be read"):
        read_adapter("a", tmp_path)


def test_memory_is_reckoned_with_adapters(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they take is what is hung on the layers; it counts before anything is read."""
    loaded = [read_adapter(name, folders / name) for name in ("all", "few")]
    held = sum(low_rank.num_bytes for one in loaded for low_rank in one.layers.values())
    options = LoadOptions("float32", "exact", "cpu", None)
    need = estimate(folders / "base", options, 2048)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need.most + held)
    load(folders)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need.most + held - 1)
    monkeypatch.setattr("treecast.engine.hf.load_model", never)
    with pytest.raises(ModelError, match=r"GiB for weights, 0\.00 GiB for adapters"):
        load(folders)


def never(*_: object) -> None:
    raise AssertionError("weights were read")


@pytest.mark.parametrize(
    ("family", "options", "target", "reason"),
    [
        ("Llama", {"hidden_size": 32}, "q_proj", r"layer model.layers.0.self_attn.q_proj has shap"),
        ("Llama", {}, "lm_head", r"changes the model's head, lm_head"),
        ("Llama", {}, "embed_tokens", r"is no A or B of a linear layer"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, family: str, options: dict[str, Any], target: str, reason: str
) -> None:
    config = getattr(transformers, f"{family}Config")(**SHAPE)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    other = getattr(transformers, f"{family}Config")(**(SHAPE | options))
    model = transformers.AutoModelForCausalLM.from_config(other)
    save_adapter(model, tmp_path / "a", target_modules=[target])
    with pytest.raises(ModelError, match=reason):
        load(tmp_path, adapters={"a": tmp_path / "a"})


def test_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=VOCAB)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ModelError, match="fan_in_fan_out is True, which is not served"):
        load(tmp_path, adapters={"a": tmp_path / "a"})
