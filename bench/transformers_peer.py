"""transformers, plain and assisted, in a process of its own: JSON lines in, JSON lines out.

Run as `python -m treecast.bench.transformers_peer --model PATH --draft PATH ...`. It says
{"event": "ready", ...} when loaded. {"encode": text} is answered with the chat's token ids,
{"mode": "generate" | "assisted", "prompts": [[...], ...], "max_tokens": n} with timed answers;
"assisted" takes one prompt alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

from treecast.bench.prompts import encode_chat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    peer = Peer(flags.model, flags.draft, getattr(torch, flags.dtype), flags.device)
    _say({"event": "ready", "transformers": __version__, "torch": torch.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        _say(peer.encode(request["encode"]) if "encode" in request else peer.answer(request))


class Peer:
    """The target and the draft, and the times at which the target's passes ended."""

    def __init__(self, model: str, draft: str, dtype: torch.dtype, device: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._device = device
        self.target: Any = self._load(model, dtype)
        self.draft: Any = self._load(draft, dtype)
        self._step_ends: list[float] = []
        self.target.register_forward_hook(lambda *_: self._step_ends.append(time.perf_counter()))

    def _load(self, folder: str, dtype: torch.dtype) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return loaded.eval().to(self._device)

    def encode(self, text: str) -> dict[str, object]:
        return {"prompt_ids": encode_chat(self.tokenizer, text)}

    def answer(self, request: dict[str, Any]) -> dict[str, object]:
        """Generate greedily; with the draft as assistant, by transformers' own defaults."""
        prompts = request["prompts"]
        length = max(map(len, prompts))
        filled = torch.tensor([[0] * (length - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in prompts])
        assistant = {"assistant_model": self.draft} if request["mode"] == "assisted" else {}
        self._step_ends.clear()
        begun = time.perf_counter()
        output = self.target.generate(
            filled.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=request["max_tokens"],
            do_sample=False,
            **assistant,
        )
        seconds = time.perf_counter() - begun
        said = [self._until_end(ids) for ids in output[:, length:].tolist()]
        steps = len(self._step_ends)
        answers = [{"token_ids": ids, "steps": steps if assistant else len(ids)} for ids in said]
        return {"answers": answers, "seconds": seconds, "first_s": self._step_ends[0] - begun}

    def _until_end(self, ids: list[int]) -> list[int]:
        """One output of several: those that end early are filled up."""
        ends = self.target.generation_config.eos_token_id
        last = set(ends) if isinstance(ends, list) else {ends}
        place = next((i for i, token in enumerate(ids) if token in last), len(ids))
        return ids[: place + 1]


def _say(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
