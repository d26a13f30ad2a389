"""The reward "judge" against a server on this machine: scores, retries, the cache, the cost, and what stops a run."""

import http.server
import json
import threading
import time
from collections import deque

import pytest
from mlx_grpo import ConfigError, RewardError, Scorer, find_rewards, judge
from test_rewards import rollouts


class Server(http.server.ThreadingHTTPServer):
    """Answers with the number that the completion holds as the score; before that, with what `script` says: a state, a
    (state, headers) pair, a text in place of the reply, a whole reply, or "cut" for a connection that ends."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.keys, self.usage = deque(), [], [], {"prompt_tokens": 100, "completion_tokens": 10}
        self.now, self.most, self.lock, self.meeting = 0, 0, threading.Lock(), None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): ...

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.lock:
            server.requests.append(body)
            server.keys.append(self.headers.get("Authorization"))
            action = server.script.popleft() if server.script else None
            server.now += 1
            server.most = max(server.most, server.now)
        if server.meeting:
            server.meeting.wait(timeout=20)
        with server.lock:
            server.now -= 1
        if action == "cut":
            return self.connection.close()
        state, headers = action if isinstance(action, tuple) else (action if isinstance(action, int) else 200, {})
        echo = "I saw Score: 1 first. Score: " + body["messages"][0]["content"].split()[-1]
        text = action if isinstance(action, str) else echo
        reply = {"choices": [{"message": {"content": text}}], "usage": server.usage}
        reply = action if isinstance(action, dict) else reply if state == 200 else {"error": "no luck"}
        self.send_response(state)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge, "BACKOFF", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as found:
        yield found
        found.shutdown()


@pytest.fixture
def scorer(server, tmp_path):
    """scorer(**options): a Scorer of one judge named style."""
    def make(**options):
        given = {"url": server.url, "model": "m", "prompt": "{prompt} | {answer} | {completion}",
                 "cache": f"{tmp_path}/judge.sqlite", "price_in": 1.0, "price_out": 10.0} | options
        return Scorer(find_rewards(["judge:style"], {"style": given}))
    return make


def test_the_last_score_counts_and_is_moved_to_the_unit_range(server, scorer):
    scores, _, metrics = scorer()(rollouts("good 10", "half 5", "bad 0"))
    assert scores[:, 0].tolist() == [1.0, 0.5, 0.0]
    assert metrics == {"style/calls": 3, "style/cached": 0, "style/unscored": 0, "style/tokens_in": 300,
                       "style/tokens_out": 30, "style/cost": pytest.approx(0.0006), "style/cost_total": pytest.approx(0.0006)}
    asked = server.requests[0]
    assert asked["model"] == "m" and asked["temperature"] == 0 and asked["messages"][0]["content"].startswith("2+2? | 4 | ")
    assert scorer(scale=[-1, 1], body={"top_p": 0.5})(rollouts("x -1", "x 0"))[0][:, 0].tolist() == [0, 0.5]
    assert server.requests[-1]["top_p"] == 0.5


def test_the_general_prompt_holds_task_reference_and_response_and_fills_each_place_once(server, scorer):
    problem = [{"role": "system", "content": "secret"}, {"role": "user", "content": "Why {completion}?"}]
    server.script.append("Score: 7")
    assert scorer(prompt="")(rollouts("{answer} 3", prompt=problem))[0].tolist() == [[0.7]]
    text = server.requests[0]["messages"][0]["content"]
    assert "<task>\nWhy {completion}?\n</task>" in text and "<response>\n{answer} 3\n</response>" in text
    assert "<reference>\n4\n" in text and "from 0 (useless) to 10" in text and "secret" not in text


def test_a_question_is_asked_once_also_by_the_next_run(server, scorer):
    assert scorer()(rollouts("a 3", "a 3", "b 4"))[0][:, 0].tolist() == [0.3, 0.3, 0.4]
    assert len(server.requests) == 2
    _, _, metrics = scorer()(rollouts("a 3", "b 4", "c 5"))
    assert len(server.requests) == 3 and metrics["style/cached"] == 2 and metrics["style/cost"] == pytest.approx(0.0002)
    assert metrics["style/cost_total"] == pytest.approx(0.0006)
    scorer(temperature=0.5)(rollouts("a 3"))                              # another question
    assert len(server.requests) == 4


@pytest.mark.parametrize("failure", [429, 500, 503, (429, {"Retry-After": "0"}), "cut"])
def test_what_may_pass_is_tried_again(failure, server, scorer):
    server.script.extend([failure, failure])
    assert scorer()(rollouts("a 3"))[0].tolist() == [[0.3]] and len(server.requests) == 3


def test_retry_after_is_waited_for(server, scorer, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.script.extend([(429, {"Retry-After": "7"}), 500, (503, {"Retry-After": "9999"}), 500])
    scorer()(rollouts("a 3"))
    assert waits == [7.0, 0.02, 60.0, 0.08]


def test_a_server_that_stays_broken_stops_the_run_in_one_line(server, scorer):
    server.script.extend([500] * 9)
    with pytest.raises(RewardError, match="reward 'style': the judge at .* failed 3 times: HTTP 500 .*no luck"):
        scorer(retries=2)(rollouts("a 3"))
    assert len(server.requests) == 3                                       # and isn't asked again for the message
    with pytest.raises(RewardError, match="failed 1 times: URLError"):
        scorer(url="http://127.0.0.1:9", retries=0)(rollouts("a 3"))


@pytest.mark.parametrize("failure", [401, 404, 400, (302, {"Location": "http://127.0.0.1:9/elsewhere"})])
def test_what_does_not_pass_is_told_at_once(failure, server, scorer):
    server.script.append(failure)
    code = failure if isinstance(failure, int) else failure[0]
    with pytest.raises(RewardError, match=rf"HTTP {code} .*check url, model and \$OPENAI_API_KEY"):
        scorer()(rollouts("a 3"))
    assert len(server.requests) == 1


def test_a_reply_without_a_score_is_asked_for_again_and_then_does_not_apply(server, scorer):
    server.script.extend(["well", "Score: 11"])
    scores, _, metrics = scorer()(rollouts("a 3"))
    assert scores[0, 0] != scores[0, 0] and metrics["style/unscored"] == 1 and metrics["style/calls"] == 2
    server.script.append("hm")
    scores, _, metrics = scorer()(rollouts("a 3"))                        # not kept as an answer
    assert scores.tolist() == [[0.3]] and metrics["style/cost_total"] == pytest.approx(4 * 0.0002)


def test_the_key_is_sent_and_the_cost_limit_stops_the_run(server, scorer, monkeypatch):
    monkeypatch.setenv("MY_KEY", "k")
    scorer(api_key_env="MY_KEY")(rollouts("a 3"))
    assert server.keys == ["Bearer k"]
    with pytest.raises(RewardError, match=r"has cost \$0.00, as much as max_cost = 0.0002"):
        scorer(max_cost=0.0002)(rollouts("b 4"))
    assert scorer(max_cost=0.0002)(rollouts("a 3"))[0].tolist() == [[0.3]]      # what is known costs nothing
    server.usage = {}
    with pytest.raises(RewardError, match="no token usage"):
        scorer()(rollouts("c 5"))


def test_requests_run_at_once_and_beside_another_judge(server, scorer, tmp_path):
    server.meeting = threading.Barrier(6)                                  # every request waits for five others
    options = {"url": server.url, "model": "m", "prompt": "{completion}", "cache": f"{tmp_path}/j.sqlite", "concurrency": 3}
    both = find_rewards(["judge:a", "judge:b"], {"a": options, "b": options | {"model": "n"}})
    scores, _, metrics = Scorer(both)(rollouts("x 1", "y 2", "z 3"))
    assert scores.tolist() == [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]] and server.most == 6
    assert metrics["a/calls"] == metrics["b/calls"] == 3
    server.meeting, server.most = None, 0
    Scorer({"a": both["a"]})(rollouts(*(f"w{i} 1" for i in range(20))))
    assert server.most <= 3


@pytest.mark.parametrize("options, words", [
    ({"url": "localhost"}, "base address"), ({"prompt": "x"}, "needs {completion}"),
    ({"scale": [1, 0]}, "two rising numbers"), ({"retries": -1}, "at least 0"), ({"timeout": 0.0}, "more than 0"),
    ({"max_cost": 1.0, "price_in": 0.0, "price_out": 0.0}, "price_in"),
    ({"cache": "/proc/nowhere/x"}, "can't be used"), ({"modle": "m"}, "did you mean 'model'")])
def test_wrong_options_are_refused_before_a_run(options, words, scorer):
    with pytest.raises(ConfigError) as caught:
        scorer(**options)
    assert words in str(caught.value)


def test_a_reply_that_is_no_chat_completion_is_told(server, scorer):
    server.script.append({"choices": []})
    with pytest.raises(RewardError, match="no chat completion"):
        scorer()(rollouts("a 3"))
