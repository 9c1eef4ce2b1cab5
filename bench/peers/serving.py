"""What every peer's script does: load, say so, and answer JSON lines. Imports nothing of treecast.

Scripts run in the Python that has their package, with this folder as the first on its path. One
that is loaded says {"event": "ready", NAME: VERSION}; {"mode", "prompt_ids", "max_tokens"} is
answered with a timed, greedy answer. A package that is missing is said by name.
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
        load: of parsed flags, gives (version, answer); `answer` of prompt ids, most tokens and a
            function to be called at the first token gives the output's ids.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
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
    ids = answer(
        request["prompt_ids"], request["max_tokens"], lambda: firsts.append(time.perf_counter())
    )
    seconds = time.perf_counter() - began
    first_s = firsts[0] - began if firsts else seconds
    return {"token_ids": ids, "steps": len(ids), "seconds": seconds, "first_s": first_s}


def _say(said, answer):
    print(json.dumps(answer), file=said, flush=True)
