"""vLLM: a folder as transformers reads it."""

from serving import serve


def load(flags):
    import os

    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm
    from vllm.platforms import current_platform

    limits = {}
    if current_platform.is_cpu():  # where it takes nearly all memory for its KV cache by default
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        limits["gpu_memory_utilization"] = 0.3
    model = vllm.LLM(
        flags.model,
        dtype=flags.dtype,
        max_model_len=4096,
        max_num_seqs=flags.at_once,
        enable_prefix_caching=False,
        **limits,
    )
    engine = model.llm_engine

    def answer(prompts, max_tokens, first):
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens)
        for name, prompt_ids in enumerate(prompts):
            engine.add_request(str(name), {"prompt_token_ids": prompt_ids}, sampling)
        said = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                said[output.request_id] = list(output.outputs[0].token_ids)
                if said[output.request_id]:
                    first()
        return [said[str(name)] for name in range(len(prompts))]

    return vllm.__version__, answer


serve("vllm", load)
