"""Other weights for the shipped target, and how a running engine gets them."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from engine import TARGET, generate

STEPS = 5  # between two changes


def drifted(scale):
    """[(name, weight)] of the shipped target after a pretended training step."""
    weights = load_file(f"{TARGET}/model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=draw) * weight.float().std()
            weights[name] = (weight.float() + scale * noise).to(weight.dtype)
    return list(weights.items())


def other_weights(folder):
    """A checkpoint of the shipped target after a pretended training step."""
    shutil.copytree(TARGET, folder)
    save_file(dict(drifted(0.02)), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def reload(llm, **source):
    """vLLM's recipe; requests that run are computed anew with the new weights."""
    llm.collective_rpc("reload_weights", kwargs=source)
    assert llm.reset_prefix_cache(reset_running_requests=True)


class Serving:
    """Requests of a running engine: their tokens so far, and how many they had at each change."""

    def __init__(self, llm, prompts, num_tokens):
        self.engine, self.prompts, self.num_tokens = llm.llm_engine, prompts, num_tokens
        self.answers, self.starts = {}, {}  # by index of the prompt; starts: {change: tokens}
        self.running = set()

    def add(self, indices, change=0):
        for i in indices:
            prompt = {"prompt_token_ids": list(self.prompts[i])}
            self.engine.add_request(str(i), prompt, long_params(self.num_tokens))
            self.answers[i], self.starts[i] = [], {change: 0}
            self.running.add(i)

    def changed(self, change):
        """Weights number `change` count from here."""
        for i in self.running:
            self.starts[i][change] = len(self.answers[i])

    def step(self):
        for output in self.engine.step():
            i = int(output.request_id)
            self.answers[i] = list(output.outputs[0].token_ids)
            if output.finished:
                self.running.remove(i)

    def finish(self):
        while self.running:
            self.step()

    def segments(self, change):
        """[(index, first token, end)] of what was generated with weights number `change`."""
        found = []
        for i, starts in self.starts.items():
            if change in starts:
                later = [start for number, start in starts.items() if number > change]
                found.append((i, starts[change], min([*later, len(self.answers[i])])))
        return [(i, start, end) for i, start, end in found if end > start]


def long_params(num_tokens):
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=num_tokens)


def train(llm, prompts, steps_of_training, num_tokens):
    """Serve three new prompts before each change of the weights, the others go on."""
    serving = Serving(llm, prompts, num_tokens)
    serving.add(range(3))
    for change, weights in enumerate(steps_of_training, 1):
        for _ in range(STEPS):
            serving.step()
        assert serving.running, "nothing is in flight"
        reload(llm, weights_iterator=weights)
        serving.changed(change)
        serving.add(range(3 * change, 3 * change + 3), change)
    serving.finish()
    return serving


def assert_served(llm, served, steps_of_training):
    """A plain engine whose weights change likewise goes on from the same tokens."""
    for change in range(len(steps_of_training) + 1):
        if change:
            reload(llm, weights_iterator=steps_of_training[change - 1])
        parts = served.segments(change)
        so_far = [[*served.prompts[i], *served.answers[i][:start]] for i, start, _ in parts]
        answers = generate(llm, so_far, [long_params(end - start) for _, start, end in parts])
        assert answers == [served.answers[i][start:end] for i, start, end in parts], change
