"""OpenVINO GenAI: a GGUF file, or a folder in OpenVINO's own format."""

from serving import serve


def load(flags):
    import numpy as np
    import openvino
    import openvino_genai

    precision = {"bfloat16": "bf16", "float32": "f32"}[flags.dtype]
    pipeline = openvino_genai.LLMPipeline(
        flags.model,
        "CPU",
        INFERENCE_NUM_THREADS=flags.threads,
        INFERENCE_PRECISION_HINT=precision,
        ATTENTION_BACKEND="SDPA",
    )

    class Streamer(openvino_genai.StreamerBase):
        def __init__(self, first):
            super().__init__()
            self._first = first

        def write(self, tokens):
            self._first()
            return openvino_genai.StreamingStatus.RUNNING

        def end(self):
            pass

    def answer(prompts, max_tokens, first):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = max_tokens, False
        config.apply_chat_template = False
        config.eos_token_id = end = pipeline.get_generation_config().eos_token_id
        longest = max(len(prompt_ids) for prompt_ids in prompts)
        filled = [[end] * (longest - len(each)) + each for each in prompts]
        masks = [[0] * (longest - len(each)) + [1] * len(each) for each in prompts]
        inputs = openvino_genai.TokenizedInputs(
            *(openvino.Tensor(np.array(each, dtype=np.int64)) for each in (filled, masks))
        )
        # It streams one prompt alone: of several, the first token is not told from the last.
        watch = Streamer(first) if len(prompts) == 1 else None
        return [_until(end, ids) for ids in pipeline.generate(inputs, config, watch).tokens]

    return openvino_genai.__version__, answer


def _until(end, ids):
    """One output of several: those that end early are filled up."""
    said = [int(token) for token in ids]
    return said[: said.index(end) + 1] if end in said else said


serve("openvino_genai", load)
