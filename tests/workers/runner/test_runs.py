"""A plan runs over three nodes of a real service: the tokens are the whole model's; what is wrong ends the run."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.checkpoints import copy_of
from support.running import Service, Web, Worker, until

from workers.ledger.steps import ENDED

pytestmark = pytest.mark.timeout(600)
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROMPT = [5, 9, 33, 21, 77, 8]


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids if token > 2)


class Running:
    """A service with a plan of tiny/chat over three nodes and one of tiny/bert, and its API."""

    def __init__(self, service: Service, web: Web, plans: dict[str, str], models: Path) -> None:
        self.service, self.web, self.plans, self.models = service, web, plans, models

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", "Prefer": "wait=120"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.web.url + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=150) as answer:
                return int(answer.status), json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def run(self, model: str = "chat", **body: Any) -> tuple[int, Any]:
        return self.ask("POST", f"/api/plans/{self.plans[model]}/runs", body)

    def stream(self, model: str = "chat", **body: Any) -> Generator[tuple[str, Any], None, None]:
        request = urllib.request.Request(
            f"{self.web.url}/api/plans/{self.plans[model]}/runs",
            data=json.dumps({**body, "stream": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=150) as answer:
            name = ""
            for line in answer:
                key, _, value = line.decode().strip().partition(": ")
                if key == "event":
                    name = value
                elif key == "data":
                    yield name, json.loads(value)

    def runner(self, node_id: str) -> psutil.Process:
        """The runner process of a node."""
        process = self.service.workers[node_id].process
        assert process is not None
        children = psutil.Process(process.pid).children()
        return next(child for child in children if "workers.runner" in child.cmdline())

    def cli(self, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "workers.cli", *words], input=given, capture_output=True, text=True, check=False,
            env=dict(os.environ) | {"FAIRSHARD_URL": self.web.url}, timeout=150,
        )  # fmt: skip

    def process(self, model: str, **options: Any) -> str:
        """The id of a plan of `tiny/<model>`, whose shards are cut."""
        jobs = self.service.jobs()
        begun = jobs.submit_process if options else jobs.submit_request
        job_id = begun(f"tiny/{model}", **(options or {"process": {}}))["job_id"]
        view = until(
            lambda: (view := jobs.job(job_id))["state"] in ENDED and view,
            what=lambda: json.dumps(jobs.job(job_id), indent=1) + self.service.logs(),
            timeout_s=150,
        )
        assert view["state"] == "done", (view, self.service.logs())
        return str(view["result"]["plan_id"])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("runs")
    models = directory / "models"
    source = copy_of("llama_deep", models / "tiny/chat")
    copy_of("bert", models / "tiny/bert")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    # The whole model computes with as many threads: other numbers of them round differently.
    service = Service(directory, models_dir=models, env={"OMP_NUM_THREADS": "1"})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with service, Web(env=service.env, directory=directory / "logs") as web:
        made = Running(service, web, {}, models / "tiny")
        made.plans = {model: made.process(model) for model in ("chat", "bert")}
        yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(running: Running) -> Callable[..., Any]:
    """What the whole model says after prompts of one length."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(running.models / "chat")

    def says(ids: list[list[int]], count: int) -> Any:
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        return model.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=count, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip

    return says


def test_tokens_and_logits_are_those_of_the_whole_model(running: Running, whole: Callable[..., Any]) -> None:
    made = whole([PROMPT], 9)
    expected = made.sequences[0, len(PROMPT) :].tolist()
    status, answer = running.run(prompt=words(PROMPT), max_new_tokens=9, logits=True)
    assert status == 200, (answer, running.service.logs())
    assert answer["token_ids"] == [expected]
    assert answer["text"] == words(expected)
    assert answer["finish_reason"] == "length"
    assert torch.equal(torch.tensor(answer["logits"][0]), torch.stack(made.logits, dim=1)[0])
    times = answer["timings"]
    assert {stage["node_id"] for stage in times["stages"]} == {"big", "mid", "small"}
    assert len(times["hops"]) == 3, "to the second, to the third, and the output back"
    assert answer["checks"] == {"frames": 27, "passes": 9}
    assert times["decode_s_per_token"] > 0
    assert running.ask("GET", f"/api/runs/{answer['run_id']}")[1]["token_ids"] == [expected]

    rows = [PROMPT, PROMPT[:3]]
    both = whole(rows, 5).sequences[:, len(PROMPT) :].tolist()
    status, answer = running.run(token_ids=rows, max_new_tokens=5)
    assert (status, answer["token_ids"]) == (200, both), "padded on the left"
    assert answer["finish_reason"] == ["length", "length"]


def test_what_is_drawn_depends_on_the_seed_alone(running: Running) -> None:
    drawn = {
        seed: [
            running.run(token_ids=[PROMPT], max_new_tokens=6, temperature=1.5, seed=seed)[1]["token_ids"]
            for _ in "12"
        ]
        for seed in (1, 2)
    }
    assert drawn[1][0] == drawn[1][1]
    assert drawn[2][0] == drawn[2][1]
    assert drawn[1][0] != drawn[2][0]


