"""An OpenAI-compatible server with scripted faults, run as a process of its own: `python endpoint_server.py LOG KEY`.

It prints its port, answers by the name of the model that is asked for, and appends a line a request to LOG: {"model",
"body", "at", "authorized"}, never a header. Models: BEHAVIOUR or BEHAVIOUR-once, at fault the first time that a
body is seen and well after. The judge prefers the response with more exclamation marks; judge-text tells no log-probs.
"""

import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOG, KEY = sys.argv[1], sys.argv[2]
seen, lock = {}, threading.Lock()


def preferred(question: str) -> float:
    """Log-odds of (A) by exclamation marks."""
    shown = re.findall(r"Response \([AB]\):\n((?:> .*\n?)+)", question)
    return float(shown[0].count("!") - shown[1].count("!")) if len(shown) == 2 else 0.0


def chat(text: str, finish: str = "stop", logprobs=None) -> dict:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "object": "chat.completion", "model": "served-1", "choices": [choice], "usage": usage}


def verdict(question: str, told: bool) -> dict:
    logit = preferred(question)
    letter = "A" if logit > 0 else "B"
    top = [{"token": "A", "logprob": -1.0 + logit}, {"token": "B", "logprob": -1.0}, {"token": "C", "logprob": -9.0}]
    place = {"token": letter, "logprob": top["AB".index(letter)]["logprob"], "top_logprobs": top}
    paren = {"token": "(", "logprob": 0.0, "top_logprobs": []}
    return chat(f"({letter}", logprobs={"content": [paren, place]} if told else None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, content, headers=()) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (*headers, ("Content-Type", "application/json"), ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def authorized(self) -> bool:
        return self.headers.get("Authorization", "") == f"Bearer {KEY}"

    def do_GET(self):
        if not self.authorized():
            return self.reply(401, {"error": {"message": "no"}})
        self.reply(404, {"error": {"message": "no such page"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps(body, sort_keys=True)
        with lock:
            times = seen[text] = seen.get(text, 0) + 1
            with open(LOG, "a") as log:
                line = {"model": body["model"], "body": body, "at": time.time(), "authorized": self.authorized()}
                log.write(json.dumps(line) + "\n")
        if not self.authorized():
            sent = self.headers.get("Authorization", "nothing")
            return self.reply(401, {"error": {"message": f"Incorrect key: {sent}\nsecond line " + "x" * 900}})
        behaviour, _, once = body["model"].partition("-once")
        if once == "" and "-once" in body["model"] and times > 1:
            behaviour = "ok"
        question = body["messages"][-1]["content"]
        match behaviour:
            case "429":
                self.reply(429, {"error": {"message": "slow down"}}, [("Retry-After", "1")])
            case "429-for-hours":
                self.reply(429, {"error": {"message": "quota"}}, [("Retry-After", "7200")])
            case "500":
                self.reply(500, b"<html>oops</html>")
            case "400":
                self.reply(400, {"error": {"message": "context too long"}})
            case "404":
                self.reply(404, {"error": {"message": "no such model"}})
            case "redirect":
                self.reply(307, b"", [("Location", f"http://{self.headers['Host']}/elsewhere")])
            case "hang":
                time.sleep(3)
                self.reply(200, chat("too late"))
            case "drip":  # a byte now and then: no single read takes long
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(30):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.1)
            case "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
            case "malformed":
                self.reply(200, b'{"choices": [{"message"')
            case "list":
                self.reply(200, [1])
            case "no-choices":
                self.reply(200, {"choices": []})
            case "no-text":
                self.reply(200, {"choices": [{"message": {"content": None, "tool_calls": []}}]})
            case "filtered":
                self.reply(200, chat("half a sen", "content_filter"))
            case "long":
                self.reply(200, chat("cut at the lim", "length"))
            case "no-usage":
                self.reply(200, {key: value for key, value in chat("fine").items() if key != "usage"})
            case "echo":  # a proxy that repeats the header
                self.reply(200, chat(f"you sent {self.headers['Authorization']}"))
            case "slow":
                time.sleep(0.2)
                self.reply(200, chat(f"A remark on {len(question)} characters."))
            case "judge":
                self.reply(200, verdict(question, told="logprobs" in body))
            case "judge-text":
                self.reply(200, verdict(question, told=False))
            case "first-place":
                self.reply(200, chat("A"))
            case "chatter":
                self.reply(200, chat("I think that A is better than B."))
            case "empty":
                self.reply(200, chat(""))
            case _:
                self.reply(200, chat(f"A remark on {len(question)} characters."))


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
