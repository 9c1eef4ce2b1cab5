"""Read a Hugging Face model folder, and refuse what cannot be served right."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import structlog
import torch
from torch import Tensor, nn

from treecast.engine import bridge, rerouting
from treecast.engine.base import ModelInfo
from treecast.engine.cut_head import cut_head
from treecast.engine.kv_dtype import KV_FORMATS, KVFormat
from treecast.engine.linears import (
    RowLayers,
    auto_quantizes,
    cpu_layers,
    filled_rows,
    fixed_layers,
    plain_layers,
    product_dtype,
)
from treecast.engine.offload import RESIDENT, Offload
from treecast.engine.progress import reading_told
from treecast.engine.sharding.shape import ALONE, GroupShape
from treecast.engine.unread import unread_model
from treecast.errors import ModelError
from treecast.model_folder import model_revision, tokenizer_hash
from treecast.settings import DType, KVDType, Numerics, Weights

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NUMERICS = get_args(Numerics)
WEIGHTS = get_args(Weights)
Kernels = Literal["auto", "torch", "triton"]
SwapDType = Literal["same", "int8"]

_COMPUTATION = 5
"""Raised whenever our own kernels or runners come to give other bits."""

_BLOOM_CONTEXT = 2048
"""Its biases have no end, and its config tells none; so it was trained."""

_ALIGNMENT = 64

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is to be computed; of one that is divided among a group, our share of it.

    `dtype` is no longer "auto".
    """

    dtype: DType
    numerics: Numerics
    device: str
    threads: int | None
    group: GroupShape = ALONE
    kernels: Kernels = "auto"
    weights: Weights = "auto"
    offload: Offload = RESIDENT
    swap_dtype: SwapDType = "same"
    kept_kv: KVDType = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype {self.dtype!r} is unknown; known are {', '.join(DTYPES)}")
        if self.numerics not in NUMERICS:
            known = ", ".join(NUMERICS)
            raise ModelError(f"numerics {self.numerics!r} are unknown; known are {known}")
        if self.swap_dtype != "same" and self.numerics != "fast":
            raise ModelError(
                f"swapping KV as {self.swap_dtype} loses bits, which numerics {self.numerics} "
                "promise to keep; it needs numerics fast"
            )
        if self.swap_dtype != "same" and self.kept_kv != "auto":
            raise ModelError(
                f"swap dtype {self.swap_dtype} is for KV dtype auto, not for {self.kept_kv}"
            )
        if self.weights not in WEIGHTS:
            known = ", ".join(WEIGHTS)
            raise ModelError(f"weights {self.weights!r} are unknown; known are {known}")
        check_device(self.device)
        if self.weights != "auto" and not (self.on_cpu and not self.uses_triton):
            raise ModelError(
                f"weights {self.weights} are for CPU; on {self.device} weights are of the dtype"
            )
        if self.threads is not None and self.threads < 1:
            raise ModelError(f"threads is {self.threads}; it must be 1 or more")
        if self.kept_kv != "auto" and self.uses_triton:
            raise ModelError(
                f"KV dtype {self.kept_kv} is for CPU; kernels on a device take auto, {self.dtype}"
            )
        if self.offload.mode == "cpu" and self.on_cpu:
            raise ModelError("offload cpu is for a GPU's weights; on a CPU there is offload disk")
        if self.offload.mode != "none" and self.group != ALONE:
            raise ModelError(f"offload {self.offload.mode} is not for models divided among a group")
        if self.offload.mode != "none" and self.weights != "auto":
            raise ModelError(f"weights {self.weights} cannot be offloaded; leave them at auto")

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    @property
    def uses_triton(self) -> bool:
        """Whether attention is Triton's; on CPU, where it is asked for, by its interpreter."""
        if self.numerics == "oracle":
            return False
        return not self.on_cpu if self.kernels == "auto" else self.kernels == "triton"

    @property
    def fills_rows(self) -> bool:
        """Whether linear layers fill up few rows, which may take another code path."""
        return self.numerics == "exact" and not self.uses_triton

    def filled(self, num_rows: int) -> int:
        """Rows that a pass is to compute so that no linear layer has to fill them up by itself."""
        return filled_rows(num_rows) if self.fills_rows else num_rows

    @property
    def lossless(self) -> LoadOptions:
        """The same, with weights that lose nothing: an adapter's are few, and are not quantized."""
        return replace(self, weights="auto")

    @property
    def kept_weights(self) -> Weights:
        """The kind that is computed with, which decides about bits.

        FBGEMM's packed weights are no tensors whose contents could be exchanged; so `auto` keeps
        none in 16 bits where layers take turns.
        """
        halved = self.weights == "auto" and self.on_cpu and auto_quantizes()
        return "float32" if halved and self.offload.mode != "none" else self.weights

    def row_layers(self) -> RowLayers:
        """What linear layers and norms are computed with."""
        if self.uses_triton and self.numerics == "exact":
            return fixed_layers()
        if not self.on_cpu:
            return plain_layers()
        return cpu_layers(self.kept_weights, DTYPES[self.dtype], self.fills_rows)

    @property
    def kv_format(self) -> KVFormat:
        """What keys and values are kept in: what they are computed in, unless asked otherwise."""
        kept = KVFormat(self.kv_dtype)
        return kept if self.kept_kv == "auto" else KV_FORMATS[self.kept_kv]

    @property
    def widens_kv(self) -> bool:
        """Whether the pool is kept in another type than is computed in."""
        return self.kv_format.dtype != self.kv_dtype

    @property
    def kv_dtype(self) -> torch.dtype:
        """What attention computes in.

        float32 wherever rounding keys once more would blur what is compared, or cost time.
        """
        own = DTYPES[self.dtype]
        if self.uses_triton:
            return own
        if self.numerics != "fast":
            return torch.float32
        return product_dtype(own) if self.on_cpu else own