def test_streams_stops_and_ends(running: Running, whole: Callable[..., Any]) -> None:
    expected = whole([PROMPT], 8).sequences[0, len(PROMPT) :].tolist()
    events = list(running.stream(messages=[{"role": "user", "content": words(PROMPT)}], max_new_tokens=8))
    assert [name for name, _ in events] == ["loading", "running", *["tokens"] * 8, "ended"]
    assert [said["token_ids"][0][0] for name, said in events if name == "tokens"] == expected
    assert "".join(said["text"][0] for name, said in events if name == "tokens") == words(expected)
    assert events[-1][1]["state"] == "done"

    stop = f"w{expected[0]}"
    status, answer = running.run(prompt=words(PROMPT), max_new_tokens=8, stop=[stop])
    assert (status, answer["text"], answer["finish_reason"]) == (200, "", "stop")
    assert len(answer["token_ids"][0]) == 1

    # Who hangs up, or deletes the run, ends it.
    stream = running.stream(prompt=words(PROMPT), max_new_tokens=100)
    assert next(stream)[0] == "loading"
    stream.close()
    status, answer = running.ask(
        "POST", f"/api/plans/{running.plans['chat']}/runs?", {"prompt": "w5", "max_new_tokens": 1}
    )
    assert status == 200, "and the nodes go on serving"


def test_bad_input_is_refused_by_name(running: Running) -> None:
    for body, status, says in (
        ({}, 422, "exactly one of prompt, messages, token_ids, inputs"),
        ({"prompt": "w5", "token_ids": [[5]]}, 422, "exactly one of"),
        ({"prompt": "w5", "max_tokens": 5}, 422, "did you mean 'max_new_tokens'"),
        ({"token_ids": [[5, 100_000]]}, 422, "vocabulary has 160"),
        ({"token_ids": [[5] * 120], "max_new_tokens": 20}, 422, "120 tokens and 20 new ones .* context of 128"),
        ({"inputs": {"input_ids": [[5], [6, 7]]}}, 422, "no tensors"),
    ):
        found, answer = running.run(**body)
        assert found == status, answer
        assert re.search(says, answer["error"]), answer
    refused = running.run("bert", prompt="w5")[1]["error"]
    assert re.search(r"^node \w+ refuses the run: tiny/bert .*generates no text", refused), refused
    assert running.ask("POST", "/api/plans/0123456789abcdef/runs", {"prompt": "w5"})[0] == 404
    assert running.ask("GET", "/api/runs/0123456789abcdef")[0] == 404


def test_openais_own_client_talks_with_it(running: Running, whole: Callable[..., Any]) -> None:
    import openai

    expected = words(whole([PROMPT], 6).sequences[0, len(PROMPT) :].tolist())
    asked: dict[str, Any] = {"model": "tiny/chat", "max_tokens": 6, "temperature": 0}
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": words(PROMPT)}]}]
    with openai.OpenAI(base_url=f"{running.web.url}/v1", api_key="any", max_retries=0, timeout=150) as client:
        assert {model.id for model in client.models.list()} == {"tiny/chat", "tiny/bert"}
        assert client.models.retrieve("tiny/chat").owned_by == "fairshard"
        whole_answer = client.chat.completions.create(messages=messages, **asked)
        assert whole_answer.choices[0].message.content == expected
        assert whole_answer.choices[0].finish_reason == "length"
        assert whole_answer.usage is not None
        assert (whole_answer.usage.prompt_tokens, whole_answer.usage.completion_tokens) == (6, 6)
        pieces = list(
            client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **asked
            )
        )
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected
        assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-2:] == [None, "length"]
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.total_tokens == 12
        completion = client.completions.create(prompt=[words(PROMPT)] * 2, **asked)
        assert [choice.text for choice in completion.choices] == [expected] * 2
        streamed = client.completions.create(prompt=PROMPT, stream=True, **asked)
        assert "".join(piece.choices[0].text for piece in streamed) == expected
        vectors = client.embeddings.create(model="tiny/bert", input=["w5 w9 w33", "w4"])
        assert torch.equal(torch.tensor(vectors.data[0].embedding), embedded(running.models / "bert", [5, 9, 33]))
        assert vectors.usage.prompt_tokens == 4
        with pytest.raises(openai.NotFoundError, match="no plan for no/such"):
            client.chat.completions.create(model="no/such", messages=messages)
        with pytest.raises(openai.BadRequestError, match="n is not supported here"):
            client.chat.completions.create(messages=messages, n=2, **asked)
        with pytest.raises(openai.BadRequestError, match="context of 128"):
            client.chat.completions.create(model="tiny/chat", messages=messages, max_tokens=500)


