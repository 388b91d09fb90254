"""Print an answer while it is generated."""

import sglang as sgl
from common import checked, open_backend


@sgl.function
def tell(s, topic: str):
    s += sgl.user(f"Write three sentences about {topic}.")
    s += sgl.assistant(sgl.gen("story", max_tokens=128, temperature=0))


with open_backend():
    state = tell.run(topic="the sea", stream=True)
    for text in state.text_iter("story"):
        print(text, end="", flush=True)
    print()
    checked(state)
