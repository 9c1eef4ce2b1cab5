"""vLLM: a folder as transformers reads it."""

from serving import serve


def load(flags):
    import os

    os.environ["OMP_NUM_THREADS"] = str(flags.threads)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    model = vllm.LLM(flags.model, dtype=flags.dtype, max_model_len=4096, max_num_seqs=1)
    engine = model.llm_engine

    def answer(prompt_ids, max_tokens, first):
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens)
        engine.add_request("0", {"prompt_token_ids": prompt_ids}, sampling)
        said = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                said = list(output.outputs[0].token_ids)
                if said:
                    first()
        return said

    return vllm.__version__, answer


serve("vllm", load)