def embedded(source: Path, ids: list[int]) -> Any:
    import transformers

    model = transformers.AutoModel.from_pretrained(source).eval()
    # In the batch that was asked for: a batch of another shape may be rounded otherwise.
    padded = torch.tensor([ids, [0, 0, 4]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    with torch.no_grad():
        hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state
    mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1)[0]


def test_the_command_line_runs_talks_deploys(running: Running, whole: Callable[..., Any]) -> None:
    expected = words(whole([PROMPT], 5).sequences[0, len(PROMPT) :].tolist())
    done = running.cli("run", "tiny/chat", "--prompt", words(PROMPT), "--tokens", "5")
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
    assert "5 tokens: loaded in" in done.stderr
    done = running.cli("run", running.plans["chat"], "--prompt", words(PROMPT), "--tokens", "5", "--json")
    assert json.loads(done.stdout)["text"] == expected, done.stderr
    done = running.cli("chat", "tiny/chat", "--tokens", "3", given=f"{words(PROMPT)}\n\nw4\n")
    first = words(whole([PROMPT], 3).sequences[0, len(PROMPT) :].tolist())
    later = [*PROMPT, *(int(word[1:]) for word in first.split()), 4]
    second = words(whole([later], 3).sequences[0, len(later) :].tolist())
    assert (done.returncode, done.stdout) == (0, f"{first}\n{second}\n"), (
        "the second answer follows the whole history"
    )
    done = running.cli("deploy", "tiny/chat", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["nodes"]) == {"big", "mid", "small"}
    assert set(running.service.jobs().runs.deployed()) == {running.plans["chat"]}
    used = {node["node_id"]: node["deployed_bytes"] for node in running.service.jobs().nodes()}
    assert min(used.values()) > 0
    later_plan = running.service.jobs().plan(running.process("bert", batch_size=2))
    assert {node["node_id"]: node["memory_bytes"] for node in later_plan["cluster"]["nodes"]} == {
        node_id: memory - used[node_id] for node_id, (_, memory) in running.service.nodes.items()
    }, "what is deployed is not planned with"
    assert running.cli("undeploy", "tiny/chat").returncode == 0
    assert running.cli("undeploy", "tiny/chat").returncode == 1
    assert running.cli("run", "no/such", "--prompt", "x").returncode == 1


def said(worker: Worker, text: str) -> bool:
    return text in worker.log


def test_a_damaged_shard_refuses_the_run_as_a_whole(running: Running) -> None:
    plan_id = running.plans["spoiled"] = running.process("chat", options={"exclude": ["mid"]})
    start = running.service.jobs().plan(plan_id)["megaphone_plan"]["start_node"]
    other = running.service.workers[{"big": "small", "small": "big"}[start]]
    config = running.service.shards(start, plan_id) / "config.json"
    text = config.read_text()
    config.write_text(text + " ")
    status, answer = running.run("spoiled", prompt="w5", max_new_tokens=1)
    assert (status, answer["code"]) == (502, "integrity_error")
    assert answer["error"].startswith(f"the shard of plan {plan_id} is damaged: config.json"), answer
    ended = f"run {answer['details']['run_id']} has ended here"
    until(functools.partial(said, other, ended), what=f"{other.name} keeps no session", timeout_s=10)
    config.write_text(text)
    assert running.run("spoiled", prompt="w5", max_new_tokens=1)[0] == 200


def failing(running: Running, model: str, act: Callable[[], object]) -> tuple[dict[str, Any], float]:
    """How a run ends in which `act` happens after three tokens, and how many seconds after it."""
    events = running.stream(model, prompt=words(PROMPT), max_new_tokens=110)
    seen, began = 0, 0.0
    for name, said in events:
        seen += name == "tokens"
        if name == "tokens" and seen == 3:
            act()
            began = time.monotonic()
        if name == "ended":
            assert said["state"] == "failed", said
            return said["error"], time.monotonic() - began
    raise AssertionError("the stream ended without an end")


def test_a_dead_a_stalled_and_a_leading_node_that_is_killed_end_the_run_within_two_seconds(running: Running) -> None:
    # One more second than is promised: the machine that tests is busy.
    stalled = running.runner("big")
    error, took_s = failing(running, "chat", stalled.suspend)
    stalled.resume()
    assert "node big at http://127.0.0.1:" in error["message"], error
    assert "said nothing for 2 s" in error["message"]
    assert took_s < 3

    running.plans["two"] = running.process("chat", options={"exclude": ["small"]})
    dead = running.runner("small")
    error, took_s = failing(running, "chat", dead.kill)
    assert "node small at" in error["message"], error
    assert took_s < 3

    start = running.service.jobs().plan(running.plans["two"])["megaphone_plan"]["start_node"]
    other = {"big": "mid", "mid": "big"}[start]
    alone = running.runner(start)
    error, took_s = failing(running, "two", lambda: running.service.workers[start].signal(9))
    assert f"node {start}, which leads the run, went silent" in error["message"], error
    assert took_s < 3
    until(
        lambda: not alone.is_running() or alone.status() == psutil.STATUS_ZOMBIE, what="no runner outlives its worker"
    )
    until(
        lambda: "its start node went silent" in running.service.workers[other].log,
        what="no session is left",
        timeout_s=20,
    )
    until(
        lambda: start not in {node["node_id"] for node in running.service.jobs().nodes()},
        what="it is gone",
        timeout_s=30,
    )
    status, answer = running.run("two", prompt="w5")
    assert status == 409, answer
    assert f"node {start} is not alive" in answer["error"]
