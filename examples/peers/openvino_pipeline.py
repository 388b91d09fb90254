"""OpenVINO GenAI: `openvino_pipeline.py FOLDER TOKENS THREADS`, its continuous batching.

Prompts are computed in one go and the prefix cache is on, both as in its LLMPipeline. Logits are
those of OpenVINO's plain runtime on the same model.
"""

import sys
from itertools import count
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import jobs_of, seconds, serve

BLOCK = 32  # tokens of a block of KV cache on CPUs
folder, tokens, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
PATH = f"{folder}/openvino_model.xml"
OPTIONS = {"INFERENCE_NUM_THREADS": threads}
STATED = (
    "INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
)  # fmt: skip
scheduling = openvino_genai.SchedulerConfig()
scheduling.num_kv_blocks = -(-tokens // BLOCK) + 1
scheduling.max_num_batched_tokens = tokens
scheduling.enable_prefix_caching = True
pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduling, "CPU", OPTIONS)
numbers = count()


def submit(prompt: list[int], num_new: int) -> Any:
    """Its handle, which must be kept: without it the request ends."""
    config = openvino_genai.GenerationConfig(max_new_tokens=num_new, ignore_eos=True)
    return pipeline.add_request(next(numbers), openvino.Tensor(np.array([prompt])), config)


def finish() -> None:
    while pipeline.has_non_finished_requests():
        pipeline.step()


def generate(prompts: list[list[int]], num_new: int) -> list[list[int]]:
    handles = [submit(prompt, num_new) for prompt in prompts]
    finish()
    answers = [list(handle.read_all()[0].generated_ids) for handle in handles]
    assert all(len(ids) == num_new for ids in answers)
    return answers


def decode(prompt: list[int], num_new: int) -> float:
    handle = submit(prompt, num_new)
    while not handle.can_read():
        pipeline.step()
    (ready,) = handle.read().values()
    return (num_new - len(ready.generated_ids)) / seconds(finish)


def cached(shared: list[int], one: list[int], other: list[int]) -> float:
    generate([shared + one], 1)
    return seconds(lambda: generate([shared + other], 1))


def compiled() -> openvino.CompiledModel:
    return openvino.Core().compile_model(PATH, "CPU", OPTIONS)


def settings() -> str:
    model = compiled()
    values = [f"{name.lower()} {shown(model.get_property(name))}" for name in STATED]
    return (
        f"openvino-genai {openvino_genai.__version__}, {weights()}, {', '.join(values)}, "
        f"max_num_batched_tokens {scheduling.max_num_batched_tokens}, max_num_seqs "
        f"{scheduling.max_num_seqs}, prefix cache"
    )


def weights() -> str:
    """What nncf wrote of them into the model."""
    model, at = openvino.Core().read_model(PATH), ["nncf", "weight_compression"]
    if not model.has_rt_info(at):
        return "weights f16"
    kind, group, others = (
        model.get_rt_info([*at, part]).astype(str) for part in ("mode", "group_size", "backup_mode")
    )
    return f"weights {kind} in groups of {group} (-1: a row), the embedding {others}"


def shown(value: object) -> object:
    return value.get_type_name() if isinstance(value, openvino.Type) else value


def logits(chunks: list[list[int]], path: str) -> None:
    request, done, found = compiled().create_infer_request(), 0, []
    for ids in chunks:
        end = done + len(ids)
        request.infer({
            "input_ids": np.array([ids]), "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(done, end)[None], "beam_idx": np.zeros(1, np.int32),
        })  # fmt: skip
        found.append(request.get_tensor("logits").data[0].copy())
        done = end
    np.save(path, np.concatenate(found))


serve(jobs_of(generate) | {f.__name__: f for f in (decode, cached, settings, logits)})
