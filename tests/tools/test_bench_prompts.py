"""Prompt files as they are published, settings of methods, and figures by task."""

import json

import pytest

from failfast_vllm.tools import bench, cli
from failfast_vllm.tools.load_generator import Run, Served, Sums
from failfast_vllm.tools.offline import encode, read_prompts

SPEC_BENCH = {
    "question_id": 81,
    "category": "writing",
    "turns": ["Write a poem about rain.", "Now rhyme it."],
    "reference": ["Rain, ...", ""],
}
GSM8K = {"question": "A hen lays 2 eggs a day. How many in 3 days?", "answer": "2 * 3\n#### 6"}
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": "def double(x):\n    '''Twice x.'''\n",
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "assert double(1) == 2",
}


def written(path, *entries):
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return path


def asked(*argv):
    return cli._parser().parse_args(["bench", *argv])


@pytest.mark.parametrize(
    ("entry", "task", "text"),
    [
        (SPEC_BENCH, "writing", "Write a poem about rain."),
        (GSM8K, "GSM8K", GSM8K["question"]),
        (HUMANEVAL, "HumanEval", HUMANEVAL["prompt"]),
    ],
)
def test_a_published_line_is_a_chat_with_one_message(entry, task, text, tmp_path):
    """Catches a second turn or an answer that is asked, and a function's head without template."""
    (prompt,) = read_prompts(written(tmp_path / "test.jsonl", entry))
    assert prompt == {"task": task, "messages": [{"role": "user", "content": text}]}


def test_lines_of_ones_own_stay_as_they_are(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}], "answer": "x"}
    found = read_prompts(written(tmp_path / "mine.jsonl", {"prompt": "a"}, {**chat, "task": "b"}))
    assert found == [{"task": "mine", "prompt": "a"}, {**chat, "task": "b"}]


@pytest.mark.parametrize("line", ['{"turns": []}', '{"turns": [1]}', '{"text": "a"}', "[1]", "7"])
def test_a_line_of_another_shape_is_named(line, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps(GSM8K) + "\n" + line, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r'other.jsonl, line 2 must hold "messages".* got'
    ) as found:
        read_prompts(path)
    assert str(found.value).endswith(repr(line))


class ChatTokenizer:
    """A token per character; its template puts angle brackets around the messages."""

    chat_template = "some template"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return "".join(f"<{message['content']}>" for message in messages)

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": list(map(ord, text))}


def test_messages_take_the_template_where_the_target_has_one(tmp_path):
    (prompt,) = read_prompts(written(tmp_path / "a.jsonl", GSM8K))
    text = GSM8K["question"]
    assert encode(ChatTokenizer(), prompt) == {"prompt_token_ids": list(map(ord, f"<{text}>"))}
    assert encode(ChatTokenizer(), {"prompt": "as it is"}) == {"prompt": "as it is"}
    base_model = ChatTokenizer()
    base_model.chat_template = None
    assert encode(base_model, prompt) == {"prompt": text}


def test_prompts_are_spread_over_all_files(tmp_path):
    """Catches the last lines of a file, often a task of their own, that are never asked."""
    first = written(tmp_path / "a.jsonl", *({"prompt": str(i)} for i in range(8)))
    second = written(tmp_path / "b.jsonl", *({"prompt": str(i)} for i in range(8, 11)))
    files = ["--prompts", str(first), str(second)]

    def texts(count):
        prompts = bench.prepare(asked("--methods", "none", "--num-prompts", count, *files))
        return sorted(int(prompt["prompt"]) for prompt in prompts)

    assert texts("6") == [0, 1, 3, 5, 7, 9]
    assert texts("64") == list(range(11))


def test_methods_take_settings():
    known = bench.methods()
    ngram = bench.with_settings("ngram:min=1,max=3,k=7", known)
    assert ngram == {
        "method": "ngram",
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
        "num_speculative_tokens": 7,
    }
    ours = bench.with_settings("failfast:k=6,load_aware=false,policy=fixed", known)
    assert ours == {
        "method": "failfast",
        "policy": "fixed",
        "load_aware": False,
        "num_speculative_tokens": 6,
    }
    assert bench.with_settings("draft_model:k=3", known)["num_speculative_tokens"] == 3
    assert bench.with_settings("none", known) is None
    assert bench.methods() == known  # nothing of it is left behind
    assert known["ngram"]["prompt_lookup_min"] == 2
    assert bench.with_settings("draft_model:model=a/b", known)["model"] == "a/b"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ngrams:k=1", "unknown method 'ngrams'; choose from none, ngram,"),
        ("failfast:k=none", "'num_speculative_tokens' must be"),
        ("failfast:polcy=fixed", "unknown key 'polcy' in the speculative config; did you mean"),
        ("failfast:k=" + "[" * 100_000, "'num_speculative_tokens' must be"),
    ],
)
def test_wrong_settings_are_refused_before_engines_start(name, message, capsys):
    assert cli.main(["bench", "--methods", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def made_up(*served):
    times = [[1.0] * (steps - 1) + [ms] for _, ms, steps in served]
    answers = [
        Served(list(range(n)), each, []) for (n, *_), each in zip(served, times, strict=True)
    ]
    return Run(1.0, answers, Sums())


def test_figures_by_task_by_hand():
    """Catches requests under a wrong task, and first tokens that count as drafted ones."""
    tasks = ["a", "b", "a"]
    none = [made_up((5, 50.0, 5), (2, 20.0, 2), (3, 30.0, 3))] * 2
    ours = [
        made_up((5, 20.0, 2), (2, 20.0, 2), (3, 20.0, 3)),
        made_up((5, 30.0, 3), (2, 40.0, 2), (1, 10.0, 1)),
    ]
    found = bench.make_row("x", 3, ours, none, tasks)["tasks"]
    assert found["a"].items() >= {
        ("requests", 4),
        ("tokens_per_second_per_request", 175.0),  # 14 tokens in 80 ms
        ("speedup", 1.75),  # 100 tokens per second without drafts
        ("tokens_per_step", 2.0),  # 4 + 2 + 4 tokens in 1 + 2 + 2 steps
        ("answers_equal_to_none", 0.75),
    }
    assert (found["b"]["speedup"], found["b"]["answers_equal_to_none"]) == (0.667, 1.0)
    alone = [made_up((1, 5.0, 1))]
    row = bench.make_row("x", 1, alone, alone, ["a"])
    assert row["tasks"]["a"]["tokens_per_step"] is None  # no step after the first token
    assert bench.make_row("x", 3, none, none, tasks)["tokens_per_step"] == 1.0
