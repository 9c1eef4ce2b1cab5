"""llama.cpp by its Python binding: a GGUF file."""

from serving import serve


def load(flags):
    import llama_cpp

    model = llama_cpp.Llama(
        flags.model, n_ctx=4096, n_threads=flags.threads, n_threads_batch=flags.threads,
        logits_all=False, verbose=False,
    )  # fmt: skip
    ends = {model.token_eos(), llama_cpp.llama_vocab_eot(model._model.vocab)}

    def answer(prompts, max_tokens, first):
        (prompt_ids,) = prompts
        model.reset()
        said = []
        for token in model.generate(prompt_ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            first()
            said.append(int(token))
            if token in ends or len(said) == max_tokens:
                break
        return [said]

    return llama_cpp.__version__, answer


serve("llama_cpp", load)
