"""Questions that Ray Data answers: two actors share the CPUs of this machine, or of a cluster."""

import argparse

import ray

from sf_local.ray import Generator, sort_by_prefix

GUIDES = ["You are a geographer. Answer in one sentence.", "You answer like a pirate, shortly."]
PLACES = ["France", "Italy", "Egypt", "Japan"]

parser = argparse.ArgumentParser()
parser.add_argument("--vmfb", default="demo", help="artifact, or what is compiled once")
args = parser.parse_args()

ray.init()
spare_cpus = int(ray.cluster_resources()["CPU"]) - 1  # one is for the tasks that read and sort
ds = ray.data.from_items([
    {"place": place, "messages": [{"role": "system", "content": guide},
                                  {"role": "user", "content": f"What is {place} known for?"}]}
    for place in PLACES for guide in GUIDES
])  # fmt: skip
answers = sort_by_prefix(ds).map_batches(
    Generator,
    fn_constructor_kwargs={"vmfb": args.vmfb, "params": {"max_new_tokens": 32, "temperature": 0}},
    compute=ray.data.ActorPoolStrategy(size=2),
    num_cpus=spare_cpus // 2 or 0.5,  # each, whose threads run there; or num_gpus=1
    batch_size=4,
    batch_format="pyarrow",
)
for row in answers.iter_rows():
    print(f"{row['place']}: {row['error'] or row['text']!r}")
