"""What every peer's script does: load, say so, and answer JSON lines. Imports nothing of treecast.

Scripts run in the Python that has their package, with this folder as the first on its path. One
that is loaded says {"event": "ready", NAME: VERSION}; {"mode", "prompts", "max_tokens"} is
answered with timed, greedy answers to all prompts. A package that is missing is said by name.
"""

import argparse
import importlib
import json
import sys
import time


def serve(package, load):
    """Answer until stdin ends.

    Args:
        package: what must be there to import.
        load: of parsed flags, gives (version, answer); `answer` of prompts, a list of token ids
            each, most tokens and a function to be called at the first token gives the outputs' ids
            in the same order. There are at most `at_once` prompts.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--at-once", type=int, default=1)
    flags = parser.parse_args()
    sys.stdout, said = sys.stderr, sys.stdout  # packages may print; the answers are ours
    try:
        importlib.import_module(package)
    except ImportError as error:
        _say(said, {"event": "missing", "package": package, "error": str(error)})
        return
    version, answer = load(flags)
    _say(said, {"event": "ready", package: version})
    for line in sys.stdin:
        _say(said, _timed(answer, json.loads(line)))


def _timed(answer, request):
    firsts = []
    began = time.perf_counter()
    outputs = answer(
        request["prompts"], request["max_tokens"], lambda: firsts.append(time.perf_counter())
    )
    seconds = time.perf_counter() - began
    first_s = firsts[0] - began if firsts else seconds
    answers = [{"token_ids": ids, "steps": len(ids)} for ids in outputs]
    return {"answers": answers, "seconds": seconds, "first_s": first_s}


def _say(said, answer):
    print(json.dumps(answer), file=said, flush=True)
