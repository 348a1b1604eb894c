"""Runs models under vLLM, one after the other, and prints what they say as JSON. A program of its own.

    generate.py '{"models": ["DIR", ...], "tp": 1, "expert_parallel": ["DIR", ...], "dtype": "bfloat16", "engine": {}}'

`engine`: more arguments of vLLM's `LLM`. `vocabulary`, `positions`: of the smallest model; 512 and 256 where not given.
`pictures`: DIR → tokens of a prompt with an image, which is asked last.
One line per model: {"model": DIR, "tokens": [[...], ...], "logprobs": [[...], ...], "next": [[[token, logprob], ...],
...]}, `next` being the most likely one of the tokens that were not said; or {"error": "..."}.
"""

import gc
import json
import os
import sys
import traceback

PROMPTS = [
    [1, 17, 33, 250, 99, 4, 311, 8],
    [1, 400, 12, 12, 75],
    [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17],
]


def _image() -> object:
    """16 by 16 pixels, no two alike."""
    from PIL import Image

    values = bytes((37 * place + 11 * (place // 48)) % 256 for place in range(16 * 16 * 3))
    return Image.frombytes("RGB", (16, 16), values)


def _next(step: dict, said: int) -> tuple[int, float]:
    return max(((token, one.logprob) for token, one in step.items() if token != said), key=lambda pair: pair[1])


def main() -> None:
    job = json.loads(sys.argv[1])
    tp = job.get("tp", 1)
    if tp == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    tokenized = job.get("prompts")
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job.get("max_tokens", 12),
        logprobs=2,
        ignore_eos=tokenized is None,
        detokenize=tokenized is not None,
    )
    for model in job["models"]:
        report: dict[str, object] = {"model": model}
        llm = None
        try:
            picture = job.get("pictures", {}).get(model)
            sees = {"language_model_only": False, "limit_mm_per_prompt": {"image": 1}, "skip_mm_profiling": True}
            llm = LLM(
                model,
                enforce_eager=True,
                dtype=job.get("dtype", "bfloat16"),
                max_model_len=job.get("positions", 256),
                skip_tokenizer_init=tokenized is None and picture is None,
                tensor_parallel_size=tp,
                enable_expert_parallel=model in job.get("expert_parallel", ()),
                seed=0,
                disable_log_stats=True,
                **job.get("engine", {}) | (sees if picture is not None else {}),
            )
            size = job.get("vocabulary", 512)
            prompts = tokenized or [{"prompt_token_ids": [token % size for token in ids]} for ids in PROMPTS]
            if picture is not None:
                prompts = [*prompts, {"prompt_token_ids": picture, "multi_modal_data": {"image": _image()}}]
            outputs = [out.outputs[0] for out in llm.generate(prompts, sampling, use_tqdm=False)]
            report["tokens"] = [list(out.token_ids) for out in outputs]
            report["text"] = [out.text for out in outputs]
            report["logprobs"] = [
                [step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)]
                for out in outputs
            ]
            report["next"] = [
                [_next(step, token) for step, token in zip(out.logprobs, out.token_ids, strict=True)] for out in outputs
            ]
        except Exception as problem:
            traceback.print_exc()
            traceback.clear_frames(problem.__traceback__)
            said = str(problem) or f"in `{traceback.extract_tb(problem.__traceback__)[-1].line}`"
            report["error"] = f"{type(problem).__name__}: {said}"
        print("REPORT " + json.dumps(report), flush=True)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