def resolve_dtype(dtype: str, device: str = "cpu") -> DType:
    """What "auto" stands for: bfloat16 where the device multiplies it, else float32."""
    if dtype != "auto":
        return cast(DType, dtype)
    native = torch.device(device).type != "cpu" or product_dtype(torch.bfloat16) == torch.bfloat16
    return "bfloat16" if native else "float32"


def check_device(device: str) -> None:
    """Refuse a device that this machine, or this build of torch, does not have.

    Raises:
        ModelError: what is missing.
    """
    if torch.device(device).type != "cuda" or torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise ModelError(
            f"device {device} needs a CUDA build of torch; this is {torch.__version__}"
        )
    raise ModelError(f"device {device} is not available: torch {torch.__version__} finds no GPU")


def load_model(path: Path, options: LoadOptions) -> nn.Module:
    """Read a causal LM with our attention.

    Sets torch's number of threads where `options.threads` is given.

    Raises:
        ModelError: the folder is no causal LM, or one that cannot be served.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bridge.register()
    try:
        config = read_servable_config(path)
        model = _read_model(path, config, options)
    except (OSError, ValueError) as error:
        raise ModelError(f"model folder {path} cannot be loaded: {error}") from error
    rerouting.reroute(model)
    cut_head(model)
    loaded: nn.Module = model.eval()._apply(lambda tensor: _placed(tensor, options))
    return loaded


def _placed(tensor: Tensor, options: LoadOptions) -> Tensor:
    """On the device, at an address as torch gives them out.

    Tensors of a mapped file begin where its header happens to end, and the matrix library adds up
    in another order there.
    """
    if tensor.is_meta:
        return tensor
    placed = tensor.to(options.device)
    if not options.on_cpu or options.group != ALONE or placed.data_ptr() % _ALIGNMENT == 0:
        return placed
    return placed.clone()


def read_servable_config(path: Path) -> Any:
    """A folder's config, of a model that can be served.

    Raises:
        ModelError: it is none, and why.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model folder {path} cannot be loaded: {error}") from error
    refuse_unservable(config)
    return config


