"""`vllm serve OUT`, as a user starts it, answers a chat over HTTP; a repo that is not whole does not start.

The real model is SmolLM2-135M quantized by GPTQModel. Compiling is left out (`--enforce-eager`): on two cores it takes
minutes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.models import SCHEMES, write
from support.smollm2 import source

START_SECONDS = 600


@contextmanager
def serve(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """The server's URL, once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = Path(sys.executable).parent / "vllm"
    with log.open("w") as out:
        server = subprocess.Popen(
            [str(vllm), "serve", str(model), "--port", str(port), "--served-model-name", "m", *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        url = f"http://127.0.0.1:{port}"
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vllm serve ended with {server.poll()}:\n{log.read_text()}") from None
                time.sleep(1)
        yield url
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def chat(url: str, question: str, tokens: int = 24) -> str:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        message: str = json.load(answer)["choices"][0]["message"]["content"]
    return message


def with_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer and a chat template for a model of 512 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)
    return folder


def test_a_repo_with_a_tensor_removed_does_not_start(tmp_path: Path) -> None:
    model = with_tokenizer(write(tmp_path, "llama", SCHEMES["int4-asym"]).converted)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(RuntimeError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.scales is missing from the repo"),
        serve(model, tmp_path / "log", "--enforce-eager"),
    ):
        raise AssertionError("it started")


def test_the_real_model_answers(tmp_path: Path) -> None:
    out = tmp_path / "converted"
    folder = source("gptqmodel-w4g64")
    subprocess.run([sys.executable, "-m", "xpuquant", "convert", str(folder), str(out)], check=True)
    with serve(out, tmp_path / "log", "--enforce-eager") as url:
        assert "Paris" in chat(url, "What is the capital of France?")
