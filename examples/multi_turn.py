"""Two questions in one conversation; the second is answered knowing the first."""

import sglang as sgl
from common import checked, open_backend


@sgl.function
def multi_turn_qa(s, question_1: str, question_2: str):
    s += sgl.user(question_1)
    s += sgl.assistant(sgl.gen("answer_1", max_tokens=128, temperature=0))
    s += sgl.user(question_2)
    s += sgl.assistant(sgl.gen("answer_2", max_tokens=128, temperature=0))


with open_backend():
    questions = ("What is the capital of France?", "What is that city known for?")
    state = checked(multi_turn_qa.run(*questions))
    for question, name in zip(questions, ("answer_1", "answer_2"), strict=True):
        meta = state.get_meta_info(name)
        first, total = meta["time_to_first_token"], meta["e2e_latency"]
        rate = (meta["completion_tokens"] - 1) / (total - first)
        print(f"Q: {question}\nA: {state[name]}")
        print(f"   [first token after {first * 1000:.0f} ms, then {rate:.0f} tokens/s]\n")