def _read_model(path: Path, config: Any, options: LoadOptions) -> Any:
    """The whole of a rank's share; where layers are offloaded, all but those if that can be."""
    import transformers

    dtype, attention = DTYPES[options.dtype], rerouting.implementation(config.model_type)
    if options.offload.mode != "none":
        model = unread_model(path, config, dtype, attention)
        if model is not None:
            return model
        _log.info("model.read_whole", reason="its tensors are stored under other names")
    with _share(options.group) as share, reading_told(path):
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, **share
        )


@contextmanager
def _share(group: GroupShape) -> Iterator[dict[str, Any]]:
    """What `from_pretrained` must be told to load this rank's share alone."""
    if group == ALONE:
        yield {}
        return
    from transformers.distributed import DistributedConfig

    from treecast.engine.sharding.plan_mend import plans_cut_to_stages

    with plans_cut_to_stages():
        yield {"distributed_config": DistributedConfig(tp_size=group.tp, pp_size=group.pp)}


def num_layers(model: Any) -> int:
    """Layers that keep keys and values."""
    return int(model.config.get_text_config().num_hidden_layers)


def describe(path: Path, model: Any, options: LoadOptions) -> ModelInfo:
    """What the loaded model is, for those who decide where requests go."""
    config = model.config.get_text_config()
    revision = model_revision(path)
    has_tokenizer = (path / "tokenizer.json").is_file()
    return ModelInfo(
        name=path.name,
        revision=revision,
        vocab_size=int(config.vocab_size),
        context_tokens=context_tokens(config),
        eos_token_ids=_eos_token_ids(model),
        tokenizer_hash=tokenizer_hash(path) if has_tokenizer else "",
        fingerprint=fingerprint(revision, options),
    )


def fingerprint(revision: str, options: LoadOptions) -> str:
    """16 hexadecimal digits of all that a logit's bits depend on, besides its row."""
    import transformers

    parts = {
        "revision": revision,
        "computation": _COMPUTATION,
        "dtype": options.dtype,
        "weights": options.kept_weights,
        "numerics": options.numerics,
        "kv": f"{options.kv_dtype} of {options.kv_format.dtype}",
        "kernels": _triton_version() if options.uses_triton else "torch",
        "device": torch.device(options.device).type,
        "processor": _processor() if options.on_cpu else torch.cuda.get_device_name(options.device),
        "threads": torch.get_num_threads() if options.on_cpu else 0,
        "group": f"tp {options.group.tp}, pp {options.group.pp}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if options.swap_dtype != "same":
        parts["swap"] = options.swap_dtype
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]


def _triton_version() -> str:
    import triton

    return f"triton {triton.__version__}"


def _processor() -> str:
    """Vendor and vector instructions: the matrix libraries choose their code by both."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {capability}"
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = facts.get("flags", facts.get("Features", "")).split()
    vector = sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma", "sve", "bf16")))
    return f"{platform.machine()} {facts.get('vendor_id', '')} {capability} {' '.join(vector)}"


def refuse_unservable(config: Any) -> None:
    """Refuse, before any weight is read, a model whose state is no positions in a KV pool.

    Raises:
        ModelError: the reason.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = f"model type {config.model_type}"
    if config.is_encoder_decoder:
        raise ModelError(f"{kind} is an encoder-decoder; only causal language models are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{kind} has no causal language model in transformers")
    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False):
        raise ModelError(
            f"{kind} keeps a recurrent state, which branches of a tree cannot share; "
            "only attention over keys and values is served"
        )
    if (packed := getattr(config, "quantization_config", None)) is not None:
        method = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
        raise ModelError(
            f"the weights are quantised by {method}; `treecast models convert` makes a folder of "
            "them that is served, where they can be unpacked"
        )
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(f"{kind} has layers of type {unknown[0]}; full and sliding are served")


def context_tokens(config: Any) -> int:
    """Positions that the model was made for."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if (context := getattr(config, name, None)) is not None:
            return int(context)
    if config.model_type == "bloom":
        return _BLOOM_CONTEXT
    raise ModelError(f"model type {config.model_type} has no max_position_embeddings")


def _eos_token_ids(model: Any) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, list | tuple) else frozenset([int(ids)])
