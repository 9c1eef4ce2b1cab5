"""Model folders: what is checked, what is hashed, and that they appear whole or not at all."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from treecast import model_folder
from treecast.checkpoints import (
    DEFAULT_DRAFT,
    assemble_draft,
    default_cache_dir,
    draft_folder,
    ensure_default_draft,
    ensure_default_drafts,
    ensure_default_target,
    read_trained,
    shipped_draft_weights,
)
from treecast.errors import ModelError
from treecast.model_folder import appearing_whole, check_model_dir, model_revision, tokenizer_hash
from treecast.tuning.draft import cut_draft, save_trained


def tiny_llama(hidden_size: int = 16, num_layers: int = 4, vocab_size: int = 32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    shutil.copytree(saved, tmp_path / "tiny")
    return tmp_path / "tiny"


def message_of(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_model_dir(path)
    return caught.value.message


def test_check_passes_when_folder_holds_a_causal_lm(folder: Path) -> None:
    check_model_dir(folder)


def test_check_names_the_path_when_it_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    assert message_of(path) == f"model folder {path} does not exist"


def test_check_says_file_when_path_is_a_file(folder: Path) -> None:
    path = folder / "config.json"
    assert message_of(path) == f"model folder {path} is a file, not a folder"


def test_check_names_config_when_it_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert message_of(folder) == f"model folder {folder} has no config.json"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "config.json is not JSON: Expecting property name"),
        ("[1]", "config.json is not a JSON object"),
    ],
)
def test_check_says_why_when_config_is_unreadable(folder: Path, text: str, complaint: str) -> None:
    (folder / "config.json").write_text(text)
    assert message_of(folder).startswith(f"model folder {folder}: {complaint}")


def test_check_names_architecture_when_model_is_no_causal_lm(folder: Path) -> None:
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
    (folder / "config.json").write_text(json.dumps(config))
    assert message_of(folder) == (
        f"model folder {folder} holds T5ForConditionalGeneration, which is no causal language model"
    )


def test_check_names_model_type_when_config_has_no_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert message_of(folder) == (
        f"model folder {folder} holds model type 'vit', which is no causal language model"
    )


def test_check_says_no_weights_when_they_are_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert message_of(folder) == (
        f"model folder {folder} has no weights (model.safetensors or its index)"
    )


def test_check_names_the_shard_when_one_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message_of(folder) == (
        f"model folder {folder}: model-2.safetensors, named in model.safetensors.index.json, "
        "is missing"
    )


def test_check_gives_both_sizes_when_weights_are_cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    size = len(whole)
    assert message_of(folder) == f"{weights} has {size - 10} bytes; its header says {size}"


def test_check_says_unreadable_when_weights_are_no_safetensors(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"version https://git-lfs")
    assert message_of(folder) == f"{weights} is not a safetensors file: its header is unreadable"


def test_revision_is_equal_when_folder_is_copied(saved: Path, folder: Path) -> None:
    assert model_revision(folder) == model_revision(saved)
    assert len(model_revision(folder)) == 16


def test_revision_is_equal_when_only_the_library_version_differs(saved: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["transformers_version"] = "0.0.0"
    (folder / "config.json").write_text(json.dumps(config))
    assert model_revision(folder) == model_revision(saved)


def test_revision_differs_when_one_weight_differs(saved: Path, folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_revision(folder) != model_revision(saved)


def test_revision_differs_when_the_config_differs(saved: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    assert model_revision(folder) != model_revision(saved)


def test_revision_reads_spread_blocks_when_a_file_is_large(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folder, "_SAMPLE_BYTES", 16)
    monkeypatch.setattr(model_folder, "_MAX_SAMPLES", 4)
    (folder / "model.safetensors").write_bytes(bytes(range(200)))
    blocks = list(model_folder._sampled_blocks(folder / "model.safetensors"))
    assert [block[0] for block in blocks] == [0, 50, 100, 150]
    assert {len(block) for block in blocks} == {16}


def test_tokenizer_hash_follows_tokenizer_json_alone(saved: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert tokenizer_hash(folder) == tokenizer_hash(saved)
    (folder / "tokenizer.json").write_text('{"version": "2.0"}')
    assert tokenizer_hash(folder) != tokenizer_hash(saved)


def test_tokenizer_hash_raises_when_tokenizer_is_missing(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError) as caught:
        tokenizer_hash(folder)
    assert caught.value.message == f"model folder {folder} has no tokenizer.json"


def write_then_fail(folder: Path) -> None:
    with appearing_whole(folder) as partial:
        (partial / "half").write_text("half")
        raise KeyboardInterrupt


def test_nothing_appears_when_materialising_is_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_then_fail(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_folder_is_whole_when_two_materialise_it_at_once(tmp_path: Path) -> None:
    both_wrote = threading.Barrier(2, timeout=10)
    errors: list[BaseException] = []

    def materialise(name: str) -> None:
        try:
            with appearing_whole(tmp_path / "model") as partial:
                (partial / "config.json").write_text(name)
                (partial / "weights").write_text(name)
                both_wrote.wait()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=materialise, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    texts = {file.read_text() for file in (tmp_path / "model").iterdir()}
    assert len(texts) == 1


def test_files_are_readable_by_others_when_folder_appears(tmp_path: Path) -> None:
    with appearing_whole(tmp_path / "model") as partial:
        (partial / "weights").touch(mode=0o600)
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == 0o644


def test_assembled_draft_computes_what_the_cut_draft_does(folder: Path, tmp_path: Path) -> None:
    target = AutoModelForCausalLM.from_pretrained(folder)
    draft = cut_draft(target, (0, 3))
    save_trained(draft, (0, 3), tmp_path / "trained.safetensors", {})
    out = tmp_path / "draft"
    out.mkdir()
    assemble_draft(tmp_path / "trained.safetensors", folder, out)

    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(12).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, draft(ids).logits)
    assert tokenizer_hash(out) == tokenizer_hash(folder)
    check_model_dir(out)


def test_trained_file_holds_no_embedding(folder: Path, tmp_path: Path) -> None:
    draft = cut_draft(AutoModelForCausalLM.from_pretrained(folder), (1,))
    save_trained(draft, (1,), tmp_path / "trained.safetensors", {"note": "x"})
    with safe_open(tmp_path / "trained.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert file.metadata() == {
            "format": "pt",
            "num_layers": "1",
            "layers": "[1]",
            "hidden_size": "16",
            "vocab_size": "32",
            "note": "x",
        }
    assert "model.norm.weight" in names
    assert not any("embed" in name or "head" in name for name in names)


def test_assemble_refuses_when_hidden_sizes_differ(folder: Path, tmp_path: Path) -> None:
    save_trained(tiny_llama(hidden_size=24, num_layers=1), (0,), tmp_path / "other", {})
    with pytest.raises(ModelError) as caught:
        assemble_draft(tmp_path / "other", folder, tmp_path)
    assert caught.value.message == (
        f"draft weights {tmp_path / 'other'} have hidden size 24; the target {folder} has 16"
    )


def test_assemble_refuses_when_vocabularies_differ(folder: Path, tmp_path: Path) -> None:
    other = tiny_llama(hidden_size=16, num_layers=1, vocab_size=40)
    save_trained(other, (0,), tmp_path / "other", {})
    with pytest.raises(ModelError) as caught:
        assemble_draft(tmp_path / "other", folder, tmp_path)
    assert caught.value.message == (
        f"draft weights {tmp_path / 'other'} have vocabulary size 40; the target {folder} has 32"
    )


def test_trained_weights_are_refused_when_the_file_is_cut(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "trained.safetensors"
    save_trained(cut_draft(AutoModelForCausalLM.from_pretrained(folder), (1,)), (1,), file, {})
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"draft weights .*trained.safetensors cannot be read"):
        assemble_draft(file, folder, tmp_path)


def test_matrices_come_back_within_half_a_step_when_stored_in_8_bits(
    folder: Path, tmp_path: Path
) -> None:
    draft = cut_draft(AutoModelForCausalLM.from_pretrained(folder), (0, 3)).to(torch.bfloat16)
    small, large = tmp_path / "int8", tmp_path / "bfloat16"
    save_trained(draft, (0, 3), small, {}, storage="int8")
    save_trained(draft, (0, 3), large, {})
    restored, whole = read_trained(small).tensors, read_trained(large).tensors
    assert restored.keys() == whole.keys()
    for name, tensor in whole.items():
        step = tensor.float().abs().amax(dim=-1, keepdim=True) / 127
        # Half a step of 8 bits, and the rounding of the result to bfloat16.
        bound = step / 2 + tensor.float().abs() / 256 + 1e-9
        assert bool(((restored[name].float() - tensor.float()).abs() <= bound).all()), name
    assert torch.equal(restored["model.norm.weight"], whole["model.norm.weight"])


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREECAST_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("TREECAST_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "treecast"


def test_import_reaches_no_torch() -> None:
    code = "import sys, treecast.checkpoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shipped_weights_are_small_and_say_what_they_are() -> None:
    files = shipped_draft_weights()
    assert files[0].name == f"{DEFAULT_DRAFT}.safetensors"
    assert sum(file.stat().st_size for file in files) <= 24_000_000
    first = read_trained(files[0])
    assert first.layers == (0, 10, 20, 29)
    assert first.head_token_ids is not None
    assert json.loads(first.metadata["heldout_success"])[0] > 0.35


def test_draft_is_refused_when_no_shipped_one_has_its_number() -> None:
    assert draft_folder("./mine-2") == Path("./mine-2")
    with pytest.raises(ModelError, match=r"^draft default-9 does not ship; there are 2$"):
        draft_folder("default-9")


@pytest.mark.model
@pytest.mark.slow
def test_default_models_are_made_once_and_fit_each_other(tmp_path: Path) -> None:
    messages: list[str] = []
    draft_path, second_path = ensure_default_drafts(tmp_path, messages.append)
    target_path = ensure_default_target(tmp_path, messages.append)
    assert messages[-1] == f"{DEFAULT_DRAFT}-2 is ready in {second_path}"
    num_messages = len(messages)
    assert ensure_default_draft(tmp_path, messages.append) == draft_path
    assert ensure_default_drafts(tmp_path, messages.append)[0] == draft_path
    assert len(messages) == num_messages
    made = {path.name for path in tmp_path.iterdir()}
    models = {draft_path.name, second_path.name, target_path.name}
    assert made - {"gguf"} == models  # "gguf" only if it was fetched

    check_model_dir(target_path)
    check_model_dir(draft_path)
    check_model_dir(second_path)
    assert tokenizer_hash(draft_path) == tokenizer_hash(target_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(target_path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert prompt["input_ids"][0, :3].tolist() == [1, 9690, 198]
    target: Any = AutoModelForCausalLM.from_pretrained(target_path)
    answer = target.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert text.startswith("The capital of France is Paris")
    draft: Any = AutoModelForCausalLM.from_pretrained(draft_path)
    assert draft.config.num_hidden_layers == 4
    assert draft.dtype == target.dtype == torch.bfloat16
    logits = draft(answer).logits[0, prompt["input_ids"].shape[1] - 1 : -1]
    assert (logits.argmax(-1) == answer[0, prompt["input_ids"].shape[1] :]).sum() >= 3
