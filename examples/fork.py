"""Expand two tips in parallel from one shared beginning, then join them."""

import sglang as sgl
from common import checked, open_backend


@sgl.function
def expand_tips(s):
    s += "Here are two tips for staying healthy: 1. Balanced diet. 2. Regular exercise.\n\n"
    forks = s.fork(2)
    for i, fork in enumerate(forks.states):
        fork += f"Now, expand tip {i + 1} into a paragraph:\n"
        fork += sgl.gen("tip", max_tokens=96, stop="\n\n", temperature=0)
    s += f"Tip 1: {forks[0]['tip']}\n\nTip 2: {forks[1]['tip']}\n\nIn summary,"
    s += sgl.gen("summary", max_tokens=64, stop="\n\n", temperature=0)


with open_backend():
    print(checked(expand_tips.run()).text())
