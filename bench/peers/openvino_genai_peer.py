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

    def answer(prompt_ids, max_tokens, first):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = max_tokens, False
        config.apply_chat_template = False
        config.eos_token_id = pipeline.get_generation_config().eos_token_id
        prompt = openvino.Tensor(np.array([prompt_ids], dtype=np.int64))
        return [
            int(token) for token in pipeline.generate(prompt, config, Streamer(first)).tokens[0]
        ]

    return openvino_genai.__version__, answer


serve("openvino_genai", load)
